#include "rans.h"

#include <string.h>

enum { LANES = 4, BITS = 12, SLOTS = 1 << BITS, LEVELS = 256 };
static const uint32_t LEAST = 1u << 16;  // a state lies in [LEAST, 2^32)
static const float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds what is small to a whole number

static int finite_all(const float *values, int64_t n) {
  uint32_t strange = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    strange |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !strange;
}

int ir_quantize(const float *values, int64_t n, float low, float inverse, int levels, uint8_t *codes,
                int64_t *counts) {
  if (!finite_all(values, n)) return -1;
  const float most = (float)(levels - 1);
  for (int64_t i = 0; i < n; i++) {
    float place = (values[i] - low) * inverse;
    place = place > 0.0f ? place : 0.0f;
    place = place < most ? place : most;
    float rounded = place + MAGIC;
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    codes[i] = (uint8_t)bits;
  }
  uint32_t found[LANES][LEVELS] = {{0}};  // apart, since neighbours are often alike
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) found[lane][codes[i + lane]]++;
  for (; i < n; i++) found[0][codes[i]]++;
  for (int s = 0; s < levels; s++) counts[s] = (int64_t)found[0][s] + found[1][s] + found[2][s] + found[3][s];
  return 0;
}

void ir_restore(const uint8_t *codes, int64_t n, float low, float step, int levels, float *values) {
  float table[LEVELS] = {0};
  for (int s = 0; s < levels; s++) table[s] = low + (float)s * step;
  for (int64_t i = 0; i < n; i++) values[i] = table[codes[i]];
}

int64_t ir_encode(const uint8_t *codes, int64_t n, const uint16_t *frequencies, int levels, uint16_t *words,
                  uint32_t *states) {
  uint32_t first[LEVELS], state[LANES], sum = 0;
  for (int s = 0; s < levels; s++) {
    first[s] = sum;
    sum += frequencies[s];
  }
  for (int lane = 0; lane < LANES; lane++) state[lane] = LEAST;
  int64_t at = n;
  for (int64_t i = n - 1; i >= 0; i--) {
    const int s = codes[i], lane = (int)(i & (LANES - 1));
    const uint32_t f = frequencies[s];
    uint32_t x = state[lane];
    if (x >= (uint64_t)f << (32 - BITS)) {
      words[--at] = (uint16_t)x;
      x >>= 16;
    }
    state[lane] = (x / f << BITS) + x % f + first[s];
  }
  memcpy(states, state, sizeof state);
  return n - at;
}

int ir_decode(const uint16_t *words, int64_t count, const uint32_t *states, const uint16_t *frequencies, int levels,
              uint8_t *codes, int64_t n) {
  struct {
    uint16_t frequency, place;
    uint8_t symbol;
  } slots[SLOTS];
  uint32_t slot = 0;
  for (int s = 0; s < levels; s++)
    for (uint32_t place = 0; place < frequencies[s]; place++, slot++) {
      if (slot >= SLOTS) return -1;
      slots[slot].frequency = frequencies[s];
      slots[slot].place = (uint16_t)place;
      slots[slot].symbol = (uint8_t)s;
    }
  if (slot != SLOTS) return -1;
  uint32_t state[LANES];
  memcpy(state, states, sizeof state);
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    const int lane = (int)(i & (LANES - 1));
    uint32_t x = state[lane];
    const uint32_t found = x & (SLOTS - 1);
    codes[i] = slots[found].symbol;
    x = slots[found].frequency * (x >> BITS) + slots[found].place;
    if (x < LEAST) {
      if (at == count) return -1;
      x = x << 16 | words[at++];
    }
    state[lane] = x;
  }
  for (int lane = 0; lane < LANES; lane++)
    if (state[lane] != LEAST) return -1;
  return at == count ? 0 : -1;
}
