// The kernels of one instruction set, as a table. All tables give the same bits (see kernels_body.h).
#pragma once
#include "isthmus.h"

// 32 activations of a row, quantized: scale times q or, in 16 bits, scale times (256 q + low). With their sum t come
// the terms that the weight formats' offsets make of it.
typedef struct {
  int8_t q[32];
  float scale, shift;                  // shift = scale t
  int32_t halves[2];                   // -128 t of columns 0..15 and of 16..31
  int32_t eight, four, two, nested8;   // -128 t, -8 t, -13 t, -271 t
  int8_t low[];                        // [32] in 16 bits
} im_group;

// Rows lie in panels of up to 16, group by group: [rows / 16][stride / 32][rows of a panel] of im_group. So one pass
// over a weight block reads them in order, with one pointer. Up to 16 rows are one panel of as many.
enum { IM_PANEL = 16, IM_GROUP = 64, IM_GROUP_FINE = 96 };

// Activations, quantized and as floats for the float formats.
typedef struct {
  const float *x;         // [rows][stride] f32, zero in the padding
  const uint8_t *panels;
  int32_t stride;         // columns, a multiple of 32
  int32_t fine;           // 16 bits
} im_acts;

static inline int32_t im_panel_rows(int32_t rows) { return rows < IM_PANEL ? rows : IM_PANEL; }
static inline size_t im_group_bytes(int fine) { return fine ? IM_GROUP_FINE : IM_GROUP; }
// where group 0 of a row stands; the next group is `step` behind
static inline size_t im_panel_at(int32_t row, int32_t rows, int32_t stride, int fine, size_t *step) {
  *step = (size_t)im_panel_rows(rows) * im_group_bytes(fine);
  return (size_t)(row / IM_PANEL) * (size_t)(stride / 32) * *step + (size_t)(row % IM_PANEL) * im_group_bytes(fine);
}
static inline size_t im_panels_bytes(int32_t rows, int32_t stride, int fine) {
  const size_t padded = (size_t)(rows <= IM_PANEL ? rows : (rows + IM_PANEL - 1) / IM_PANEL * IM_PANEL);
  return padded * (size_t)(stride / 32) * im_group_bytes(fine);
}

typedef struct {
  const char *name;
  // the groups of one row x[n], n a multiple of 32, `step` bytes from one to the next; in 16 bits when `fine`
  void (*quantize)(const float *x, int n, int fine, uint8_t *to, size_t step);
  // y[m][ldy] = rows [16 b0, 16 b1) of w times `rows` rows of activations
  void (*linear)(const im_matrix *w, const im_acts *acts, int rows, float *y, size_t ldy, int b0, int b1);
  // out = x / rms(x) * w; n real columns, the rest up to a multiple of 16 are zero in x and w
  void (*rms_norm)(const float *x, const float *w, float *out, int n, float eps);
  // out = (x - mean) / deviation * w + b, as rms_norm
  void (*layer_norm)(const float *x, const float *w, const float *b, float *out, int n, float eps);
  void (*silu_mul)(const float *gate, const float *up, float *out, int n);  // n a multiple of 16
  // out = (up + 1) * gate * sigmoid(alpha gate) with gate at most `limit` and up within it; n a multiple of 16
  void (*swiglu_mul)(const float *gate, const float *up, float *out, int n, float alpha, float limit);
  void (*add)(float *x, const float *y, int n);                             // x += y, n a multiple of 16
  // `heads` query heads of one KV head over positions [first, last]; see im_attend in kernels_body.h
  void (*attend)(const im_kv_view *kv, const float *q, int heads, int first, int last, float *scores, float *out);
  void (*store_half)(uint16_t *out, const float *x, int n);  // n a multiple of 16
  int (*argmax)(const float *x, int n, float *max);          // the lowest index of the largest
  float (*confidence)(const float *x, int n, float max);     // 1 / sum exp(x - max); x padded to a multiple of 16
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
