// The gated feed-forward network: a layer's own, or that of an expert.
#include "step.h"

void im_gate_row(const im_engine *e, const im_part *p, const im_expert *x, float *g, float *u, int b0, int b1) {
  const int at = 16 * b0, n = 16 * (b1 - b0);
  if (x->gate_bias) e->k->add(g + at, x->gate_bias + at, n);
  if (x->up_bias) e->k->add(u + at, x->up_bias + at, n);
  if (p->swiglu_limit > 0) e->k->swiglu_mul(g + at, u + at, g + at, n, p->swiglu_alpha, p->swiglu_limit);
  else e->k->silu_mul(g + at, u + at, g + at, n);
}

// gate, up and down over `count` normed and quantized rows of `acts`; leaves the result in `delta`
void im_gated_mlp(walker *w, const im_part *p, const im_expert *x, const im_acts *acts, int count, float *delta) {
  im_engine *e = w->e;
  const im_matrix *down = &x->down;
  const int stride = im_pad(down->cols, 32), width = im_pad(x->gate.rows, 16);
  float *g = e->shared.gate, *u = e->up;
  const int blocks = width / 16, b0 = blocks * w->thread / e->threads, b1 = blocks * (w->thread + 1) / e->threads;
  if (b0 < b1) {
    e->k->linear(&x->gate, acts, count, g, (size_t)stride, b0, b1);
    e->k->linear(&x->up, acts, count, u, (size_t)stride, b0, b1);
    for (int i = 0; i < count; i++) im_gate_row(e, p, x, g + (size_t)i * stride, u + (size_t)i * stride, b0, b1);
  }
  if (w->thread == 0 && width < stride)
    for (int i = 0; i < count; i++) memset(g + (size_t)i * stride + width, 0, (size_t)(stride - width) * 4);
  meet(w);
  if (is_quantized(down)) {
    int from, to;
    own_rows(w, count, &from, &to);
    for (int i = from; i < to; i++) quantize_row(e, w->l, 0, g, i, count, stride);
    if (!w->single) meet(w);
  }
  im_acts hidden = acts_of(w->l, g, stride, 0);
  im_linear_targets(e, (target[]){{down, delta, (size_t)e->w.d_pad}}, 1, &hidden, count, w->thread);
  meet(w);
  if (x->down_bias) {
    for (int i = w->thread; i < count; i += e->threads)
      e->k->add(delta + (size_t)i * e->w.d_pad, x->down_bias, im_pad(p->d_model, 16));
    meet(w);
  }
}

void im_ffn_norm(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count, int quantized) {
  im_engine *e = w->e;
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++) {
    norm_row(e, p, w->l->x + (size_t)active[i] * e->w.d_pad, l->ffn_norm, l->ffn_norm_bias,
             w->l->normed + (size_t)i * e->w.d_pad);
    if (quantized) quantize_row(e, w->l, 0, w->l->normed, i, count, e->w.d_pad);
  }
  if (!w->single) meet(w);
}

void im_dense(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count) {
  im_engine *e = w->e;
  const im_expert dense = {.gate = l->gate, .up = l->up, .down = l->down};
  im_ffn_norm(w, p, l, active, count, is_quantized(&l->gate) || is_quantized(&l->up));
  im_acts acts = acts_of(w->l, w->l->normed, e->w.d_pad, 0);
  im_gated_mlp(w, p, &dense, &acts, count, e->shared.delta);
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++)
    add_residual(e, p, w->l->x + (size_t)active[i] * e->w.d_pad, e->shared.delta + (size_t)i * e->w.d_pad, NULL);
}

// The expert that every row goes to, after the others: their normed and quantized rows are still there.
void im_shared_expert(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count) {
  im_engine *e = w->e;
  const int d_pad = e->w.d_pad, gated = l->shared_gate.format >= 0, stride = im_pad(p->n_experts, 16);
  im_acts acts = acts_of(&e->shared, e->shared.normed, d_pad, 0);
  if (gated)
    im_linear_targets(e, (target[]){{&l->shared_gate, e->now.logits, (size_t)stride}}, 1, &acts, count, w->thread);
  im_gated_mlp(w, p, &l->shared, &acts, count, e->shared.delta);
  for (int i = w->thread; i < count; i += e->threads) {
    float *delta = e->shared.delta + (size_t)i * d_pad;
    if (gated) {
      const float gate = 1.f / (1.f + im_exp(-e->now.logits[(size_t)i * stride]));
      for (int j = 0; j < p->d_model; j++) delta[j] *= gate;
    }
    add_residual(e, p, e->shared.x + (size_t)active[i] * d_pad, delta, NULL);
  }
  meet(w);
}
