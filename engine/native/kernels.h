// The kernels of one instruction set, as a table. All tables give the same bits (see kernels_body.h).
#pragma once
#include "isthmus.h"

// Activations quantized to int8 in groups of 32, and as floats for the float formats.
typedef struct {
  const float *x;       // [rows][stride] f32, zero in the padding
  const int8_t *q;      // [rows][stride]
  const int8_t *low;    // NULL, or [rows][stride]: then an activation is scale (254 q + low), 16 bits in two halves
  const float *scale;   // [rows][stride / 32]
  const int32_t *sums;  // [rows][stride / 32][2]: sums of q (of 254 q + low) over the halves of a group
  int32_t stride;       // columns, a multiple of 32
} im_acts;

typedef struct {
  const char *name;
  // q, scale and sums of one row x[n], n a multiple of 32; with 16 bits when `low` is not NULL
  void (*quantize)(const float *x, int n, int8_t *q, int8_t *low, float *scale, int32_t *sums);
  // y[m][ldy] = rows [16 b0, 16 b1) of w times `rows` rows of activations
  void (*linear)(const im_matrix *w, const im_acts *acts, int rows, float *y, size_t ldy, int b0, int b1);
  // out = x / rms(x) * w; n real columns, the rest up to a multiple of 16 are zero in x and w
  void (*rms_norm)(const float *x, const float *w, float *out, int n, float eps);
  void (*silu_mul)(const float *gate, const float *up, float *out, int n);  // n a multiple of 16
  void (*add)(float *x, const float *y, int n);                             // x += y, n a multiple of 16
  // `heads` query heads of one KV head over positions [first, last]; see im_attend in kernels_body.h
  void (*attend)(const im_kv_view *kv, const float *q, int heads, int first, int last, float *scores, float *out);
  void (*store_half)(uint16_t *out, const float *x, int n);  // n a multiple of 16
  int (*argmax)(const float *x, int n, float *max);          // the lowest index of the largest
} im_kernels;

extern const im_kernels im_kernels_plain;
#if defined(__x86_64__)
extern const im_kernels im_kernels_avx2, im_kernels_avx512;
#elif defined(__aarch64__)
extern const im_kernels im_kernels_neon, im_kernels_neon_dot;
#endif
const im_kernels *im_kernels_choose(const char *name);  // NULL or "" for the best; NULL when this CPU lacks it

float im_half_to_float(uint16_t h);
uint16_t im_float_to_half(float f);
float im_exp(float x);
