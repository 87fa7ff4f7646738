#include "rope.h"

#include <math.h>

// Cody-Waite reduction to [-pi/4, pi/4] and Taylor polynomials: below 1e-12 for the angles of any context length.
static void sine_cosine(double x, double *sine, double *cosine) {
  double n = rint(x * 0.63661977236758134308);
  double r = ((x - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11) - n * 2.02226624879595063154e-21;
  double r2 = r * r;
  double s = 1.0 / 6227020800.0, c = 1.0 / 479001600.0;
  s = s * r2 - 1.0 / 39916800.0;
  s = s * r2 + 1.0 / 362880.0;
  s = s * r2 - 1.0 / 5040.0;
  s = s * r2 + 1.0 / 120.0;
  s = s * r2 - 1.0 / 6.0;
  s = r + r * (s * r2);
  c = c * r2 - 1.0 / 3628800.0;
  c = c * r2 + 1.0 / 40320.0;
  c = c * r2 - 1.0 / 720.0;
  c = c * r2 + 1.0 / 24.0;
  c = c * r2 - 0.5;
  c = 1.0 + c * r2;
  switch ((int64_t)n & 3) {
    case 0:
      *sine = s;
      *cosine = c;
      break;
    case 1:
      *sine = c;
      *cosine = -s;
      break;
    case 2:
      *sine = -s;
      *cosine = -c;
      break;
    default: *sine = -c; *cosine = s;
  }
}

void im_rope(const float *inv_freq, int half, int32_t position, float scale, float *out) {
  for (int i = 0; i < half; i++) {
    double s, c;
    sine_cosine((double)position * (double)inv_freq[i], &s, &c);
    out[i] = (float)(c * (double)scale);
    out[half + i] = (float)(s * (double)scale);
  }
}
