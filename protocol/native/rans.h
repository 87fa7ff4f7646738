// Entropy coding of small whole numbers by rANS (Duda, 2013, arXiv:1311.2540), and the affine steps around it.
//
// The format, which `isthmus.protocol.rans` gives in words and in Python: four coders of 32 bits share the symbols in
// turn and one sequence of 16-bit words; frequencies are whole numbers whose sum is 2^12.
#ifndef ISTHMUS_RANS_H
#define ISTHMUS_RANS_H

#include <stdint.h>

// BEGIN SHARED WITH PYTHON
// Codes are the nearest of `levels` steps from `low` on, halves to even; `counts` says how often each was taken.
// Returns 0, or -1 if a value is not finite.
int ir_quantize(const float *values, int64_t n, float low, float inverse, int levels, uint8_t *codes, int64_t *counts);

// Values are low + code * step, two roundings in float.
void ir_restore(const uint8_t *codes, int64_t n, float low, float step, int levels, float *values);

// Writes the words of n codes into the end of `words`, which has room for n, in the order in which they are read.
// Returns how many.
int64_t ir_encode(const uint8_t *codes, int64_t n, const uint16_t *frequencies, int levels, uint16_t *words,
                  uint32_t *states);

// Reads n codes. Returns 0, or -1 if the words and the states are not what `ir_encode` writes for any.
int ir_decode(const uint16_t *words, int64_t count, const uint32_t *states, const uint16_t *frequencies, int levels,
              uint8_t *codes, int64_t n);
// END SHARED WITH PYTHON

#endif
