// CRC-32C (Castagnoli), the checksum for which processors have an instruction.
#include <stdatomic.h>
#include <string.h>

#include "reader.h"

static uint32_t by_table(uint32_t c, const uint8_t *p, size_t n) {
  static uint32_t table[8][256];
  static _Atomic int made;
  if (!atomic_load(&made)) {  // several threads may make it: they write the same
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t x = i;
      for (int bit = 0; bit < 8; bit++) x = x >> 1 ^ (x & 1 ? 0x82f63b78u : 0);
      table[0][i] = x;
    }
    for (int t = 1; t < 8; t++)
      for (int i = 0; i < 256; i++) table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
    atomic_store(&made, 1);
  }
  for (; n >= 8; n -= 8, p += 8) {
    uint32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + 4, 4);
    low ^= c;
    c = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
        table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
  }
  while (n--) c = c >> 8 ^ table[0][(c ^ *p++) & 255];
  return c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t c, const uint8_t *p, size_t n) {
  uint64_t wide = c;
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    wide = __builtin_ia32_crc32di(wide, word);
  }
  c = (uint32_t)wide;
  while (n--) c = __builtin_ia32_crc32qi(c, *p++);
  return c;
}
#endif

uint32_t im_crc32c(uint32_t before, const void *data, size_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~by_instruction(~before, data, bytes);
#endif
  return ~by_table(~before, data, bytes);
}
