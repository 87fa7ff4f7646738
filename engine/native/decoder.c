// The step: layers over rows, on all threads at once. Between two barriers each thread writes only what it owns:
// blocks of 16 output channels in a linear map, rows in a norm, pairs of (row, KV head) in attention. With a single
// row every thread repeats norms and quantization on its own copy, which costs less than a barrier.
#include "decoder.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"
#include "rope.h"
#include "sampler.h"

enum { HEAD_ROWS = 32 };  // rows that go through the output head together

typedef struct { int first_layer, last_layer, first, count; } segment;  // layers with the same active rows

typedef struct {  // what one thread (or all of them together) needs for some rows
  float *x, *normed, *attention, *gate, *delta;
  int8_t *q, *low;
  float *scale;
  int32_t *sums;
} lane;

typedef struct {
  int d, d_pad, heads_pad, att_pad, q_rows, kv_rows, qkv, ff, ff_pad, widest, vocab_pad, max_experts, top_k;
} widths;

struct im_engine {
  im_pool *pool;
  const im_kernels *k;
  int threads;
  widths w;
  char *memory;
  size_t capacity;
  lane shared, *own;           // own[thread] for the single row
  float *qkv, *up, **scores, *logits, *rope, *kept, *router;
  im_candidate **candidates;
  int32_t *active, *chosen;    // active rows of all segments; [row][top_k] experts
  float *weights;              // [row][top_k] weights of the chosen experts
  segment *segments;
  int n_segments, n_logit_rows;
  int32_t *logit_rows;
  // where to go on after IM_NEED
  im_step_call *call;
  int segment, layer, resumed, need;
};

static const im_part *part_of(const im_step_call *c, int layer, int *index) {
  int p = 0;
  while (layer >= c->parts[p]->end) p++;
  *index = p;
  return c->parts[p];
}

// ---- linear maps that share their activations
typedef struct { const im_matrix *w; float *y; size_t ldy; } target;

static void linear_targets(im_engine *e, const target *t, int n, const im_acts *acts, int rows, int thread) {
  int total = 0, done = 0;
  for (int i = 0; i < n; i++) total += im_pad(t[i].w->rows, 16) / 16;
  const int b0 = (int)((int64_t)total * thread / e->threads), b1 = (int)((int64_t)total * (thread + 1) / e->threads);
  for (int i = 0; i < n; i++) {
    const int blocks = im_pad(t[i].w->rows, 16) / 16;
    const int from = b0 > done ? b0 - done : 0, to = b1 - done < blocks ? b1 - done : blocks;
    if (from < to) e->k->linear(t[i].w, acts, rows, t[i].y, t[i].ldy, from, to);
    done += blocks;
  }
}

static int is_quantized(const im_matrix *w) { return w->format >= IM_Q8; }

static im_acts acts_of(const lane *l, const float *x, int stride) {
  return (im_acts){x, l->q, NULL, l->scale, l->sums, stride};
}

static void quantize_row(const im_engine *e, lane *l, int fine, const float *x, int row, int stride) {
  const size_t at = (size_t)row * (size_t)stride, group = (size_t)row * (size_t)(stride / 32);
  e->k->quantize(x + at, stride, l->q + at, fine ? l->low + at : NULL, l->scale + group, l->sums + 2 * group);
}

void im_embed(const im_matrix *w, int32_t token, float *x) {
  const int stride = im_pad(w->cols, 32), groups = stride / 32, b = token / 16, r = token % 16;
  for (int c = 0; c < w->cols; c++) {
    const size_t line = (size_t)b * groups * 8 + c / 4, at = 4 * r + c % 4, g = ((size_t)b * groups + c / 32) * 16 + r;
    const int j = (int)(line % 8);
    const size_t group = line / 8;
    const uint8_t *codes = w->codes;
    const size_t element = ((size_t)b * stride + c) * 16 + r;
    float s = 0, m = 0;
    int q = 0;
    switch (w->format) {
      case IM_F32: x[c] = ((const float *)w->codes)[element]; continue;
      case IM_F16: x[c] = im_half_to_float(((const uint16_t *)w->codes)[element]); continue;
      case IM_BF16: { uint32_t u = (uint32_t)((const uint16_t *)w->codes)[element] << 16; memcpy(&x[c], &u, 4); continue; }
      case IM_Q8: case IM_Q8X: q = codes[line * 64 + at]; break;
      case IM_Q4: case IM_Q4M: case IM_Q4X: q = (codes[group * 256 + (j / 2) * 64 + at] >> (4 * (j % 2))) & 15; break;
      default: q = (codes[group * 128 + (j / 4) * 64 + at] >> (2 * (j % 4))) & 3;
    }
    if (w->format == IM_N4 || w->format == IM_N8)
      q = q << 2 | ((((const uint8_t *)w->p1)[group * 128 + (j / 4) * 64 + at] >> (2 * (j % 4))) & 3);
    if (w->format == IM_N8) q = q << 4 | ((((const uint8_t *)w->p2)[group * 256 + (j / 2) * 64 + at] >> (4 * (j % 2))) & 15);
    if (w->format == IM_Q8X) s = ((const float *)w->scales)[(((size_t)b * groups + c / 32) * 2 + c / 16 % 2) * 16 + r];
    else if (w->format == IM_Q4X) { s = ((const float *)w->scales)[g]; m = ((const float *)w->mins)[g]; }
    else s = im_half_to_float(((const uint16_t *)w->scales)[g]);
    if (w->format == IM_Q4M) m = im_half_to_float(((const uint16_t *)w->mins)[g]);
    switch (w->format) {
      case IM_Q8: case IM_Q8X: x[c] = s * (float)(q - 128); break;
      case IM_Q4M: case IM_Q4X: x[c] = s * (float)q + m; break;
      case IM_N2: x[c] = s * ((float)q - 1.625f); break;
      case IM_N8: x[c] = s * 0.0625f * ((float)q - 135.5f); break;
      default: x[c] = s * (float)(q - 8);
    }
  }
  memset(x + w->cols, 0, (size_t)(stride - w->cols) * 4);
}

// ---- attention
static void rotate(const im_engine *e, const im_part *p, float *head, const float *norm, int row) {
  const int half = p->head_dim / 2;
  const float *cs = e->rope + (size_t)row * p->head_dim, *sn = cs + half;
  if (norm) {  // the head stands in a buffer of whole lanes, zero in the padding
    e->k->rms_norm(head, norm, head, p->head_dim, p->norm_eps);
  }
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
  if (l->k_bias) for (int i = 0; i < hd; i++) k[i] += l->k_bias[head * hd + i];
  if (l->v_bias) for (int i = 0; i < hd; i++) v[i] += l->v_bias[head * hd + i];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, k, (size_t)hd * 4);
  rotate(e, p, buffer, l->k_norm, slot);
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
static void attend_heads(im_engine *e, const im_part *p, const im_layer *l, int layer, int h0, int h1, const im_row *row,
                         const im_sequence *table, int slot, const float *q, float *out, int thread) {
  const int hd = p->head_dim, pad = im_pad(hd, 16), n = h1 - h0, kv_index = h0 / (p->n_heads / p->n_kv_heads);
  float qs[n * pad] __attribute__((aligned(64))), os[n * pad] __attribute__((aligned(64)));
  memset(qs, 0, sizeof qs);
  for (int h = 0; h < n; h++) {
    const float *from = q + (size_t)(h0 + h) * hd;
    for (int i = 0; i < hd; i++) qs[h * pad + i] = l->q_bias ? from[i] + l->q_bias[(h0 + h) * hd + i] : from[i];
    rotate(e, p, qs + h * pad, l->q_norm, slot);
  }
  size_t bytes;
  im_kv_view view = {kv_head(p, layer, kv_index, &bytes), table->blocks, p->kv_block_bytes, pad, p->kv_f32, 1.f / sqrtf((float)hd)};
  int window = l->window, first = 0;
  if (table->window && (!window || table->window < window)) window = table->window;
  if (window && row->position + 1 > window) first = row->position + 1 - window;
  e->k->attend(&view, qs, n, first, row->position, e->scores[thread], os);
  for (int h = 0; h < n; h++) memcpy(out + (size_t)(h0 + h) * hd, os + h * pad, (size_t)hd * 4);
}

// ---- one thread's walk through the layers
typedef struct {
  im_engine *e;
  im_step_call *c;
  int thread, single;
  lane *l;
} walker;

static void meet(const walker *w) { im_pool_barrier(w->e->pool); }

// The rows of an active set that this thread owns in norms: all of them when it works on a copy of its own.
static void own_rows(const walker *w, int count, int *from, int *to) {
  *from = w->single ? 0 : (int)((int64_t)count * w->thread / w->e->threads);
  *to = w->single ? count : (int)((int64_t)count * (w->thread + 1) / w->e->threads);
}

static const im_sequence *table_of(const walker *w, int part, const im_row *row) {
  return w->c->tables[part] + row->sequence;
}

static void attention_block(walker *w, const im_part *p, int part, int layer, const int32_t *active, int count) {
  im_engine *e = w->e;
  const im_layer *l = &p->layers[layer - p->start];
  const int d_pad = e->w.d_pad, att_pad = e->w.att_pad;
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++) {
    e->k->rms_norm(w->l->x + (size_t)active[i] * d_pad, l->attn_norm, w->l->normed + (size_t)i * d_pad, p->d_model, p->norm_eps);
    if (is_quantized(&l->q) || is_quantized(&l->k) || is_quantized(&l->v)) quantize_row(e, w->l, 1, w->l->normed, i, d_pad);
  }
  if (!w->single) meet(w);
  // q, k and v see 16-bit activations: a third of the whole error for a sixth of the products (k and v are remembered)
  im_acts acts = acts_of(w->l, w->l->normed, d_pad);
  acts.low = w->l->low;
  const int ldy = e->w.qkv;
  float *q = e->qkv, *k = q + e->w.q_rows, *v = k + e->w.kv_rows;
  linear_targets(e, (target[]){{&l->q, q, ldy}, {&l->k, k, ldy}, {&l->v, v, ldy}}, 3, &acts, count, w->thread);
  meet(w);
  const int pairs = count * p->n_kv_heads, hd = p->head_dim;
  for (int j = pairs * w->thread / e->threads; j < pairs * (w->thread + 1) / e->threads; j++) {
    const int i = j / p->n_kv_heads, h = j % p->n_kv_heads;
    const im_row *row = &w->c->rows[active[i]];
    store_kv(e, p, l, layer, h, row, table_of(w, part, row), active[i], k + (size_t)i * ldy + h * hd, v + (size_t)i * ldy + h * hd);
  }
  if (w->thread == 0) im_pool_rewind(e->pool);
  meet(w);
  const int share = p->n_heads / p->n_kv_heads;
  float *out = e->shared.attention;
  if (count == 1) {  // whole query heads: finer than KV heads, so that two threads balance
    const im_row *row = &w->c->rows[active[0]];
    const int h1 = p->n_heads * (w->thread + 1) / e->threads;
    for (int h = p->n_heads * w->thread / e->threads; h < h1;) {
      const int end = (h / share + 1) * share < h1 ? (h / share + 1) * share : h1;
      attend_heads(e, p, l, layer, h, end, row, table_of(w, part, row), active[0], q, out, w->thread);
      h = end;
    }
  } else {  // KV heads outside, rows inside, so that a head's blocks stay in the cache
    for (int j; (j = im_pool_take(e->pool, 2)) < pairs;)
      for (int n = j; n < j + 2 && n < pairs; n++) {
        const int h = n / count, i = n % count;
        const im_row *row = &w->c->rows[active[i]];
        attend_heads(e, p, l, layer, h * share, (h + 1) * share, row, table_of(w, part, row), active[i],
                     q + (size_t)i * ldy, out + (size_t)i * att_pad, w->thread);
      }
  }
  meet(w);
  if (is_quantized(&l->o)) {
    for (int i = from; i < to; i++) quantize_row(e, w->l, 0, out, i, att_pad);
    if (!w->single) meet(w);
  }
  acts = acts_of(w->l, out, att_pad);
  linear_targets(e, (target[]){{&l->o, e->shared.delta, d_pad}}, 1, &acts, count, w->thread);
  meet(w);
  for (int i = from; i < to; i++) e->k->add(w->l->x + (size_t)active[i] * d_pad, e->shared.delta + (size_t)i * d_pad, im_pad(p->d_model, 16));
}

// gate, up and down over `count` normed and quantized rows of `acts`; leaves the result in `delta`
static void gated_mlp(walker *w, const im_matrix *gate, const im_matrix *up, const im_matrix *down, const im_acts *acts,
                      int count, float *delta) {
  im_engine *e = w->e;
  const int ff = e->w.ff_pad, stride = im_pad(down->cols, 32), width = im_pad(gate->rows, 16);
  float *g = e->shared.gate, *u = e->up;
  const int blocks = width / 16, b0 = blocks * w->thread / e->threads, b1 = blocks * (w->thread + 1) / e->threads;
  (void)ff;
  if (b0 < b1) {
    e->k->linear(gate, acts, count, g, (size_t)stride, b0, b1);
    e->k->linear(up, acts, count, u, (size_t)stride, b0, b1);
    for (int i = 0; i < count; i++)
      e->k->silu_mul(g + (size_t)i * stride + 16 * b0, u + (size_t)i * stride + 16 * b0, g + (size_t)i * stride + 16 * b0, 16 * (b1 - b0));
  }
  if (w->thread == 0 && width < stride)
    for (int i = 0; i < count; i++) memset(g + (size_t)i * stride + width, 0, (size_t)(stride - width) * 4);
  meet(w);
  if (is_quantized(down)) {
    int from, to;
    own_rows(w, count, &from, &to);
    for (int i = from; i < to; i++) quantize_row(e, w->l, 0, g, i, stride);
    if (!w->single) meet(w);
  }
  im_acts hidden = acts_of(w->l, g, stride);
  linear_targets(e, (target[]){{down, delta, (size_t)e->w.d_pad}}, 1, &hidden, count, w->thread);
  meet(w);
}

static void ffn_norm(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count, int quantized) {
  im_engine *e = w->e;
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++) {
    e->k->rms_norm(w->l->x + (size_t)active[i] * e->w.d_pad, l->ffn_norm, w->l->normed + (size_t)i * e->w.d_pad, p->d_model, p->norm_eps);
    if (quantized) quantize_row(e, w->l, 0, w->l->normed, i, e->w.d_pad);
  }
  if (!w->single) meet(w);
}

static void dense_block(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count) {
  im_engine *e = w->e;
  ffn_norm(w, p, l, active, count, is_quantized(&l->gate) || is_quantized(&l->up));
  im_acts acts = acts_of(w->l, w->l->normed, e->w.d_pad);
  gated_mlp(w, &l->gate, &l->up, &l->down, &acts, count, e->shared.delta);
  int from, to;
  own_rows(w, count, &from, &to);
  for (int i = from; i < to; i++) e->k->add(w->l->x + (size_t)active[i] * e->w.d_pad, e->shared.delta + (size_t)i * e->w.d_pad, im_pad(p->d_model, 16));
}

// ---- mixture of experts: route, pause for missing experts, compute each expert over its rows, add in rank order
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
  if (p->renormalize) for (int r = 0; r < p->top_k; r++) weight[r] /= kept;
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

static void gather(walker *w, const im_part *p, int expert, int count, const im_acts *from, lane *to, int *rows) {
  im_engine *e = w->e;
  const int stride = from->stride, groups = stride / 32;
  int n = 0;
  for (int i = 0; i < count; i++)
    for (int r = 0; r < p->top_k; r++)
      if (e->chosen[(size_t)i * p->top_k + r] == expert) {
        if (n % e->threads == w->thread) {
          memcpy(to->normed + (size_t)n * stride, from->x + (size_t)i * stride, (size_t)stride * 4);
          memcpy(to->q + (size_t)n * stride, from->q + (size_t)i * stride, (size_t)stride);
          memcpy(to->scale + (size_t)n * groups, from->scale + (size_t)i * groups, (size_t)groups * 4);
          memcpy(to->sums + (size_t)n * groups * 2, from->sums + (size_t)i * groups * 2, (size_t)groups * 8);
        }
        n++;
      }
  *rows = n;
}

// returns 0 to pause: every thread sees the same
static int experts_block(walker *w, const im_part *p, const im_layer *l, int layer, const int32_t *active, int count, int resumed) {
  im_engine *e = w->e;
  const int d_pad = e->w.d_pad;
  im_acts acts = acts_of(&e->shared, e->shared.normed, d_pad);
  if (!resumed) {
    ffn_norm(w, p, l, active, count, 1);
    linear_targets(e, (target[]){{&l->router, e->router, (size_t)im_pad(p->n_experts, 16)}}, 1, &acts, count, w->thread);
    meet(w);
    for (int i = w->thread; i < count; i += e->threads) route_row(e, p, i);
    meet(w);
  }
  if (w->thread == 0) e->need = missing_experts(e, p, l, layer, count, w->c);
  meet(w);
  if (e->need) return 0;
  lane *gathered = &e->own[e->threads];
  for (int x = 0; x < p->n_experts; x++) {
    int n;
    gather(w, p, x, count, &acts, gathered, &n);
    if (!n) continue;
    meet(w);
    lane *before = w->l;
    im_acts its = acts_of(gathered, gathered->normed, d_pad);
    lane hidden = *gathered;  // the hidden activations go behind the gathered ones
    hidden.q = gathered->attention ? (int8_t *)gathered->attention : hidden.q;
    hidden.scale = gathered->gate;
    hidden.sums = (int32_t *)gathered->delta;
    w->l = &hidden;
    gated_mlp(w, &l->experts[x].gate, &l->experts[x].up, &l->experts[x].down, &its, n, e->shared.delta);
    w->l = before;
    n = 0;
    for (int i = 0; i < count; i++)
      for (int r = 0; r < p->top_k; r++)
        if (e->chosen[(size_t)i * p->top_k + r] == x) {
          if (n % e->threads == w->thread) memcpy(e->kept + ((size_t)i * p->top_k + r) * d_pad, e->shared.delta + (size_t)n * d_pad, (size_t)d_pad * 4);
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

// ---- what rows give at the end
static void give_hidden(walker *w) {
  im_step_call *c = w->c;
  const im_part *p = c->parts[0];
  if (!w->single) meet(w);
  for (int i = 0, n = 0; i < c->n_rows; i++)
    if (c->rows[i].want & IM_WANT_HIDDEN) {
      if (n % w->e->threads == w->thread) memcpy(c->hidden_out + (size_t)n * p->d_model, w->l->x + (size_t)i * w->e->w.d_pad, (size_t)p->d_model * 4);
      n++;
    }
}

static void give_logits(walker *w) {
  im_engine *e = w->e;
  im_step_call *c = w->c;
  const im_part *p = c->parts[c->n_parts - 1];
  const int d_pad = e->w.d_pad, ldy = e->w.vocab_pad;
  int logits = 0, tokens = 0;
  if (!w->single && e->n_logit_rows) meet(w);
  for (int start = 0; start < e->n_logit_rows; start += HEAD_ROWS) {
    const int count = e->n_logit_rows - start < HEAD_ROWS ? e->n_logit_rows - start : HEAD_ROWS;
    const int32_t *rows = e->logit_rows + start;
    int from, to;
    own_rows(w, count, &from, &to);
    for (int i = from; i < to; i++) {
      e->k->rms_norm(w->l->x + (size_t)rows[i] * d_pad, p->final_norm, w->l->normed + (size_t)i * d_pad, p->d_model, p->norm_eps);
      if (is_quantized(&p->head)) quantize_row(e, w->l, 0, w->l->normed, i, d_pad);
    }
    if (!w->single) meet(w);
    im_acts acts = acts_of(w->l, w->l->normed, d_pad);
    linear_targets(e, (target[]){{&p->head, e->logits, (size_t)ldy}}, 1, &acts, count, w->thread);
    meet(w);
    for (int i = 0; i < count; i++) {
      const im_row *row = &c->rows[rows[i]];
      const float *y = e->logits + (size_t)i * ldy;
      const int mine = i % e->threads == w->thread;
      if (row->want & IM_WANT_LOGITS) {
        if (mine) memcpy(c->logits_out + (size_t)logits * p->vocab_size, y, (size_t)p->vocab_size * 4);
        logits++;
      }
      if (row->want & IM_WANT_SAMPLE) {
        if (mine) {
          float max;
          int best = e->k->argmax(y, p->vocab_size, &max);
          c->tokens_out[tokens] = im_sample(y, p->vocab_size, best, &c->samplings[row->sampling], (uint32_t)row->position, e->candidates[w->thread]);
        }
        tokens++;
      }
    }
    meet(w);
  }
}

static void start_rows(walker *w) {
  im_engine *e = w->e;
  im_step_call *c = w->c;
  const im_part *p = c->parts[0];
  int from, to;
  own_rows(w, c->n_rows, &from, &to);
  for (int i = from; i < to; i++) {
    const im_row *row = &c->rows[i];
    float *x = w->l->x + (size_t)i * e->w.d_pad;
    if (row->token >= 0) im_embed(&p->embedding, row->token, x);
    else {
      memcpy(x, c->hidden_in + (size_t)row->hidden * p->d_model, (size_t)p->d_model * 4);
      memset(x + p->d_model, 0, (size_t)(e->w.d_pad - p->d_model) * 4);
    }
    if (!w->single || w->thread == 0) im_rope(p->inv_freq, p->head_dim / 2, row->position, p->rope_scale, e->rope + (size_t)i * p->head_dim);
  }
  meet(w);
}

static void walk(void *argument, int thread) {
  im_engine *e = argument;
  im_step_call *c = e->call;
  walker w = {e, c, thread, c->n_rows == 1 && !e->w.max_experts, NULL};
  w.l = w.single ? &e->own[thread] : &e->shared;
  int resumed = e->resumed, s = e->segment, layer = e->layer, part;
  if (!resumed) start_rows(&w);
  for (; s < e->n_segments; s++, layer = -1) {
    const segment *g = &e->segments[s];
    const int32_t *active = e->active + g->first;
    if (layer < 0) layer = g->first_layer;
    for (; layer < g->last_layer && g->count; layer++) {
      const im_part *p = part_of(c, layer, &part);
      const im_layer *l = &p->layers[layer - p->start];
      if (!resumed) attention_block(&w, p, part, layer, active, g->count);
      if (l->experts) {
        if (!experts_block(&w, p, l, layer, active, g->count, resumed)) {
          if (thread == 0) { e->segment = s; e->layer = layer; }
          return;
        }
      } else {
        dense_block(&w, p, l, active, g->count);
      }
      resumed = 0;
    }
  }
  give_hidden(&w);
  give_logits(&w);
  if (thread == 0) e->layer = -2;
}

// ---- memory and bookkeeping of a call
static int max_int(int a, int b) { return a > b ? a : b; }

static void measure(im_engine *e, const im_step_call *c, int *context, size_t *logits) {
  widths w = {0};
  int far = 0;
  for (int i = 0; i < c->n_parts; i++) {
    const im_part *p = c->parts[i];
    w.d = p->d_model;
    w.d_pad = im_pad(p->d_model, 32);
    w.att_pad = im_pad(p->n_heads * p->head_dim, 32);
    w.q_rows = im_pad(p->n_heads * p->head_dim, 16);
    w.kv_rows = im_pad(p->n_kv_heads * p->head_dim, 16);
    w.qkv = w.q_rows + 2 * w.kv_rows;
    w.ff_pad = im_pad(max_int(p->d_ff, p->d_expert), 32);
    w.vocab_pad = im_pad(p->vocab_size, 16);
    w.max_experts = max_int(w.max_experts, p->n_experts);
    w.top_k = max_int(w.top_k, p->top_k);
  }
  w.widest = max_int(max_int(w.d_pad, w.att_pad), w.ff_pad);
  *logits = 0;
  for (int i = 0; i < c->n_rows; i++) {
    far = max_int(far, c->rows[i].position);
    *logits += (c->rows[i].want & (IM_WANT_LOGITS | IM_WANT_SAMPLE)) != 0;
  }
  *context = im_pad(far + 1, 16) + 16;
  e->w = w;
}

typedef struct { char *at; size_t used; } arena;
static void *carve(arena *a, size_t bytes) {
  void *p = a->at ? a->at + a->used : NULL;
  a->used += (bytes + 127) / 64 * 64;
  return p;
}

static void carve_lane(arena *a, lane *l, const widths *w, int rows) {
  l->x = carve(a, (size_t)rows * (size_t)w->d_pad * 4);
  l->normed = carve(a, (size_t)rows * (size_t)w->d_pad * 4);
  l->attention = carve(a, (size_t)rows * (size_t)w->widest * 4);
  l->gate = carve(a, (size_t)rows * (size_t)w->ff_pad * 4);
  l->delta = carve(a, (size_t)rows * (size_t)w->d_pad * 4);
  l->q = carve(a, (size_t)rows * (size_t)w->widest);
  l->low = carve(a, (size_t)rows * (size_t)w->d_pad);
  l->scale = carve(a, (size_t)rows * (size_t)(w->widest / 32) * 4);
  l->sums = carve(a, (size_t)rows * (size_t)(w->widest / 32) * 8);
}

static void carve_all(im_engine *e, arena *a, const im_step_call *c, int context, size_t logits) {
  const widths *w = &e->w;
  const size_t rows = (size_t)c->n_rows, head_rows = logits < HEAD_ROWS ? logits : HEAD_ROWS;
  carve_lane(a, &e->shared, w, c->n_rows > HEAD_ROWS ? c->n_rows : HEAD_ROWS);
  for (int t = 0; t < e->threads; t++) carve_lane(a, &e->own[t], w, 1);
  if (w->max_experts) carve_lane(a, &e->own[e->threads], w, c->n_rows * 1);
  e->qkv = carve(a, rows * (size_t)w->qkv * 4);
  e->up = carve(a, rows * (size_t)w->ff_pad * 4);
  for (int t = 0; t < e->threads; t++) {
    e->scores[t] = carve(a, (size_t)context * 16);
    e->candidates[t] = carve(a, head_rows ? (size_t)w->vocab_pad * sizeof(im_candidate) : 0);
  }
  e->logits = carve(a, head_rows * (size_t)w->vocab_pad * 4);
  e->rope = carve(a, rows * (size_t)c->parts[0]->head_dim * 4);
  e->router = carve(a, rows * (size_t)im_pad(w->max_experts, 16) * 4);
  e->chosen = carve(a, rows * (size_t)w->top_k * 4);
  e->weights = carve(a, rows * (size_t)w->top_k * 4);
  e->kept = carve(a, rows * (size_t)w->top_k * (size_t)w->d_pad * 4);
  e->logit_rows = carve(a, rows * 4);
  e->active = carve(a, (2 * rows + 1) * rows * 4);
  e->segments = carve(a, (2 * rows + 1) * sizeof(segment));
}

static int prepare(im_engine *e, im_step_call *c) {
  int context;
  size_t logits;
  measure(e, c, &context, &logits);
  arena a = {NULL, 0};
  carve_all(e, &a, c, context, logits);
  if (a.used > e->capacity) {
    free(e->memory);
    e->capacity = 0;
    e->memory = aligned_alloc(64, (a.used + a.used / 4 + 4095) / 4096 * 4096);
    if (!e->memory) return IM_NO_MEMORY;
    e->capacity = (a.used + a.used / 4 + 4095) / 4096 * 4096;
  }
  a = (arena){e->memory, 0};
  carve_all(e, &a, c, context, logits);
  // padding that no kernel writes must be zero where a linear map reads it
  const widths *w = &e->w;
  const int att = c->parts[0]->n_heads * c->parts[0]->head_dim;
  if (att < w->att_pad)
    for (int i = 0; i < c->n_rows; i++) memset(e->shared.attention + (size_t)i * w->att_pad + att, 0, (size_t)(w->att_pad - att) * 4);
  if (w->d_pad > im_pad(w->d, 16)) {
    memset(e->shared.normed, 0, (size_t)max_int(c->n_rows, HEAD_ROWS) * (size_t)w->d_pad * 4);
    for (int t = 0; t < e->threads; t++) memset(e->own[t].normed, 0, (size_t)w->d_pad * 4);
  }
  e->n_logit_rows = 0;
  const im_part *last = c->parts[c->n_parts - 1];
  for (int i = 0; i < c->n_rows; i++)
    if (c->rows[i].want & (IM_WANT_LOGITS | IM_WANT_SAMPLE)) {
      if (!last->has_head || c->rows[i].leave != last->end) return IM_BAD_ROW;
      e->logit_rows[e->n_logit_rows++] = i;
    }
  return IM_DONE;
}

static int ascending(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

static int plan_segments(im_engine *e, const im_step_call *c) {
  const int start = c->parts[0]->start, end = c->parts[c->n_parts - 1]->end;
  int32_t *bounds = (int32_t *)e->shared.delta, n = 0, first = 0;  // a buffer that is free until the first layer
  int same = 1;
  for (int i = 0; i < c->n_rows; i++) {
    const im_row *r = &c->rows[i];
    if (r->enter < start || r->leave > end || r->enter > r->leave || r->position < 0) return IM_BAD_ROW;
    if (r->token >= 0 ? (r->enter || !c->parts[0]->has_embedding || r->token >= c->parts[0]->vocab_size) : !c->hidden_in) return IM_BAD_ROW;
    same &= r->enter == c->rows[0].enter && r->leave == c->rows[0].leave;
  }
  e->n_segments = 0;
  if (same) {
    for (int i = 0; i < c->n_rows; i++) e->active[i] = i;
    e->segments[e->n_segments++] = (segment){c->rows[0].enter, c->rows[0].leave, 0, c->n_rows};
    return IM_DONE;
  }
  for (int i = 0; i < c->n_rows; i++) { bounds[n++] = c->rows[i].enter; bounds[n++] = c->rows[i].leave; }
  qsort(bounds, (size_t)n, sizeof *bounds, ascending);
  for (int b = 0; b + 1 < n; b++) {
    if (bounds[b] == bounds[b + 1]) continue;
    segment g = {bounds[b], bounds[b + 1], first, 0};
    for (int i = 0; i < c->n_rows; i++)
      if (c->rows[i].enter <= g.first_layer && c->rows[i].leave >= g.last_layer) e->active[g.first + g.count++] = i;
    if (g.count) e->segments[e->n_segments++] = g;
    first += g.count;
  }
  return IM_DONE;
}

static int go(im_engine *e) {
  im_pool_run(e->pool, walk, e);
  return e->layer == -2 ? IM_DONE : IM_NEED;
}

int im_step(im_engine *e, im_step_call *c) {
  if (c->n_rows < 1 || c->n_parts < 1) return IM_BAD_ROW;
  for (int i = 0; i + 1 < c->n_parts; i++)
    if (c->parts[i]->end != c->parts[i + 1]->start) return IM_BAD_ROW;
  int status = prepare(e, c);
  if (status == IM_DONE) status = plan_segments(e, c);
  if (status != IM_DONE) return status;
  e->call = c;
  e->resumed = 0;
  e->segment = 0;
  e->layer = -1;
  return go(e);
}

int im_step_resume(im_engine *e, im_step_call *c) {
  if (e->call != c || e->layer < 0) return IM_BAD_ROW;
  e->resumed = 1;
  return go(e);
}

im_engine *im_engine_new(int threads, const char *cpu) {
  const im_kernels *k = im_kernels_choose(cpu);
  if (!k || threads < 1) return NULL;
  im_engine *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  e->k = k;
  e->threads = threads;
  e->own = calloc((size_t)threads + 1, sizeof *e->own);
  e->scores = calloc((size_t)threads, sizeof *e->scores);
  e->candidates = calloc((size_t)threads, sizeof *e->candidates);
  e->pool = im_pool_new(threads);
  if (!e->own || !e->scores || !e->candidates || !e->pool) { im_engine_free(e); return NULL; }
  return e;
}

void im_engine_free(im_engine *e) {
  if (!e) return;
  im_pool_free(e->pool);
  free(e->memory);
  free(e->own);
  free(e->scores);
  free(e->candidates);
  free(e);
}

const char *im_engine_cpu(const im_engine *e) { return e->k->name; }
const char *im_cpu_best(void) { return im_kernels_choose(NULL)->name; }
int im_cpu_supported(const char *cpu) { return im_kernels_choose(cpu) != NULL; }

// ---- single operations
typedef struct { im_engine *e; const im_matrix *w; im_acts acts; int rows; float *y; } linear_call;
static void linear_work(void *argument, int thread) {
  linear_call *c = argument;
  linear_targets(c->e, (target[]){{c->w, c->y, (size_t)im_pad(c->w->rows, 16)}}, 1, &c->acts, c->rows, thread);
}

int im_linear(im_engine *e, const im_matrix *w, const float *x, int rows, int fine, float *y) {
  const int stride = im_pad(w->cols, 32);
  const size_t n = (size_t)rows * (size_t)stride;
  lane l = {0};
  l.q = malloc(n);
  l.low = malloc(n);
  l.scale = malloc(n / 32 * 4);
  l.sums = malloc(n / 32 * 8);
  int status = l.q && l.low && l.scale && l.sums ? IM_DONE : IM_NO_MEMORY;
  if (status == IM_DONE) {
    for (int i = 0; i < rows; i++) quantize_row(e, &l, fine, x, i, stride);
    linear_call c = {e, w, acts_of(&l, x, stride), rows, y};
    c.acts.low = fine ? l.low : NULL;
    im_pool_run(e->pool, linear_work, &c);
  }
  free(l.q);
  free(l.low);
  free(l.scale);
  free(l.sums);
  return status;
}

int32_t im_sample_one(const float *logits, int32_t n, const im_sampling *sampling, uint32_t position) {
  float max;
  im_candidate *scratch = malloc((size_t)n * sizeof *scratch);
  if (!scratch) return -1;
  int32_t best = im_kernels_choose(NULL)->argmax(logits, n, &max);
  int32_t token = im_sample(logits, n, best, sampling, position, scratch);
  free(scratch);
  return token;
}

typedef struct { im_engine *e; const uint64_t *data; size_t words; double sum; } read_call;
static void read_work(void *argument, int thread) {
  read_call *c = argument;
  const size_t from = c->words * (size_t)thread / (size_t)c->e->threads, to = c->words * (size_t)(thread + 1) / (size_t)c->e->threads;
  uint64_t s[8] = {0};
  for (size_t i = from; i + 8 <= to; i += 8)
    for (int j = 0; j < 8; j++) s[j] += c->data[i + (size_t)j];
  uint64_t sum = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
  meet(&(walker){c->e, NULL, thread, 0, NULL});
  if (thread == 0) c->sum += (double)sum;
}

double im_read_bandwidth(im_engine *e, const void *data, size_t bytes) {
  read_call c = {e, data, bytes / 8, 0};
  im_pool_run(e->pool, read_work, &c);
  return c.sum;
}
