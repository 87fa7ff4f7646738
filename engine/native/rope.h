// Rotary angles, computed the same way everywhere: plain double operations of our own.
#pragma once
#include <stdint.h>

// out: [half] cosines, then [half] sines, of position * inv_freq[i], times `scale`
void im_rope(const float *inv_freq, int half, int32_t position, float scale, float *out);
