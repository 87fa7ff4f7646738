// One row of a packed matrix as floats.
#include <string.h>

#include "decoder.h"
#include "kernels.h"

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
      case IM_BF16: {
        uint32_t u = (uint32_t)((const uint16_t *)w->codes)[element] << 16;
        memcpy(&x[c], &u, 4);
        continue;
      }
      case IM_Q8:
      case IM_Q8X: q = codes[line * 64 + at]; break;
      case IM_Q4:
      case IM_Q4M:
      case IM_Q4X: q = (codes[group * 256 + (j / 2) * 64 + at] >> (4 * (j % 2))) & 15; break;
      default: q = (codes[group * 128 + (j / 4) * 64 + at] >> (2 * (j % 4))) & 3;
    }
    if (w->format == IM_N4 || w->format == IM_N8)
      q = q << 2 | ((((const uint8_t *)w->p1)[group * 128 + (j / 4) * 64 + at] >> (2 * (j % 4))) & 3);
    if (w->format == IM_N8)
      q = q << 4 | ((((const uint8_t *)w->p2)[group * 256 + (j / 2) * 64 + at] >> (4 * (j % 2))) & 15);
    if (w->format == IM_Q8X) s = ((const float *)w->scales)[(((size_t)b * groups + c / 32) * 2 + c / 16 % 2) * 16 + r];
    else if (w->format == IM_Q4X) {
      s = ((const float *)w->scales)[g];
      m = ((const float *)w->mins)[g];
    } else s = im_half_to_float(((const uint16_t *)w->scales)[g]);
    if (w->format == IM_Q4M) m = im_half_to_float(((const uint16_t *)w->mins)[g]);
    switch (w->format) {
      case IM_Q8:
      case IM_Q8X: x[c] = s * (float)(q - 128); break;
      case IM_Q4M:
      case IM_Q4X: x[c] = s * (float)q + m; break;
      case IM_N2: x[c] = s * ((float)q - 1.625f); break;
      case IM_N8: x[c] = s * 0.0625f * ((float)q - 135.5f); break;
      default: x[c] = s * (float)(q - 8);
    }
  }
  memset(x + w->cols, 0, (size_t)(stride - w->cols) * 4);
}
