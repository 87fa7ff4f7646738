// A router's choice: which experts a row goes to, in which order, with which weights, and how many of their planes.
//
// Every sum is one chain in the order of ids or of ranks, and ties go to the lowest id, so that all instruction sets
// agree. Softmax over the chosen experts alone is softmax over all of them, renormalized.
#include <math.h>

#include "step.h"

static float sigmoid(float x) { return 1.f / (1.f + im_exp(-x)); }

// The `top` largest of `n` numbers in canonical order: number descending, id ascending.
static void choose(const float *numbers, int n, int top, int32_t *chosen) {
  for (int r = 0; r < top; r++) {
    int best = -1;
    for (int x = 0; x < n; x++) {
      int taken = 0;
      for (int s = 0; s < r; s++) taken |= chosen[s] == x;
      if (!taken && (best < 0 || numbers[x] > numbers[best])) best = x;
    }
    chosen[r] = best;
  }
}

// Takes the experts of all but the best groups out of the choice. A group is as good as the sum of its best experts.
static void keep_groups(const im_part *p, float *choice) {
  const int size = p->n_experts / p->n_groups;
  float scores[p->n_groups];
  int32_t best[p->group_best], kept[p->top_groups];
  for (int g = 0; g < p->n_groups; g++) {
    choose(choice + g * size, size, p->group_best, best);
    scores[g] = 0;
    for (int r = 0; r < p->group_best; r++) scores[g] += choice[g * size + best[r]];
  }
  choose(scores, p->n_groups, p->top_groups, kept);
  for (int g = 0; g < p->n_groups; g++) {
    int stays = 0;
    for (int r = 0; r < p->top_groups; r++) stays |= kept[r] == g;
    for (int x = g * size; x < (g + 1) * size && !stays; x++) choice[x] = -INFINITY;
  }
}

// SparseMixer (Liu et al. 2023): two experts, each weighted among those whose logits come near to its own.
static void mix_sparsely(const im_part *p, const float *logits, int32_t *chosen, float *weight) {
  choose(logits, p->n_experts, p->top_k, chosen);
  for (int r = 0; r < p->top_k; r++) {
    const float top = logits[chosen[r]];
    float total = 0;
    for (int x = 0; x < p->n_experts; x++) {
      int taken = 0;
      for (int s = 0; s < r; s++) taken |= chosen[s] == x;
      const float size = fabsf(logits[x]) > top ? fabsf(logits[x]) : top;
      if (!taken && !((top - logits[x]) / size > 2 * p->jitter)) total += im_exp(logits[x] - top);
    }
    weight[r] = 1.f / total;
  }
}

static void decide(const im_part *p, const im_layer *l, float *scores, int32_t *chosen, float *weight) {
  const int n = p->n_experts;
  float *choice = scores, changed[n], top = -INFINITY, total = 0, kept = 0;
  if (l->router_bias)
    for (int x = 0; x < n; x++) scores[x] += l->router_bias[x];
  if (p->score == IM_SPARSEMIXER) {
    mix_sparsely(p, scores, chosen, weight);
  } else {
    const int by_logit = p->score == IM_SOFTMAX && !l->choice_bias && p->group_best < 2;
    if (p->score == IM_SIGMOID)
      for (int x = 0; x < n; x++) scores[x] = sigmoid(scores[x]);
    else {
      for (int x = 0; x < n; x++) top = scores[x] > top ? scores[x] : top;
      for (int x = 0; x < n; x++) total += im_exp(scores[x] - top);
    }
    if (!by_logit || p->n_groups > 1) {
      for (int x = 0; x < n; x++) {
        changed[x] = p->score == IM_SIGMOID || by_logit ? scores[x] : im_exp(scores[x] - top) / total;
        if (l->choice_bias) changed[x] += l->choice_bias[x];
      }
      if (p->n_groups > 1) keep_groups(p, changed);
      choice = changed;
    }
    choose(choice, n, p->top_k, chosen);
    for (int r = 0; r < p->top_k; r++) {
      const float score = scores[chosen[r]];
      kept += weight[r] = p->score == IM_SIGMOID ? score : im_exp(score - top) / total;
    }
  }
  if (p->renormalize)
    for (int r = 0; r < p->top_k; r++) weight[r] /= p->score == IM_SIGMOID ? kept + 1e-20f : kept;
  if (p->expert_scale != 0.f)
    for (int r = 0; r < p->top_k; r++) weight[r] *= p->expert_scale;
}

// An expert's share is its weight among those of its row.
static void take_planes(const im_part *p, const im_layer *l, const float *weight, int32_t *planes) {
  float sum = 0;
  for (int r = 0; r < p->top_k; r++) sum += weight[r];
  for (int r = 0; r < p->top_k; r++) {
    planes[r] = l->tolerance ? 0 : l->n_planes;
    while (planes[r] < l->n_planes && weight[r] >= l->tolerance[planes[r]] * sum) planes[r]++;
  }
}

void im_route(const im_part *p, const im_layer *l, int layer, const im_row *row, float *logits, routes *to,
              int slot, int early) {
  const size_t at = (size_t)slot * (size_t)p->top_k, size = (size_t)p->top_k;
  if (p->replay) {
    const size_t from = ((size_t)(row->position % p->replay->positions) * (size_t)(p->end - p->start) +
                         (size_t)(layer - p->start)) * size;
    memcpy(to->chosen + at, (early ? p->replay->foreseen : p->replay->chosen) + from, size * 4);
    memcpy(to->weights + at, p->replay->weights + from, size * 4);
  } else {
    decide(p, l, logits, to->chosen + at, to->weights + at);
  }
  take_planes(p, l, to->weights + at, to->planes + at);
}
