// The 16 virtual lanes on AArch64: four registers each. With IM_DOTPROD, codes of up to 7 bits meet the signed dot
// product and 8-bit codes are moved to -128..127 first; without it, products are summed in 16 bits as on AVX2.
#pragma once
#include <arm_neon.h>

#define V_TILE 2
#define K_TILE 1

typedef struct {
  float32x4_t v[4];
} vf;
typedef struct {
  int32x4_t v[4];
} vi;
#define EACH for (int i = 0; i < 4; i++)

static inline vf vf_set1(float x) {
  vf r;
  EACH r.v[i] = vdupq_n_f32(x);
  return r;
}
static inline vf vf_zero(void) { return vf_set1(0.f); }
static inline vf vf_load(const float *p) {
  vf r;
  EACH r.v[i] = vld1q_f32(p + 4 * i);
  return r;
}
static inline void vf_store(float *p, vf x) { EACH vst1q_f32(p + 4 * i, x.v[i]); }
static inline vf vf_add(vf a, vf b) {
  EACH a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf vf_sub(vf a, vf b) {
  EACH a.v[i] = vsubq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf vf_mul(vf a, vf b) {
  EACH a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf vf_div(vf a, vf b) {
  EACH a.v[i] = vdivq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf vf_max(vf a, vf b) {
  EACH a.v[i] = vmaxq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf vf_min(vf a, vf b) {
  EACH a.v[i] = vminq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf vf_fma(vf a, vf b, vf c) {
  EACH c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
static inline vf vf_abs(vf a) {
  EACH a.v[i] = vabsq_f32(a.v[i]);
  return a;
}
static inline vf vf_round(vf a) {
  EACH a.v[i] = vrndnq_f32(a.v[i]);
  return a;
}
static inline vf vf_load_half(const uint16_t *p) {
  vf r;
  EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
}
static inline void vf_store_half(uint16_t *p, vf x) {
  EACH vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
static inline vf vf_load_bf16(const uint16_t *p) {
  vf r;
  EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  return r;
}
static inline vf vf_keep(vf x, int lo, int hi, float fill) {
  const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  EACH {
    int32x4_t l = vld1q_s32(lanes + 4 * i);
    uint32x4_t m = vandq_u32(vcgeq_s32(l, vdupq_n_s32(lo)), vcltq_s32(l, vdupq_n_s32(hi)));
    x.v[i] = vbslq_f32(m, x.v[i], vdupq_n_f32(fill));
  }
  return x;
}
static inline vf vf_scale2(vf x, vf n) {
  EACH x.v[i] = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.v[i]), vshlq_n_s32(vcvtq_s32_f32(n.v[i]), 23)));
  return x;
}
static inline float vf_sum(vf x) {
  float32x4_t s = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  float32x2_t h = vadd_f32(vget_low_f32(s), vget_high_f32(s));
  return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}
static inline float vf_maxall(vf x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
static inline vf vf_from_vi(vi x) {
  vf r;
  EACH r.v[i] = vcvtq_f32_s32(x.v[i]);
  return r;
}
static inline vi vi_set1(int32_t x) {
  vi r;
  EACH r.v[i] = vdupq_n_s32(x);
  return r;
}
static inline vi vi_add(vi a, vi b) {
  EACH a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}
static inline vi vi_sub(vi a, vi b) {
  EACH a.v[i] = vsubq_s32(a.v[i], b.v[i]);
  return a;
}
static inline vi vi_shl(vi a, int n) {
  EACH a.v[i] = vshlq_s32(a.v[i], vdupq_n_s32(n));
  return a;
}
static inline int32_t vi_sum(vi a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
static inline vi vf_store_int8(int8_t *p, vf x) {
  vi r;
  EACH r.v[i] = vcvtnq_s32_f32(x.v[i]);
  int16x8_t a = vcombine_s16(vmovn_s32(r.v[0]), vmovn_s32(r.v[1])),
            b = vcombine_s16(vmovn_s32(r.v[2]), vmovn_s32(r.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
  return r;
}

// ---- integer dots: quarter i of vec j holds rows 4 i .. 4 i + 3; for many rows the codes are unpacked once
typedef struct {
  const uint8_t *c, *p1, *p2;
  uint8x16_t v[8][4];
} codes_t;

static inline __attribute__((always_inline)) uint8x16_t bits(const uint8_t *p, int line, int quarter, int shift,
                                                             uint8_t mask) {
  uint8x16_t t = vshlq_u8(vld1q_u8(p + 64 * line + 16 * quarter), vdupq_n_s8((int8_t)-shift));
  return vandq_u8(t, vdupq_n_u8(mask));
}
static inline __attribute__((always_inline)) uint8x16_t nested4(const codes_t *k, int j, int i) {
  uint8x16_t t = bits(k->c, j / 4, i, 2 * (j % 4), 3), u = bits(k->p1, j / 4, i, 2 * (j % 4), 3);
  return vorrq_u8(vshlq_n_u8(t, 2), u);
}
static inline __attribute__((always_inline)) uint8x16_t code(const int format, const codes_t *k, int j, int i) {
  if (format == IM_Q8 || format == IM_Q8X) return vld1q_u8(k->c + 64 * j + 16 * i);
  if (format == IM_N2) return bits(k->c, j / 4, i, 2 * (j % 4), 3);
  if (format == IM_N4) return nested4(k, j, i);
  if (format == IM_N8) return vorrq_u8(vshlq_n_u8(nested4(k, j, i), 4), bits(k->p2, j / 2, i, 4 * (j % 2), 15));
  return bits(k->c, j / 2, i, 4 * (j % 2), 15);
}
static inline __attribute__((always_inline)) codes_t codes_load(const int format, const int many, const uint8_t *c,
                                                                const uint8_t *p1, const uint8_t *p2) {
  codes_t k;
  k.c = c;
  k.p1 = p1;
  k.p2 = p2;
  if (many)
    for (int j = 0; j < 8; j++) EACH k.v[j][i] = code(format, &k, j, i);
  return k;
}
static inline __attribute__((always_inline)) vi codes_dot(const int format, const int many, const codes_t *k,
                                                          const int8_t *x, const int from, const int count, vi init) {
  const int wide = format == IM_Q8 || format == IM_Q8X || format == IM_N8;
#ifdef IM_DOTPROD
  if (wide) {  // q = (q - 128) + 128: the second part is 128 times the activations' sum
    int32_t s = 0;
    for (int c = 4 * from; c < 4 * (from + count); c++) s += x[c];
    EACH init.v[i] = vaddq_s32(init.v[i], vdupq_n_s32(128 * s));
  }
  for (int j = from; j < from + count; j++) {
    int32_t x4;
    memcpy(&x4, x + 4 * j, 4);
    int8x16_t xv = vreinterpretq_s8_s32(vdupq_n_s32(x4));
    EACH {
      uint8x16_t q = many ? k->v[j][i] : code(format, k, j, i);
      int8x16_t w = vreinterpretq_s8_u8(wide ? veorq_u8(q, vdupq_n_u8(0x80)) : q);
      init.v[i] = vdotq_s32(init.v[i], w, xv);
    }
  }
#else
  EACH {
    int16x8_t la = vdupq_n_s16(0), lb = la, ha = la, hb = la;
    for (int j = from; j < from + count; j++) {
      int32_t x4;
      memcpy(&x4, x + 4 * j, 4);
      int8x16_t xv = vreinterpretq_s8_s32(vdupq_n_s32(x4));
      uint8x16_t q = many ? k->v[j][i] : code(format, k, j, i);
      int8x16_t low = vreinterpretq_s8_u8(wide ? vandq_u8(q, vdupq_n_u8(15)) : q);
      la = vmlal_s8(la, vget_low_s8(low), vget_low_s8(xv));
      lb = vmlal_s8(lb, vget_high_s8(low), vget_high_s8(xv));
      if (wide) {
        int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(q, 4));
        ha = vmlal_s8(ha, vget_low_s8(high), vget_low_s8(xv));
        hb = vmlal_s8(hb, vget_high_s8(high), vget_high_s8(xv));
      }
    }
    int32x4_t d = vpaddq_s32(vpaddlq_s16(la), vpaddlq_s16(lb));
    if (wide) d = vaddq_s32(d, vshlq_n_s32(vpaddq_s32(vpaddlq_s16(ha), vpaddlq_s16(hb)), 4));
    init.v[i] = vaddq_s32(init.v[i], d);
  }
#endif
  return init;
}
static inline __attribute__((always_inline)) void codes_dots(const int format, const int many, const int n,
                                                             const codes_t *k, const int8_t *const x[],
                                                             const int from, const int count, vi a[]) {
  for (int r = 0; r < n; r++) a[r] = codes_dot(format, many, k, x[r], from, count, a[r]);
}
#undef EACH
