// The kernels, written once on the 16 virtual lanes of a simd_*.h; each instruction set compiles this file.
//
// The order of every float operation is fixed: a dot over columns is one chain of FMAs per row, in column (or group)
// order; a sum over lanes is the tree of vf_sum; attention scores are one chain over the head's dimensions and the
// weighted sum of values one chain over positions. So a row's bits depend neither on the instruction set nor on what
// else is computed with it.
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

static const float EXP_LIMIT_LOW = -86.f, EXP_LIMIT_HIGH = 88.f;

INLINE vf vf_exp(vf x) {  // Cody-Waite reduction and a polynomial of degree 6: about 2 ulp
  x = vf_max(vf_min(x, vf_set1(EXP_LIMIT_HIGH)), vf_set1(EXP_LIMIT_LOW));
  vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
  vf r = vf_fma(n, vf_set1(-0.693359375f), x);
  r = vf_fma(n, vf_set1(2.12194440e-4f), r);
  vf p = vf_set1(1.3888889e-3f);
  p = vf_fma(p, r, vf_set1(8.3333333e-3f));
  p = vf_fma(p, r, vf_set1(4.1666668e-2f));
  p = vf_fma(p, r, vf_set1(1.6666667e-1f));
  p = vf_fma(p, r, vf_set1(0.5f));
  p = vf_fma(p, r, vf_set1(1.f));
  p = vf_fma(p, r, vf_set1(1.f));
  return vf_scale2(p, n);
}

INLINE vi vi_times254(vi x) { return vi_sub(vi_shl(x, 8), vi_shl(x, 1)); }

// The rest that 8 bits leave, in units of 1 / 254 of their step, makes 254 q + low; stored as 256 q + low.
INLINE vi store_fine(int8_t *q, int8_t *low, vf scaled, vi coarse) {
  const vf rest = vf_mul(vf_sub(scaled, vf_from_vi(coarse)), vf_set1(254.f));
  const vi all = vi_add(vi_times254(coarse), vf_store_int8(low, rest));
  const vi high = vf_store_int8(q, vf_mul(vf_add(vf_from_vi(all), vf_set1(0.5f)), vf_set1(0.00390625f)));
  vf_store_int8(low, vf_from_vi(vi_sub(all, vi_shl(high, 8))));
  return all;
}

static void quantize(const float *x, int n, int fine, uint8_t *to, size_t step) {
  for (int g = 0; g < n / 32; g++, to += step) {
    im_group *o = (im_group *)to;
    vf a = vf_load(x + 32 * g), b = vf_load(x + 32 * g + 16);
    const float m = vf_maxall(vf_max(vf_abs(a), vf_abs(b)));
    const int flat = !(m > 1e-30f);
    const vf k = vf_set1(flat ? 0.f : 127.f / m);
    a = vf_mul(a, k);
    b = vf_mul(b, k);
    vi ia = vf_store_int8(o->q, a), ib = vf_store_int8(o->q + 16, b);
    if (fine) {
      ia = store_fine(o->q, o->low, a, ia);
      ib = store_fine(o->q + 16, o->low + 16, b, ib);
    }
    const int32_t t0 = vi_sum(ia), t1 = vi_sum(ib), t = t0 + t1;
    o->scale = flat ? 0.f : fine ? m / 32258.f : m / 127.f;  // 32258 = 254 * 127
    o->shift = o->scale * (float)t;
    o->halves[0] = -128 * t0;
    o->halves[1] = -128 * t1;
    o->eight = -128 * t;
    o->four = -8 * t;
    o->two = -13 * t;
    o->nested8 = -271 * t;
  }
}

enum { ROWS_AT_ONCE = 4 };  // of a panel: their sums, all waiting for themselves, hide each other's latency

// a[r] += the dot of `count` vecs with the group of row r < n, 16 bits of it when `fine`
INLINE void group_dots(const int format, const int fine, const int many, const int n, const codes_t *k,
                       const im_group *const x[], const int from, const int count, vi a[]) {
  const int8_t *q[ROWS_AT_ONCE];
  vi high[ROWS_AT_ONCE];
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) {
    q[r] = fine ? x[r]->low : x[r]->q;
    high[r] = vi_set1(0);
  }
  codes_dots(format, many, n, k, q, from, count, a);
  if (!fine) return;
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) q[r] = x[r]->q;
  codes_dots(format, many, n, k, q, from, count, high);
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) a[r] = vi_add(vi_shl(high[r], 8), a[r]);
}

// acc[r] += a group's weights times the activations of row r < n; s, s1 and mn are the weights' scales and minima
INLINE void group_add(const int format, const int fine, const int many, const int n, const codes_t *k,
                      const uint8_t *panel, vf s, vf s1, vf mn, vf acc[]) {
  const im_group *x[ROWS_AT_ONCE];
  vi a[ROWS_AT_ONCE];
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) {
    x[r] = (const im_group *)(panel + r * im_group_bytes(fine));
    a[r] = vi_set1(format == IM_Q8X                       ? x[r]->halves[0]
                   : format == IM_Q8                      ? x[r]->eight
                   : format == IM_Q4 || format == IM_N4   ? x[r]->four
                                                          : 0);
  }
  group_dots(format, fine, many, n, k, x, 0, format == IM_Q8X ? 4 : 8, a);
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) {
    if (format == IM_N2) a[r] = vi_add(vi_shl(a[r], 3), vi_set1(x[r]->two));      // 8 (q - 1.625) = 8 q - 13
    if (format == IM_N8) a[r] = vi_add(vi_shl(a[r], 1), vi_set1(x[r]->nested8));  // 2 (q - 135.5) = 2 q - 271
    acc[r] = vf_fma(vf_from_vi(a[r]), vf_mul(vf_set1(x[r]->scale), s), acc[r]);
    if (format == IM_Q4M || format == IM_Q4X) acc[r] = vf_fma(vf_set1(x[r]->shift), mn, acc[r]);
    if (format == IM_Q8X) a[r] = vi_set1(x[r]->halves[1]);
  }
  if (format != IM_Q8X) return;
  group_dots(format, fine, many, n, k, x, 4, 4, a);
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) acc[r] = vf_fma(vf_from_vi(a[r]), vf_mul(vf_set1(x[r]->scale), s1), acc[r]);
}

// y[m][16 b ..] for the `rows` rows of a panel and one weight block in a quantized format; constants where it is
// inlined are format, fine, and many: whether the codes are unpacked once for several rows, whose sums stay in memory
INLINE void block_quantized(const int format, const int fine, const int many, const im_matrix *w, const uint8_t *panel,
                            size_t step, int groups, int rows, float *y, size_t ldy, int b) {
  const int line = format == IM_Q8 || format == IM_Q8X                     ? 512
                   : format == IM_N2 || format == IM_N4 || format == IM_N8 ? 128
                                                                           : 256;
  const uint8_t *c = (const uint8_t *)w->codes + (size_t)b * groups * line;
  const uint8_t *p1 = (const uint8_t *)w->p1 + (size_t)b * groups * 128,
                *p2 = (const uint8_t *)w->p2 + (size_t)b * groups * 256;
  const uint16_t *sh = (const uint16_t *)w->scales + (size_t)b * groups * 16,
                 *mh = (const uint16_t *)w->mins + (size_t)b * groups * 16;
  const float *sf = (const float *)w->scales + (size_t)b * groups * (format == IM_Q8X ? 32 : 16);
  const float *mf = (const float *)w->mins + (size_t)b * groups * 16;
  vf one = vf_zero(), acc[IM_PANEL];
  if (many)
    for (int m = 0; m < rows; m++) acc[m] = one;
  for (int g = 0; g < groups; g++, panel += step) {
    const codes_t k = codes_load(format, many, c, p1, p2);
    c += line;
    if (format == IM_N4 || format == IM_N8) p1 += 128;
    if (format == IM_N8) p2 += 256;
    for (int i = 0; i < line && i < 256; i += 64) __builtin_prefetch(c + 1536 - 64 + i);
    if (format == IM_N4 || format == IM_N8) {
      __builtin_prefetch(p1 + 1536);
      __builtin_prefetch(p1 + 1600);
    }
    const vf s = format == IM_Q4X   ? vf_load(sf + 16 * g)
                 : format == IM_Q8X ? vf_load(sf + 32 * g)
                                    : vf_load_half(sh + 16 * g);
    const vf s1 = format == IM_Q8X ? vf_load(sf + 32 * g + 16) : s;
    const vf mn = format == IM_Q4X ? vf_load(mf + 16 * g) : format == IM_Q4M ? vf_load_half(mh + 16 * g) : s;
    if (!many) {
      group_add(format, fine, 0, 1, &k, panel, s, s1, mn, &one);
      continue;
    }
    const uint8_t *x = panel;
    int m = 0;
    for (; m + 4 <= rows; m += 4, x += 4 * im_group_bytes(fine))
      group_add(format, fine, 1, 4, &k, x, s, s1, mn, acc + m);
    if (rows - m == 3) group_add(format, fine, 1, 3, &k, x, s, s1, mn, acc + m);
    else if (rows - m == 2) group_add(format, fine, 1, 2, &k, x, s, s1, mn, acc + m);
    else if (rows - m == 1) group_add(format, fine, 1, 1, &k, x, s, s1, mn, acc + m);
  }
  const float unit = format == IM_N2 ? 0.125f : format == IM_N8 ? 0.03125f : 1.f;
  if (!many) acc[0] = one;
  for (int m = 0; m < (many ? rows : 1); m++)
    vf_store(y + (size_t)m * ldy + 16 * b, unit == 1.f ? acc[m] : vf_mul(acc[m], vf_set1(unit)));
}

// the same in a float format: four chains (column mod 4), then (0 + 2) + (1 + 3)
INLINE void block_float(const int format, const int batch, const im_matrix *w, const im_acts *acts, int m0, float *y,
                        size_t ldy, int b) {
  const int columns = acts->stride;
  const float *wf = (const float *)w->codes + (size_t)b * columns * 16;
  const uint16_t *wh = (const uint16_t *)w->codes + (size_t)b * columns * 16;
  const float *x = acts->x + (size_t)m0 * columns;
  vf acc[2][4];
#pragma GCC unroll 2
  for (int m = 0; m < batch; m++)
    for (int i = 0; i < 4; i++) acc[m][i] = vf_zero();
  for (int k = 0; k < columns; k += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const size_t at = (size_t)(k + i) * 16;
      vf v = format == IM_F32 ? vf_load(wf + at) : format == IM_F16 ? vf_load_half(wh + at) : vf_load_bf16(wh + at);
#pragma GCC unroll 2
      for (int m = 0; m < batch; m++) acc[m][i] = vf_fma(v, vf_set1(x[(size_t)m * columns + k + i]), acc[m][i]);
    }
#pragma GCC unroll 2
  for (int m = 0; m < batch; m++)
    vf_store(y + (size_t)(m0 + m) * ldy + 16 * b, vf_add(vf_add(acc[m][0], acc[m][2]), vf_add(acc[m][1], acc[m][3])));
}

#define ROWS_FLOAT(format, batch) \
  for (; m + batch <= rows; m += batch) block_float(format, batch, w, acts, m, y, ldy, b)

INLINE void linear_quantized(const int format, const int fine, const im_matrix *w, const im_acts *acts, int rows,
                             float *y, size_t ldy, int b0, int b1) {
  const int groups = acts->stride / 32;
  if (rows == 1) {
    for (int b = b0; b < b1; b++)
      block_quantized(format, fine, 0, w, acts->panels, im_group_bytes(fine), groups, 1, y, ldy, b);
    return;
  }
  for (int b = b0; b < b1; b++)
    for (int m = 0; m < rows; m += IM_PANEL) {
      size_t step;
      const uint8_t *panel = acts->panels + im_panel_at(m, rows, acts->stride, fine, &step);
      block_quantized(format, fine, 1, w, panel, step, groups, im_panel_rows(rows - m), y + (size_t)m * ldy, ldy, b);
    }
}
#define DEFINE_QUANTIZED(name, format)                                                                        \
  static void name(const im_matrix *w, const im_acts *acts, int rows, float *y, size_t ldy, int b0, int b1) { \
    if (acts->fine) linear_quantized(format, 1, w, acts, rows, y, ldy, b0, b1);                               \
    else linear_quantized(format, 0, w, acts, rows, y, ldy, b0, b1);                                          \
  }
#define DEFINE_FLOAT(name, format)                                                                            \
  static void name(const im_matrix *w, const im_acts *acts, int rows, float *y, size_t ldy, int b0, int b1) { \
    for (int b = b0; b < b1; b++) {                                                                           \
      int m = 0;                                                                                              \
      ROWS_FLOAT(format, 2);                                                                                  \
      ROWS_FLOAT(format, 1);                                                                                  \
    }                                                                                                         \
  }
DEFINE_FLOAT(linear_f32, IM_F32)
DEFINE_FLOAT(linear_f16, IM_F16)
DEFINE_FLOAT(linear_bf16, IM_BF16)
DEFINE_QUANTIZED(linear_q8, IM_Q8)
DEFINE_QUANTIZED(linear_q8x, IM_Q8X)
DEFINE_QUANTIZED(linear_q4, IM_Q4)
DEFINE_QUANTIZED(linear_q4m, IM_Q4M)
DEFINE_QUANTIZED(linear_q4x, IM_Q4X)
DEFINE_QUANTIZED(linear_n2, IM_N2)
DEFINE_QUANTIZED(linear_n4, IM_N4)
DEFINE_QUANTIZED(linear_n8, IM_N8)

static void linear(const im_matrix *w, const im_acts *acts, int rows, float *y, size_t ldy, int b0, int b1) {
  static void (*const by_format[])(const im_matrix *, const im_acts *, int, float *, size_t, int, int) = {
      linear_f32, linear_f16, linear_bf16, linear_q8, linear_q8x, linear_q4,
      linear_q4m, linear_q4x, linear_n2,   linear_n4, linear_n8};
  by_format[w->format](w, acts, rows, y, ldy, b0, b1);
}

static void rms_norm(const float *x, const float *w, float *out, int n, float eps) {
  vf s = vf_zero();
  for (int i = 0; i < n; i += 16) {
    vf a = vf_load(x + i);
    s = vf_fma(a, a, s);
  }
  vf r = vf_set1(1.f / sqrtf(vf_sum(s) / (float)n + eps));
  for (int i = 0; i < n; i += 16) vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), r), vf_load(w + i)));
}

static void layer_norm(const float *x, const float *w, const float *b, float *out, int n, float eps) {
  vf s = vf_zero(), q = vf_zero();
  for (int i = 0; i < n; i += 16) s = vf_add(s, vf_load(x + i));
  const vf mean = vf_set1(vf_sum(s) / (float)n);
  for (int i = 0; i < n; i += 16) {
    vf a = vf_sub(vf_load(x + i), mean);
    if (n - i < 16) a = vf_keep(a, 0, n - i, 0.f);
    q = vf_fma(a, a, q);
  }
  const vf r = vf_set1(1.f / sqrtf(vf_sum(q) / (float)n + eps));
  for (int i = 0; i < n; i += 16) {
    const vf a = vf_mul(vf_mul(vf_sub(vf_load(x + i), mean), r), vf_load(w + i));
    vf_store(out + i, vf_add(a, vf_load(b + i)));
  }
}

static void silu_mul(const float *gate, const float *up, float *out, int n) {
  for (int i = 0; i < n; i += 16) {
    vf g = vf_load(gate + i), e = vf_exp(vf_sub(vf_zero(), g));
    vf_store(out + i, vf_mul(vf_div(g, vf_add(e, vf_set1(1.f))), vf_load(up + i)));
  }
}

static void swiglu_mul(const float *gate, const float *up, float *out, int n, float alpha, float limit) {
  const vf high = vf_set1(limit), low = vf_set1(-limit), one = vf_set1(1.f), a = vf_set1(-alpha);
  for (int i = 0; i < n; i += 16) {
    const vf g = vf_min(vf_load(gate + i), high), u = vf_max(vf_min(vf_load(up + i), high), low);
    vf_store(out + i, vf_mul(vf_div(g, vf_add(vf_exp(vf_mul(g, a)), one)), vf_add(u, one)));
  }
}

static void add(float *x, const float *y, int n) {
  for (int i = 0; i < n; i += 16) vf_store(x + i, vf_add(vf_load(x + i), vf_load(y + i)));
}

static void store_half(uint16_t *out, const float *x, int n) {
  for (int i = 0; i < n; i += 16) vf_store_half(out + i, vf_load(x + i));
}

static int argmax(const float *x, int n, float *max) {
  float best = -INFINITY;
  int chunk = 0;
  for (int i = 0; i < n; i += 256) {  // the first chunk that holds the maximum, then the first place in it
    vf m = vf_set1(-INFINITY);
    int j = i, end = i + 256 < n ? i + 256 : n;
    for (; j + 16 <= end; j += 16) m = vf_max(m, vf_load(x + j));
    float c = vf_maxall(m);
    for (; j < end; j++) c = x[j] > c ? x[j] : c;
    if (c > best) {
      best = c;
      chunk = i;
    }
  }
  *max = best;
  for (int j = chunk; j < n; j++)
    if (x[j] == best) return j;
  return 0;
}

// Each lane adds its places in ascending order, then the tree of vf_sum.
static float confidence(const float *x, int n, float max) {
  const vf m = vf_set1(max);
  vf sum = vf_zero();
  for (int i = 0; i < n; i += 16) {
    const vf e = vf_exp(vf_sub(vf_load(x + i), m));
    sum = vf_add(sum, n - i < 16 ? vf_keep(e, 0, n - i, 0.f) : e);
  }
  return 1.f / vf_sum(sum);
}

// ---- attention. A block of a KV head is K [head_dim][16 positions], then V [16 positions][head_dim].
INLINE const uint8_t *kv_block(const im_kv_view *kv, int index) {
  return kv->base + (size_t)kv->blocks[index] * kv->block_bytes;
}
INLINE vf kv_load(const int f32, const uint8_t *base, size_t element) {
  return f32 ? vf_load((const float *)base + element) : vf_load_half((const uint16_t *)base + element);
}

// scores of `tile` blocks from block `index` for `heads` query heads
INLINE void score_blocks(const int f32, const int heads, const int tile, const im_kv_view *kv, const float *q,
                         int index, float *scores, size_t lds) {
  vf acc[4][8];
  const uint8_t *k[8];
#pragma GCC unroll 8
  for (int b = 0; b < tile; b++) {
    k[b] = kv_block(kv, index + b);
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) acc[h][b] = vf_zero();
  }
  for (int d = 0; d < kv->head_dim; d++) {
    vf x[4];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) x[h] = vf_set1(q[(size_t)h * kv->head_dim + d]);
#pragma GCC unroll 8
    for (int b = 0; b < tile; b++) {
      vf v = kv_load(f32, k[b], (size_t)d * 16);
#pragma GCC unroll 4
      for (int h = 0; h < heads; h++) acc[h][b] = vf_fma(v, x[h], acc[h][b]);
    }
  }
  const vf s = vf_set1(kv->scale);
#pragma GCC unroll 8
  for (int b = 0; b < tile; b++)
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) vf_store(scores + h * lds + 16 * b, vf_mul(acc[h][b], s));
}

// out[h][16 d0 ..] = weighted sum of `tile` vectors of the values at positions first..last
INLINE void mix_values(const int f32, const int heads, const int tile, const im_kv_view *kv, const float *scores,
                       size_t lds, int first, int last, int d0, const float *norm, float *out) {
  vf acc[4][8];
#pragma GCC unroll 4
  for (int h = 0; h < heads; h++)
#pragma GCC unroll 8
    for (int i = 0; i < tile; i++) acc[h][i] = vf_zero();
  const int origin = first & ~15;
  for (int p = first; p <= last;) {
    const uint8_t *v = kv_block(kv, p / 16);
    const int end = (p | 15) < last ? (p | 15) : last;
    for (; p <= end; p++) {
      const size_t at = (size_t)(16 + p % 16) * kv->head_dim + d0;
      vf value[8];
#pragma GCC unroll 8
      for (int i = 0; i < tile; i++) value[i] = kv_load(f32, v, at + 16 * i);
#pragma GCC unroll 4
      for (int h = 0; h < heads; h++) {
        vf w = vf_set1(scores[h * lds + p - origin]);
#pragma GCC unroll 8
        for (int i = 0; i < tile; i++) acc[h][i] = vf_fma(value[i], w, acc[h][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < heads; h++)
#pragma GCC unroll 8
    for (int i = 0; i < tile; i++)
      vf_store(out + (size_t)h * kv->head_dim + d0 + 16 * i, vf_mul(acc[h][i], vf_set1(norm[h])));
}

INLINE void attend_heads(const int f32, const int heads, const im_kv_view *kv, const float *q, const float *sink_q,
                         const float *sink_logits, int first, int last, float *scores, float *out) {
  const int tile = heads == 1 ? (2 * K_TILE > 8 ? 8 : 2 * K_TILE) : heads < 4 ? K_TILE : (K_TILE + 1) / 2;
  const int b0 = first / 16, b1 = last / 16 + 1;
  const size_t lds = (size_t)(b1 - b0) * 16;
  float norm[4];
  int b = b0;
  for (; b < kv->sinks; b++) score_blocks(f32, heads, 1, kv, sink_q, b, scores + 16 * (b - b0), lds);
  for (; b + tile <= b1; b += tile) score_blocks(f32, heads, tile, kv, q, b, scores + 16 * (b - b0), lds);
  for (; b < b1; b++) score_blocks(f32, heads, 1, kv, q, b, scores + 16 * (b - b0), lds);
  for (int h = 0; h < heads; h++) {
    float *s = scores + h * lds;
    vf m = vf_set1(-INFINITY), sum = vf_zero();
    for (int i = b0; i < b1; i++) {
      const int lo = i == b0 ? first % 16 : 0, hi = i == b1 - 1 ? last % 16 + 1 : 16;
      vf x = vf_load(s + 16 * (i - b0));
      if (lo > 0 || hi < 16) vf_store(s + 16 * (i - b0), x = vf_keep(x, lo, hi, -INFINITY));
      m = vf_max(x, m);
    }
    m = vf_set1(vf_maxall(m));
    if (sink_logits) m = vf_max(m, vf_set1(sink_logits[h]));
    for (int i = b0; i < b1; i++) {
      const int lo = i == b0 ? first % 16 : 0, hi = i == b1 - 1 ? last % 16 + 1 : 16;
      vf e = vf_exp(vf_sub(vf_load(s + 16 * (i - b0)), m));
      if (lo > 0 || hi < 16) e = vf_keep(e, lo, hi, 0.f);
      sum = vf_add(sum, e);
      vf_store(s + 16 * (i - b0), e);
    }
    norm[h] = 1.f / (sink_logits ? vf_sum(sum) + im_exp(sink_logits[h] - vf_maxall(m)) : vf_sum(sum));
  }
  int d = 0;
  for (; d + 16 * V_TILE <= kv->head_dim; d += 16 * V_TILE)
    mix_values(f32, heads, V_TILE, kv, scores, lds, first, last, d, norm, out);
  for (; d < kv->head_dim; d += 16) mix_values(f32, heads, 1, kv, scores, lds, first, last, d, norm, out);
}

// q and out [heads][head_dim], scores: room for 4 times the positions seen, rounded up to blocks
static void attend(const im_kv_view *kv, const float *q, int heads, int first, int last, float *scores, float *out) {
  for (int h = 0; h < heads;) {
    const int n = heads - h < 4 ? heads - h : heads - h == 5 ? 3 : 4;
    const float *qh = q + (size_t)h * kv->head_dim;
    const float *sh = kv->sinks ? kv->sink_q + (size_t)h * kv->head_dim : NULL;
    const float *lh = kv->sink_logits ? kv->sink_logits + h : NULL;
    float *oh = out + (size_t)h * kv->head_dim;
#define CASE(f32, n)                                             \
  attend_heads(f32, n, kv, qh, sh, lh, first, last, scores, oh); \
  break
    switch (kv->f32 * 4 + n - 1) {
      case 0: CASE(0, 1);
      case 1: CASE(0, 2);
      case 2: CASE(0, 3);
      case 3: CASE(0, 4);
      case 4: CASE(1, 1);
      case 5: CASE(1, 2);
      case 6: CASE(1, 3);
      default: CASE(1, 4);
    }
#undef CASE
    h += n;
  }
}

#define KERNELS(symbol, simd_name)                                                            \
  const im_kernels symbol = {simd_name,  quantize, linear, rms_norm,   layer_norm, silu_mul, \
                             swiglu_mul, add,      attend, store_half, argmax,     confidence}
