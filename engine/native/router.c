// Where rows go: the experts of a row, their weights, and how many of their planes it takes.
#include <math.h>

#include "step.h"

// The `n` largest of `count` scores, in canonical order: score descending, index ascending.
static void choose(const float *scores, int count, int n, int32_t *chosen) {
  for (int r = 0; r < n; r++) {
    int best = -1;
    for (int x = 0; x < count; x++) {
      int taken = 0;
      for (int s = 0; s < r; s++) taken |= chosen[s] == x;
      if (!taken && (best < 0 || scores[x] > scores[best])) best = x;
    }
    chosen[r] = best;
  }
}

static void weigh(const im_part *p, const float *logits, const int32_t *chosen, float *weight) {
  const float top = logits[chosen[0]];
  float total = 0, kept = 0;
  for (int x = 0; x < p->n_experts; x++) total += im_exp(logits[x] - top);
  for (int r = 0; r < p->top_k; r++) kept += weight[r] = im_exp(logits[chosen[r]] - top) / total;
  if (p->renormalize)
    for (int r = 0; r < p->top_k; r++) weight[r] /= kept;
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

void im_route(const im_part *p, const im_layer *l, int layer, const im_row *row, const float *logits, routes *to,
              int slot, int early) {
  const size_t at = (size_t)slot * (size_t)p->top_k, size = (size_t)p->top_k;
  if (p->replay) {
    const size_t from = ((size_t)(row->position % p->replay->positions) * (size_t)(p->end - p->start) +
                         (size_t)(layer - p->start)) * size;
    memcpy(to->chosen + at, (early ? p->replay->foreseen : p->replay->chosen) + from, size * 4);
    memcpy(to->weights + at, p->replay->weights + from, size * 4);
  } else {
    choose(logits, p->n_experts, p->top_k, to->chosen + at);
    weigh(p, logits, to->chosen + at, to->weights + at);
  }
  take_planes(p, l, to->weights + at, to->planes + at);
}
