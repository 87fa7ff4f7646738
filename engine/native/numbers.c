// Number conversions and choices that every instruction set shares.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

float im_half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, u;
  if (e == 31) u = sign | 0x7f800000 | m << 13;
  else if (e) u = sign | (e + 112) << 23 | m << 13;
  else {  // subnormal: m * 2^-24 is exact in float
    float f = (float)m * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

uint16_t im_float_to_half(float f) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &f, 4);
  uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00 | (u >> 13 & 0x3ff);
  if (u >= 0x477ff000) return sign | 0x7c00;
  if (u < 0x38800000) {  // below the normal halves: adding 0.5 rounds at 2^-24
    float a, magic = 0.5f;
    memcpy(&a, &u, 4);
    a += magic;
    memcpy(&u, &a, 4);
    return sign | (uint16_t)(u - 0x3f000000);
  }
  return sign | (uint16_t)((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

const im_kernels *im_kernels_choose(const char *name) {
  const im_kernels *known[4];
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    known[n++] = &im_kernels_avx512;
  if (avx2) known[n++] = &im_kernels_avx2;
#elif defined(__aarch64__)
  extern int im_has_dotprod(void);
  if (im_has_dotprod()) known[n++] = &im_kernels_neon_dot;
  known[n++] = &im_kernels_neon;
#endif
  known[n++] = &im_kernels_plain;
  if (!name || !*name) return known[0];
  for (int i = 0; i < n; i++)
    if (!strcmp(known[i]->name, name)) return known[i];
  return NULL;
}

#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
int im_has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20) & 1; }  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
int im_has_dotprod(void) { return 1; }
#else
int im_has_dotprod(void) { return 0; }
#endif
#endif

// e^x for scalars, in the order of vf_exp but without FMA; the same everywhere
float im_exp(float x) {
  if (x < -86.f) x = -86.f;
  if (x > 88.f) x = 88.f;
  double n = rint((double)x * 1.4426950408889634), r = (double)x - n * 0.6931471805599453, p = 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return (float)ldexp(p, (int)n);
}
