// Seeded sampling with Gumbel noise; the specification is engine/sampler.py, which gives the same bits.
#pragma once
#include "isthmus.h"

typedef struct {
  float logit;
  int32_t id;
} im_candidate;

// ids: NULL, or [n] the token of each logit, ascending. scratch: room for n candidates
int32_t im_sample(const float *logits, int32_t n, int32_t argmax, const int32_t *ids, const im_sampling *sampling,
                  uint32_t position, im_candidate *scratch);
