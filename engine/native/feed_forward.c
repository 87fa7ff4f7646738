// The gated feed-forward network, dense.
#include "step.h"

// gate, up and down over `count` normed and quantized rows of `acts`; leaves the result in `delta`
void im_gated_mlp(walker *w, const im_matrix *gate, const im_matrix *up, const im_matrix *down, const im_acts *acts,
                  int count, float *delta) {
  im_engine *e = w->e;
  const int stride = im_pad(down->cols, 32), width = im_pad(gate->rows, 16);
  float *g = e->shared.gate, *u = e->up;
  const int blocks = width / 16, b0 = blocks * w->thread / e->threads, b1 = blocks * (w->thread + 1) / e->threads;
  if (b0 < b1) {
    e->k->linear(gate, acts, count, g, (size_t)stride, b0, b1);
    e->k->linear(up, acts, count, u, (size_t)stride, b0, b1);
    for (int i = 0; i < count; i++)
      e->k->silu_mul(g + (size_t)i * stride + 16 * b0, u + (size_t)i * stride + 16 * b0,
                     g + (size_t)i * stride + 16 * b0, 16 * (b1 - b0));
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
}

void im_ffn_norm(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count, int quantized) {
  im_engine *e = w->e;
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++) {
    e->k->rms_norm(w->l->x + (size_t)active[i] * e->w.d_pad, l->ffn_norm, w->l->normed + (size_t)i * e->w.d_pad,
                   p->d_model, p->norm_eps);
    if (quantized) quantize_row(e, w->l, 0, w->l->normed, i, count, e->w.d_pad);
  }
  if (!w->single) meet(w);
}

void im_dense(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count) {
  im_engine *e = w->e;
  im_ffn_norm(w, p, l, active, count, is_quantized(&l->gate) || is_quantized(&l->up));
  im_acts acts = acts_of(w->l, w->l->normed, e->w.d_pad, 0);
  im_gated_mlp(w, &l->gate, &l->up, &l->down, &acts, count, e->shared.delta);
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++)
    e->k->add(w->l->x + (size_t)active[i] * e->w.d_pad, e->shared.delta + (size_t)i * e->w.d_pad,
              im_pad(p->d_model, 16));
}
