// The 16 virtual lanes on AVX2 with FMA and F16C: two registers each. Codes of up to 4 bits are summed in 16 bits
// (8 products of at most 2 * 15 * 128 fit); 8-bit codes are split into nibbles, so that nothing saturates.
#pragma once
#include <immintrin.h>

#define SIMD_NAME "avx2"
#define V_TILE 1
#define K_TILE 1

typedef struct {
  __m256 a, b;
} vf;
typedef struct {
  __m256i a, b;
} vi;

static inline vf vf_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf vf_set1(float x) {
  __m256 v = _mm256_set1_ps(x);
  return (vf){v, v};
}
static inline vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void vf_store(float *p, vf x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline vf vf_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline vf vf_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline vf vf_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline vf vf_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline vf vf_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline vf vf_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline vf vf_fma(vf x, vf y, vf z) {
  return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline vf vf_abs(vf x) {
  __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return (vf){_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
static inline vf vf_round(vf x) { return (vf){_mm256_round_ps(x.a, NEAREST), _mm256_round_ps(x.b, NEAREST)}; }
static inline vf vf_load_half(const uint16_t *p) {
  return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
              _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
static inline void vf_store_half(uint16_t *p, vf x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, NEAREST));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, NEAREST));
}
#undef NEAREST
static inline vf vf_load_bf16(const uint16_t *p) {
  __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
  return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
static inline vf vf_keep(vf x, int lo, int hi, float fill) {
  const __m256i ia = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), ib = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i l = _mm256_set1_epi32(lo - 1), h = _mm256_set1_epi32(hi);
  const __m256 f = _mm256_set1_ps(fill);
  __m256i ma = _mm256_and_si256(_mm256_cmpgt_epi32(ia, l), _mm256_cmpgt_epi32(h, ia));
  __m256i mb = _mm256_and_si256(_mm256_cmpgt_epi32(ib, l), _mm256_cmpgt_epi32(h, ib));
  return (vf){_mm256_blendv_ps(f, x.a, _mm256_castsi256_ps(ma)), _mm256_blendv_ps(f, x.b, _mm256_castsi256_ps(mb))};
}
static inline vf vf_scale2(vf x, vf n) {
  __m256i a = _mm256_slli_epi32(_mm256_cvtps_epi32(n.a), 23), b = _mm256_slli_epi32(_mm256_cvtps_epi32(n.b), 23);
  return (vf){_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.a), a)),
              _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.b), b))};
}
static inline float vf_sum(vf x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
static inline float vf_maxall(vf x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
static inline vf vf_from_vi(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline vi vi_set1(int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return (vi){v, v};
}
static inline vi vi_add(vi x, vi y) { return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline vi vi_sub(vi x, vi y) { return (vi){_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline vi vi_shl(vi x, int n) { return (vi){_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
static inline int32_t vi_sum(vi x) {
  __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
static inline vi vf_store_int8(int8_t *p, vf x) {
  vi i = {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
  __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(i.a, i.b), 0xd8);
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
  return i;
}

// ---- integer dots: for one row the codes stay packed until a half (8 rows) of a vec is needed, for many they are
// unpacked once, 8-bit codes into nibbles
typedef struct {
  const uint8_t *c, *p1, *p2;
  __m256i low[8][2], high[8][2];
} codes_t;

#define WIDE(format) ((format) == IM_Q8 || (format) == IM_Q8X || (format) == IM_N8)
#define HALF(p, j, h) _mm256_loadu_si256((const __m256i *)((p) + 64 * (j) + 32 * (h)))
// the low 4 (or 2) bits of vec j, rows 8 h .. 8 h + 7, and with `high` the upper nibble of an 8-bit code
static inline __attribute__((always_inline)) __m256i vec_low(const int format, const codes_t *k, const int j,
                                                             const int h) {
  const __m256i m3 = _mm256_set1_epi8(3), m15 = _mm256_set1_epi8(15);
  if (format == IM_Q8 || format == IM_Q8X) return _mm256_and_si256(HALF(k->c, j, h), m15);
  if (format == IM_N2) return _mm256_and_si256(_mm256_srli_epi16(HALF(k->c, j / 4, h), 2 * (j % 4)), m3);
  if (format == IM_N8) return _mm256_and_si256(_mm256_srli_epi16(HALF(k->p2, j / 2, h), 4 * (j % 2)), m15);
  if (format == IM_N4) {
    __m256i t = _mm256_and_si256(_mm256_srli_epi16(HALF(k->c, j / 4, h), 2 * (j % 4)), m3);
    __m256i u = _mm256_and_si256(_mm256_srli_epi16(HALF(k->p1, j / 4, h), 2 * (j % 4)), m3);
    return _mm256_or_si256(_mm256_slli_epi16(t, 2), u);
  }
  return _mm256_and_si256(_mm256_srli_epi16(HALF(k->c, j / 2, h), 4 * (j % 2)), m15);
}
static inline __attribute__((always_inline)) __m256i vec_high(const int format, const codes_t *k, const int j,
                                                              const int h) {
  if (format == IM_N8) return vec_low(IM_N4, k, j, h);
  return _mm256_and_si256(_mm256_srli_epi16(HALF(k->c, j, h), 4), _mm256_set1_epi8(15));
}
#undef HALF
static inline __attribute__((always_inline)) codes_t codes_load(const int format, const int many, const uint8_t *c,
                                                                const uint8_t *p1, const uint8_t *p2) {
  codes_t k;
  k.c = c;
  k.p1 = p1;
  k.p2 = p2;
  if (many)
    for (int j = 0; j < 8; j++)
      for (int h = 0; h < 2; h++) {
        k.low[j][h] = vec_low(format, &k, j, h);
        if (WIDE(format)) k.high[j][h] = vec_high(format, &k, j, h);
      }
  return k;
}
static inline __attribute__((always_inline)) __m256i half_dot(const int format, const int many, const codes_t *k,
                                                              const int32_t *x4, const int from, const int count,
                                                              const int h) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  for (int j = from; j < from + count; j++) {
    __m256i x = _mm256_set1_epi32(x4[j]);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(many ? k->low[j][h] : vec_low(format, k, j, h), x));
    if (WIDE(format))
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(many ? k->high[j][h] : vec_high(format, k, j, h), x));
  }
  __m256i d = _mm256_madd_epi16(low, ones);
  return WIDE(format) ? _mm256_add_epi32(d, _mm256_madd_epi16(high, _mm256_set1_epi16(16))) : d;
}
static inline __attribute__((always_inline)) vi codes_dot(const int format, const int many, const codes_t *k,
                                                          const int8_t *x, const int from, const int count, vi init) {
  const int32_t *x4 = (const int32_t *)x;
  return (vi){_mm256_add_epi32(init.a, half_dot(format, many, k, x4, from, count, 0)),
              _mm256_add_epi32(init.b, half_dot(format, many, k, x4, from, count, 1))};
}
static inline __attribute__((always_inline)) void codes_dots(const int format, const int many, const int n,
                                                             const codes_t *k, const int8_t *const x[],
                                                             const int from, const int count, vi a[]) {
  for (int r = 0; r < n; r++) a[r] = codes_dot(format, many, k, x[r], from, count, a[r]);
}
#undef WIDE
