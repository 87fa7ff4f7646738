// The 16 virtual lanes on AVX512 with VNNI: one register each.
#pragma once
#include <immintrin.h>

#define SIMD_NAME "avx512-vnni"
#define V_TILE 4     // 16-lane vectors of the value head that attention accumulates at once
#define K_TILE 4     // KV blocks that attention scores at once

typedef __m512 vf;
typedef __m512i vi;

static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vf_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void vf_store_half(uint16_t *p, vf x) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf vf_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
// lanes i with lo <= i < hi of x, fill elsewhere
static inline vf vf_keep(vf x, int lo, int hi, float fill) {
  __mmask16 m = (__mmask16)((hi >= 16 ? 0xffffu : (1u << hi) - 1u) & ~((1u << lo) - 1u));
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), m, x);
}
// x * 2^n for integral n; both stay in the range of normal numbers
static inline vf vf_scale2(vf x, vf n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
static inline float vf_sum(vf x) {  // tree: lanes i and i + 8, + 4, + 2, + 1
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
static inline float vf_maxall(vf x) { return _mm512_reduce_max_ps(x); }
static inline vf vf_from_vi(vi x) { return _mm512_cvtepi32_ps(x); }
static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_shl(vi a, int n) { return _mm512_slli_epi32(a, n); }
static inline int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
// rounds to the nearest even integer in -128..127 and stores the 16 bytes
static inline vi vf_store_int8(int8_t *p, vf x) {
  vi i = _mm512_cvtps_epi32(x);
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(i));
  return i;
}

// ---- integer dots of one weight block (16 rows) and `columns` of a group with `batch` rows of activations
#define LINE(p, j) _mm512_loadu_si512((const uint8_t *)(p) + 64 * (j))
#define SHR(x, n) _mm512_srli_epi16(x, n)
#define SHL(x, n) _mm512_slli_epi16(x, n)
#define PICK(mask, a, b) _mm512_ternarylogic_epi64(mask, a, b, 0xCA)  // a where mask, b elsewhere

static inline __attribute__((always_inline)) void unpack_bytes(const uint8_t *codes, vi v[8]) {
  for (int j = 0; j < 8; j++) v[j] = LINE(codes, j);
}
static inline __attribute__((always_inline)) void unpack_nibbles(const uint8_t *codes, vi v[8]) {
  const vi m = _mm512_set1_epi8(15);
  for (int j = 0; j < 4; j++) {
    vi t = LINE(codes, j);
    v[2 * j] = _mm512_and_si512(t, m);
    v[2 * j + 1] = _mm512_and_si512(SHR(t, 4), m);
  }
}
static inline __attribute__((always_inline)) void unpack_pairs(const uint8_t *p0, vi v[8]) {
  const vi m = _mm512_set1_epi8(3);
  for (int j = 0; j < 2; j++) {
    vi t = LINE(p0, j);
    v[4 * j] = _mm512_and_si512(t, m);
    v[4 * j + 1] = _mm512_and_si512(SHR(t, 2), m);
    v[4 * j + 2] = _mm512_and_si512(SHR(t, 4), m);
    v[4 * j + 3] = _mm512_and_si512(SHR(t, 6), m);
  }
}
static inline __attribute__((always_inline)) void unpack_nested4(const uint8_t *p0, const uint8_t *p1, vi v[8]) {
  const vi m3 = _mm512_set1_epi8(3), m15 = _mm512_set1_epi8(15);
  for (int j = 0; j < 2; j++) {
    vi t = LINE(p0, j), u = LINE(p1, j);
    v[4 * j] = _mm512_and_si512(PICK(m3, u, SHL(t, 2)), m15);
    v[4 * j + 1] = _mm512_and_si512(PICK(m3, SHR(u, 2), t), m15);
    v[4 * j + 2] = _mm512_and_si512(PICK(m3, SHR(u, 4), SHR(t, 2)), m15);
    v[4 * j + 3] = _mm512_and_si512(PICK(m3, SHR(u, 6), SHR(t, 4)), m15);
  }
}
static inline __attribute__((always_inline)) void unpack_nested8(const uint8_t *p0, const uint8_t *p1,
                                                                 const uint8_t *p2, vi v[8]) {
  const vi m15 = _mm512_set1_epi8(15);
  unpack_nested4(p0, p1, v);
  for (int j = 0; j < 4; j++) {
    vi t = LINE(p2, j);
    v[2 * j] = PICK(m15, t, SHL(v[2 * j], 4));
    v[2 * j + 1] = PICK(m15, SHR(t, 4), SHL(v[2 * j + 1], 4));
  }
}
#undef PICK
#undef SHL
#undef SHR
#undef LINE

typedef struct {
  vi v[8];
} codes_t;

static inline __attribute__((always_inline)) codes_t codes_load(const int format, const int many, const uint8_t *c,
                                                                const uint8_t *p1, const uint8_t *p2) {
  codes_t k;
  (void)many;
  if (format == IM_N2) unpack_pairs(c, k.v);
  else if (format == IM_N4) unpack_nested4(c, p1, k.v);
  else if (format == IM_N8) unpack_nested8(c, p1, p2, k.v);
  else if (format == IM_Q8 || format == IM_Q8X) unpack_bytes(c, k.v);
  else unpack_nibbles(c, k.v);
  return k;
}
// a[r] += dot of vecs [from, from + 4 or 8) with the activations x[r] of the group (int8, 4 a vec), r < n
static inline __attribute__((always_inline)) void codes_dots(const int format, const int many, const int n,
                                                             const codes_t *k, const int8_t *const x[],
                                                             const int from, const int count, vi a[]) {
  (void)format;
  if (many) {  // compilers do not put the broadcast into the instruction by themselves
#pragma GCC unroll 8
    for (int j = from; j < from + count; j++)
#pragma GCC unroll 4
      for (int r = 0; r < n; r++)
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(a[r]) : "v"(k->v[j]), "m"(((const int32_t *)x[r])[j]));
    return;
  }
  const int32_t *x4 = (const int32_t *)x[0];
  vi b = _mm512_setzero_si512();
  for (int j = from; j < from + count; j += 2) {
    a[0] = _mm512_dpbusd_epi32(a[0], k->v[j], _mm512_set1_epi32(x4[j]));
    b = _mm512_dpbusd_epi32(b, k->v[j + 1], _mm512_set1_epi32(x4[j + 1]));
  }
  a[0] = _mm512_add_epi32(a[0], b);
}
