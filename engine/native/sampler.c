#include "sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double log64(double x) {
  int e;
  double m = frexp(x, &e);
  if (m < 0.70710678118654752440) {
    m = 2 * m;
    e -= 1;
  }
  double s = (m - 1) / (m + 1), s2 = s * s, p = 1.0 / 21;
  for (int j = 9; j >= 0; j--) p = p * s2 + 1.0 / (2 * j + 1);
  return 2.0 * s * p + (double)e * 0.693147180559945309417232121458;
}

static double exp64(double x) {
  static const double factorial[14] = {1,    1,     2,      6,       24,       120,       720,
                                       5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};
  if (x < -700) return 0;
  double n = rint(x * 1.4426950408889634074), r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / factorial[13];
  for (int k = 12; k >= 0; k--) p = p * r + 1.0 / factorial[k];
  return ldexp(p, (int)n);
}

static void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {  // Philox4x32-10, Salmon et al. 2011
  for (int round = 0; round < 10; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t t[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
    memcpy(c, t, 16);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

static double gumbel(uint32_t word) {
  double u = ((double)(word >> 8) + 0.5) * 5.9604644775390625e-8;
  return -log64(-log64(u));
}

static int canonical(const void *a, const void *b) {  // logit descending, id ascending
  const im_candidate *x = a, *y = b;
  if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
  return x->id < y->id ? -1 : 1;
}

// Moves the k first of n in canonical order to the front, unsorted (Hoare's selection).
static void select_first(im_candidate *c, int32_t n, int32_t k) {
  int32_t lo = 0, hi = n - 1;
  while (lo < hi) {
    im_candidate pivot = c[lo + (hi - lo) / 2];
    int32_t i = lo - 1, j = hi + 1;
    for (;;) {
      do i++;
      while (canonical(&c[i], &pivot) < 0 && c[i].id != pivot.id);
      do j--;
      while (canonical(&pivot, &c[j]) < 0 && c[j].id != pivot.id);
      if (i >= j) break;
      im_candidate t = c[i];
      c[i] = c[j];
      c[j] = t;
    }
    if (k - 1 <= j) hi = j;
    else lo = j + 1;
  }
}

static void sift_down(im_candidate *c, int32_t i, int32_t n) {
  for (int32_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && canonical(&c[child + 1], &c[child]) < 0) child++;
    if (canonical(&c[i], &c[child]) < 0) return;
    im_candidate t = c[i];
    c[i] = c[child];
    c[child] = t;
  }
}

// Keeps the shortest canonical prefix whose weight reaches top_p; returns its length, the kept are put to c's end.
static int32_t nucleus(im_candidate *c, int32_t n, double top_p, float inverse, float zmax) {
  double lanes[16] = {0}, running = 0;
  for (int32_t i = 0; i < n; i++)  // c is in ascending id order here
    lanes[c[i].id % 16] += exp64((double)(c[i].logit * inverse) - (double)zmax);
  for (int h = 8; h; h /= 2)
    for (int i = 0; i < h; i++) lanes[i] += lanes[i + h];
  const double enough = top_p * lanes[0];
  int32_t left = n;
  for (int32_t i = n / 2 - 1; i >= 0; i--) sift_down(c, i, n);
  while (left) {  // a heap gives the canonical order one by one
    im_candidate t = c[0];
    c[0] = c[--left];
    c[left] = t;
    sift_down(c, 0, left);
    running += exp64((double)(t.logit * inverse) - (double)zmax);
    if (running >= enough) break;
  }
  return n - left;
}

static int by_id(const void *a, const void *b) {
  return ((const im_candidate *)a)->id < ((const im_candidate *)b)->id ? -1 : 1;
}

typedef struct {
  double best;
  int32_t id;
  uint32_t word[4];
  int32_t quad;
} race;

static void run(race *r, int32_t id, float z, const im_sampling *s, uint32_t position) {
  if (id >> 2 != r->quad) {
    uint32_t c[4] = {(uint32_t)id >> 2, position, s->stream, 0};
    philox(c, (uint32_t)s->seed, (uint32_t)(s->seed >> 32));
    memcpy(r->word, c, 16);
    r->quad = id >> 2;
  }
  double score = (double)z + gumbel(r->word[id & 3]);
  if (score > r->best || (score == r->best && id < r->id)) {
    r->best = score;
    r->id = id;
  }
}

int32_t im_sample(const float *logits, int32_t n, int32_t argmax, const int32_t *ids, const im_sampling *s,
                  uint32_t position, im_candidate *scratch) {
  const int32_t greedy = ids ? ids[argmax] : argmax;
  if (s->temperature == 0 || s->top_k == 1) return greedy;
  const float inverse = 1.f / s->temperature, zmax = logits[argmax] * inverse;
  if (!isfinite(inverse) || !isfinite(zmax)) return greedy;  // a temperature that float32 cannot divide by
  const double highest = 17.4;                               // above the largest value of the noise
  race r = {-INFINITY, greedy, {0}, -1};
  run(&r, greedy, zmax, s, position);
  if ((s->top_k == 0 || s->top_k >= n) && s->top_p >= 1) {
    for (int32_t i = 0; i < n; i++) {
      float z = logits[i] * inverse;
      if ((double)z + highest > r.best) run(&r, ids ? ids[i] : i, z, s, position);
    }
    return r.id;
  }
  int32_t kept = n;
  im_candidate *c = scratch;
  for (int32_t i = 0; i < n; i++) c[i] = (im_candidate){logits[i], ids ? ids[i] : i};
  if (s->top_k > 0 && s->top_k < n) {
    select_first(c, n, s->top_k);
    kept = s->top_k;
    qsort(c, (size_t)kept, sizeof *c, by_id);
  }
  if (s->top_p < 1) {
    int32_t all = kept;
    kept = nucleus(c, all, s->top_p, inverse, zmax);
    c += all - kept;
  }
  for (int32_t i = 0; i < kept; i++) {
    float z = c[i].logit * inverse;
    if ((double)z + highest > r.best) run(&r, c[i].id, z, s, position);
  }
  return r.id;
}
