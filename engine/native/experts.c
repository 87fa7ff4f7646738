// A mixture of experts: route, pause for missing experts, compute each expert over its rows, add in rank order.
#include <math.h>

#include "step.h"

static void route_row(im_engine *e, const im_part *p, int row) {
  const float *logits = e->router + (size_t)row * im_pad(p->n_experts, 16);
  int32_t *chosen = e->chosen + (size_t)row * p->top_k;
  float *weight = e->weights + (size_t)row * p->top_k, top = -INFINITY, total = 0, kept = 0;
  for (int r = 0; r < p->top_k; r++) {  // canonical order: logit descending, id ascending
    int best = -1;
    for (int x = 0; x < p->n_experts; x++) {
      int taken = 0;
      for (int s = 0; s < r; s++) taken |= chosen[s] == x;
      if (!taken && (best < 0 || logits[x] > logits[best])) best = x;
    }
    chosen[r] = best;
  }
  top = logits[chosen[0]];
  for (int x = 0; x < p->n_experts; x++) total += im_exp(logits[x] - top);
  for (int r = 0; r < p->top_k; r++) kept += weight[r] = im_exp(logits[chosen[r]] - top) / total;
  if (p->renormalize)
    for (int r = 0; r < p->top_k; r++) weight[r] /= kept;
}

static int missing_experts(im_engine *e, const im_part *p, const im_layer *l, int layer, int count, im_step_call *c) {
  c->n_need = 0;
  c->need_layer = layer;
  for (int x = 0; x < p->n_experts; x++) {
    if (l->experts[x].resident) continue;
    int used = 0;
    for (int i = 0; i < count * p->top_k && !used; i++) used = e->chosen[i] == x;
    if (used) c->need_experts[c->n_need++] = x;
  }
  return c->n_need;
}

static int rows_of(const im_engine *e, const im_part *p, int expert, int count) {
  int rows = 0;
  for (int i = 0; i < count * p->top_k; i++) rows += e->chosen[i] == expert;
  return rows;
}

// the expert's `rows` of the `count` rows of `from`
static void gather(walker *w, const im_part *p, int expert, int count, const im_acts *from, lane *to, int rows) {
  im_engine *e = w->e;
  const int stride = from->stride;
  int n = 0;
  for (int i = 0; i < count; i++)
    for (int r = 0; r < p->top_k; r++)
      if (e->chosen[(size_t)i * p->top_k + r] == expert) {
        if (n % e->threads == w->thread) {
          size_t its, step;
          const uint8_t *panel = from->panels + im_panel_at(i, count, stride, 0, &its);
          uint8_t *target = to->panels + im_panel_at(n, rows, stride, 0, &step);
          memcpy(to->normed + (size_t)n * stride, from->x + (size_t)i * stride, (size_t)stride * 4);
          for (int g = 0; g < stride / 32; g++) memcpy(target + g * step, panel + g * its, IM_GROUP);
        }
        n++;
      }
}

// returns 0 to pause: every thread sees the same
int im_experts(walker *w, const im_part *p, const im_layer *l, int layer, const int32_t *active, int count,
               int resumed) {
  im_engine *e = w->e;
  const int d_pad = e->w.d_pad;
  im_acts acts = acts_of(&e->shared, e->shared.normed, d_pad, 0);
  if (!resumed) {
    im_ffn_norm(w, p, l, active, count, 1);
    im_linear_targets(e, (target[]){{&l->router, e->router, (size_t)im_pad(p->n_experts, 16)}}, 1, &acts, count,
                      w->thread);
    meet(w);
    for (int i = w->thread; i < count; i += e->threads) route_row(e, p, i);
    meet(w);
  }
  if (w->thread == 0) e->need = missing_experts(e, p, l, layer, count, w->c);
  meet(w);
  if (e->need) return 0;
  lane *gathered = &e->own[e->threads];
  for (int x = 0; x < p->n_experts; x++) {
    int n = rows_of(e, p, x, count);
    if (!n) continue;
    gather(w, p, x, count, &acts, gathered, n);
    meet(w);
    lane *before = w->l;
    im_acts its = acts_of(gathered, gathered->normed, d_pad, 0);
    lane hidden = *gathered;  // the hidden activations go behind the gathered ones
    hidden.panels = (uint8_t *)gathered->attention;  // 4 bytes an activation, of which panels take at most 4
    w->l = &hidden;
    im_gated_mlp(w, &l->experts[x].gate, &l->experts[x].up, &l->experts[x].down, &its, n, e->shared.delta);
    w->l = before;
    n = 0;
    for (int i = 0; i < count; i++)
      for (int r = 0; r < p->top_k; r++)
        if (e->chosen[(size_t)i * p->top_k + r] == x) {
          if (n % e->threads == w->thread)
            memcpy(e->kept + ((size_t)i * p->top_k + r) * d_pad, e->shared.delta + (size_t)n * d_pad,
                   (size_t)d_pad * 4);
          n++;
        }
    meet(w);
  }
  for (int i = w->thread; i < count; i += e->threads) {
    float *row = e->shared.x + (size_t)active[i] * d_pad;
    const float *kept = e->kept + (size_t)i * p->top_k * d_pad;
    for (int j = 0; j < p->d_model; j++) {
      float sum = 0;
      for (int r = 0; r < p->top_k; r++) sum += e->weights[(size_t)i * p->top_k + r] * kept[(size_t)r * d_pad + j];
      row[j] += sum;
    }
  }
  meet(w);
  return 1;
}
