// The 16 virtual lanes in plain C: the reference for every other instruction set, and what any CPU can run.
#pragma once
#include <math.h>
#include <string.h>

#define SIMD_NAME "plain"
#define V_TILE 1
#define K_TILE 1

typedef struct {
  float v[16];
} vf;
typedef struct {
  int32_t v[16];
} vi;
#define EACH for (int i = 0; i < 16; i++)

// a * b + c rounded once. Without hardware, by rounding the exact sum to odd in double first (Boldo, Melquiond 2008).
static inline float fma32(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  double p = (double)a * b, s = p + c, t = s - p, e = (p - (s - t)) + ((double)c - t);
  if (e > 0 || e < 0) {
    uint64_t u;
    memcpy(&u, &s, 8);
    if (!(u & 1)) u += (e > 0) == (s > 0) ? 1 : -(uint64_t)1;
    memcpy(&s, &u, 8);
  }
  return (float)s;
#endif
}
static inline vf vf_set1(float x) {
  vf r;
  EACH r.v[i] = x;
  return r;
}
static inline vf vf_zero(void) { return vf_set1(0.f); }
static inline vf vf_load(const float *p) {
  vf r;
  memcpy(r.v, p, 64);
  return r;
}
static inline void vf_store(float *p, vf x) { memcpy(p, x.v, 64); }
static inline vf vf_add(vf a, vf b) {
  EACH a.v[i] += b.v[i];
  return a;
}
static inline vf vf_sub(vf a, vf b) {
  EACH a.v[i] -= b.v[i];
  return a;
}
static inline vf vf_mul(vf a, vf b) {
  EACH a.v[i] *= b.v[i];
  return a;
}
static inline vf vf_div(vf a, vf b) {
  EACH a.v[i] /= b.v[i];
  return a;
}
static inline vf vf_max(vf a, vf b) {
  EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline vf vf_min(vf a, vf b) {
  EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline vf vf_fma(vf a, vf b, vf c) {
  EACH a.v[i] = fma32(a.v[i], b.v[i], c.v[i]);
  return a;
}
static inline vf vf_abs(vf a) {
  EACH a.v[i] = fabsf(a.v[i]);
  return a;
}
static inline vf vf_round(vf a) {
  EACH a.v[i] = rintf(a.v[i]);
  return a;
}
static inline vf vf_load_half(const uint16_t *p) {
  vf r;
  EACH r.v[i] = im_half_to_float(p[i]);
  return r;
}
static inline void vf_store_half(uint16_t *p, vf x) { EACH p[i] = im_float_to_half(x.v[i]); }
static inline vf vf_load_bf16(const uint16_t *p) {
  vf r;
  EACH {
    uint32_t u = (uint32_t)p[i] << 16;
    memcpy(&r.v[i], &u, 4);
  }
  return r;
}
static inline vf vf_keep(vf x, int lo, int hi, float fill) {
  EACH if (i < lo || i >= hi) x.v[i] = fill;
  return x;
}
static inline vf vf_scale2(vf x, vf n) {
  EACH {
    uint32_t u;
    memcpy(&u, &x.v[i], 4);
    u += (uint32_t)(int32_t)n.v[i] << 23;
    memcpy(&x.v[i], &u, 4);
  }
  return x;
}
static inline float vf_sum(vf x) {
  for (int h = 8; h; h /= 2)
    for (int i = 0; i < h; i++) x.v[i] += x.v[i + h];
  return x.v[0];
}
static inline float vf_maxall(vf x) {
  float m = x.v[0];
  for (int i = 1; i < 16; i++) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
static inline vf vf_from_vi(vi x) {
  vf r;
  EACH r.v[i] = (float)x.v[i];
  return r;
}
static inline vi vi_set1(int32_t x) {
  vi r;
  EACH r.v[i] = x;
  return r;
}
static inline vi vi_add(vi a, vi b) {
  EACH a.v[i] += b.v[i];
  return a;
}
static inline vi vi_sub(vi a, vi b) {
  EACH a.v[i] -= b.v[i];
  return a;
}
static inline vi vi_shl(vi a, int n) {
  EACH a.v[i] = (int32_t)((uint32_t)a.v[i] << n);
  return a;
}
static inline int32_t vi_sum(vi a) {
  int32_t s = 0;
  EACH s += a.v[i];
  return s;
}
static inline vi vf_store_int8(int8_t *p, vf x) {
  vi r;
  EACH {
    r.v[i] = (int32_t)rintf(x.v[i]);
    p[i] = (int8_t)r.v[i];
  }
  return r;
}

typedef struct {
  uint8_t v[8][64];
} codes_t;

static inline codes_t codes_load(const int format, const int many, const uint8_t *c, const uint8_t *p1,
                                 const uint8_t *p2) {
  codes_t k;
  (void)many;
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 64; i++) {
      int base = (c[64 * (j / 4) + i] >> (2 * (j % 4))) & 3, q;  // the 2-bit plane's code, where there is one
      if (format == IM_Q8 || format == IM_Q8X) q = c[64 * j + i];
      else if (format == IM_N2) q = base;
      else if (format == IM_N4) q = base << 2 | ((p1[64 * (j / 4) + i] >> (2 * (j % 4))) & 3);
      else if (format == IM_N8)
        q = base << 6 | ((p1[64 * (j / 4) + i] >> (2 * (j % 4))) & 3) << 4 |
            ((p2[64 * (j / 2) + i] >> (4 * (j % 2))) & 15);
      else q = (c[64 * (j / 2) + i] >> (4 * (j % 2))) & 15;
      k.v[j][i] = (uint8_t)q;
    }
  return k;
}
static inline vi codes_dot(const int format, const int many, const codes_t *k, const int8_t *x, const int from,
                           const int count, vi init) {
  (void)format;
  (void)many;
  for (int j = from; j < from + count; j++)
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 4; c++) init.v[r] += k->v[j][4 * r + c] * x[4 * j + c];
  return init;
}
static inline __attribute__((always_inline)) void codes_dots(const int format, const int many, const int n,
                                                             const codes_t *k, const int8_t *const x[],
                                                             const int from, const int count, vi a[]) {
  for (int r = 0; r < n; r++) a[r] = codes_dot(format, many, k, x[r], from, count, a[r]);
}
#undef EACH
