// Attention: rotary positions, KV into its blocks, and query heads over them.
#include <math.h>

#include "step.h"

enum { HEADS_AT_ONCE = 16 };  // what they need stands on the stack

// rope: cosines, then sines, of one position
static void rotate(const im_engine *e, const im_part *p, float *head, const float *norm, const float *rope) {
  const int half = rotated(p) / 2;
  const float *cs = rope, *sn = cs + half;
  if (norm) {  // the head stands in a buffer of whole lanes, zero in the padding
    e->k->rms_norm(head, norm, head, p->head_dim, p->norm_eps);
  }
  head += p->kv_rank;
  for (int i = 0; i < half; i++) {
    float a = head[i], b = head[i + half];
    head[i] = a * cs[i] - b * sn[i];
    head[i + half] = b * cs[i] + a * sn[i];
  }
}

static uint8_t *kv_head(const im_part *p, int layer, int head, size_t *bytes) {
  const size_t element = p->kv_f32 ? 4 : 2, size = (size_t)im_pad(p->head_dim, 16) * 32 * element;
  *bytes = size;
  return p->kv + ((size_t)(layer - p->start) * (size_t)p->n_kv_heads + (size_t)head) * size;
}

static void store_kv(const im_engine *e, const im_part *p, const im_layer *l, int layer, int head, const im_row *row,
                     const im_sequence *table, int slot, float *k, float *v) {
  const int hd = p->head_dim, pad = im_pad(hd, 16);
  float buffer[pad] __attribute__((aligned(64)));
  size_t bytes;
  uint8_t *block = kv_head(p, layer, head, &bytes) + (size_t)table->blocks[row->position / 16] * p->kv_block_bytes;
  const int at = row->position % 16;
  if (l->k_bias)
    for (int i = 0; i < hd; i++) k[i] += l->k_bias[head * hd + i];
  if (l->v_bias)
    for (int i = 0; i < hd; i++) v[i] += l->v_bias[head * hd + i];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, k, (size_t)hd * 4);
  rotate(e, p, buffer, l->k_norm, e->rope + (size_t)slot * p->head_dim);
  if (p->kv_f32) {
    float *to = (float *)block;
    for (int i = 0; i < pad; i++) to[i * 16 + at] = buffer[i];
    memset(to + (16 + at) * pad, 0, (size_t)pad * 4);
    memcpy(to + (16 + at) * pad, v, (size_t)hd * 4);
  } else {
    uint16_t *to = (uint16_t *)block, half[pad];
    e->k->store_half(half, buffer, pad);
    for (int i = 0; i < pad; i++) to[i * 16 + at] = half[i];
    memset(buffer, 0, sizeof buffer);
    memcpy(buffer, v, (size_t)hd * 4);
    e->k->store_half(to + (16 + at) * pad, buffer, pad);
  }
}

// query heads [h0, h1), all of one KV head
static void attend_heads(im_engine *e, const im_part *p, const im_layer *l, int layer, int h0, int h1,
                         const im_row *row, const im_sequence *table, int slot, const float *q, float *out,
                         int thread) {
  const int hd = p->head_dim, pad = im_pad(hd, 16), n = h1 - h0, kv_index = h0 / (p->n_heads / p->n_kv_heads);
  float qs[n * pad] __attribute__((aligned(64))), os[n * pad] __attribute__((aligned(64)));
  float sink_qs[n * pad] __attribute__((aligned(64)));
  size_t bytes;
  im_kv_view view = {kv_head(p, layer, kv_index, &bytes),
                     table->blocks,
                     p->kv_block_bytes,
                     pad,
                     p->kv_f32,
                     p->attention_scale != 0.f ? p->attention_scale : 1.f / sqrtf((float)hd),
                     0,
                     sink_qs,
                     l->sink_logits ? l->sink_logits + h0 : NULL};
  int first = window_start(table, row->position), last = row->position;
  if (l->window && last + 1 - l->window >= first) {
    first = last + 1 - l->window;  // the model's own window is the narrower one, and has no sinks
  } else if (first && table->sinks) {
    int32_t *blocks = e->gathered[thread];
    memcpy(blocks, table->blocks, (size_t)table->sinks * 4);
    memcpy(blocks + table->sinks, table->blocks + first / 16, (size_t)(last / 16 - first / 16 + 1) * 4);
    view.blocks = blocks;
    view.sinks = table->sinks;
    last += 16 * table->sinks - first;
    first = 0;
  }
  memset(qs, 0, sizeof qs);
  if (view.sinks) memset(sink_qs, 0, sizeof sink_qs);
  const size_t at = (size_t)slot * p->head_dim;
  for (int h = 0; h < n; h++) {
    const float *from = q + (size_t)(h0 + h) * hd;
    float *to = qs + h * pad, *sink_to = sink_qs + h * pad;
    for (int i = 0; i < hd; i++) to[i] = l->q_bias ? from[i] + l->q_bias[(h0 + h) * hd + i] : from[i];
    if (view.sinks) {
      memcpy(sink_to, to, (size_t)hd * 4);
      rotate(e, p, sink_to, l->q_norm, e->sink_rope + at);
    }
    rotate(e, p, to, l->q_norm, e->rope + at);
  }
  e->k->attend(&view, qs, n, first, last, e->scores[thread], os);
  for (int h = 0; h < n; h++) memcpy(out + (size_t)(h0 + h) * hd, os + h * pad, (size_t)hd * 4);
}

// q and k under a norm over all heads together
static void norm_whole(walker *w, const im_part *p, const im_layer *l, int count) {
  im_engine *e = w->e;
  const int hd = p->head_dim;
  for (int i = w->thread; i < count; i += e->threads) {
    float *q = e->qkv + (size_t)i * (size_t)e->w.qkv, *k = q + e->w.q_rows;
    e->k->rms_norm(q, l->q_norm_whole, q, p->n_heads * hd, p->norm_eps);
    e->k->rms_norm(k, l->k_norm_whole, k, p->n_kv_heads * hd, p->norm_eps);
  }
  meet(w);
}

void im_attention(walker *w, const im_part *p, int part, int layer, const int32_t *active, int count) {
  im_engine *e = w->e;
  const im_layer *l = &p->layers[layer - p->start];
  const int d_pad = e->w.d_pad, att_pad = e->w.att_pad;
  const im_matrix *first = p->q_rank ? &l->q_down : &l->q, *second = p->kv_rank ? &l->latent : &l->k;
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++) {
    norm_row(e, p, w->l->x + (size_t)active[i] * d_pad, l->attn_norm, l->attn_norm_bias,
             w->l->normed + (size_t)i * d_pad);
    if (is_quantized(first) || is_quantized(second) || is_quantized(&l->v))
      quantize_row(e, w->l, 1, w->l->normed, i, count, d_pad);
  }
  if (!w->single) meet(w);
  // q, k and v see 16-bit activations: a third of the whole error for a sixth of the products (k and v are remembered)
  im_acts acts = acts_of(w->l, w->l->normed, d_pad, 1);
  const int ldy = e->w.qkv;
  float *q = e->qkv, *k = q + e->w.q_rows, *v = k + e->w.kv_rows;
  im_linear_targets(e, (target[]){{first, q, ldy}, {second, k, ldy}, {&l->v, v, ldy}}, p->kv_rank ? 2 : 3, &acts, count,
                    w->thread);
  meet(w);
  if (l->q_norm_whole) norm_whole(w, p, l, count);
  if (p->kv_rank) {  // keys begin with what serves as values
    im_latent_queries(w, p, l, count);
    v = k;
  }
  const int pairs = count * p->n_kv_heads, hd = p->head_dim;
  for (int j = pairs * w->thread / e->threads; j < pairs * (w->thread + 1) / e->threads; j++) {
    const int i = j / p->n_kv_heads, h = j % p->n_kv_heads;
    const im_row *row = &w->c->rows[active[i]];
    store_kv(e, p, l, layer, h, row, table_of(w, part, row), active[i], k + (size_t)i * ldy + h * hd,
             v + (size_t)i * ldy + h * hd);
  }
  if (w->thread == 0) im_pool_rewind(e->pool);
  meet(w);
  const int share = p->n_heads / p->n_kv_heads;
  float *out = p->kv_rank ? e->mixed : e->shared.attention;
  const size_t out_row = (size_t)(p->kv_rank ? p->n_heads * hd : att_pad), q_row = p->kv_rank ? out_row : (size_t)ldy;
  if (p->kv_rank) q = e->queries;
  if (count == 1) {  // whole query heads: finer than KV heads, so that two threads balance
    const im_row *row = &w->c->rows[active[0]];
    const int h1 = p->n_heads * (w->thread + 1) / e->threads;
    for (int h = p->n_heads * w->thread / e->threads; h < h1;) {
      const int whole = (h / share + 1) * share < h1 ? (h / share + 1) * share : h1;
      const int end = whole < h + HEADS_AT_ONCE ? whole : h + HEADS_AT_ONCE;
      attend_heads(e, p, l, layer, h, end, row, table_of(w, part, row), active[0], q, out, w->thread);
      h = end;
    }
  } else {  // KV heads outside, rows inside, so that a head's blocks stay in the cache
    for (int j; (j = im_pool_take(e->pool, 2)) < pairs;)
      for (int n = j; n < j + 2 && n < pairs; n++) {
        const int h = n / count, i = n % count;
        const im_row *row = &w->c->rows[active[i]];
        for (int at = h * share; at < (h + 1) * share; at += HEADS_AT_ONCE) {
          const int end = at + HEADS_AT_ONCE < (h + 1) * share ? at + HEADS_AT_ONCE : (h + 1) * share;
          attend_heads(e, p, l, layer, at, end, row, table_of(w, part, row), active[i], q + (size_t)i * q_row,
                       out + (size_t)i * out_row, w->thread);
        }
      }
  }
  meet(w);
  if (p->kv_rank) {
    im_latent_values(w, p, l, count);
    out = e->shared.attention;
  }
  if (is_quantized(&l->o)) {
    for (int i = from; i < to; i++) quantize_row(e, w->l, 0, out, i, count, att_pad);
    if (!w->single) meet(w);
  }
  acts = acts_of(w->l, out, att_pad, 0);
  im_linear_targets(e, (target[]){{&l->o, e->shared.delta, d_pad}}, 1, &acts, count, w->thread);
  meet(w);
  for (int i = from; i < to; i++)
    add_residual(e, p, w->l->x + (size_t)active[i] * d_pad, e->shared.delta + (size_t)i * d_pad, l->o_bias);
}
