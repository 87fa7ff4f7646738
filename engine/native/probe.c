// Single operations, for tests and measurements.
#include <stdlib.h>

#include "step.h"

typedef struct {
  im_engine *e;
  const im_matrix *w;
  im_acts acts;
  int rows;
  float *y;
} linear_call;
static void linear_work(void *argument, int thread) {
  linear_call *c = argument;
  im_linear_targets(c->e, (target[]){{c->w, c->y, (size_t)im_pad(c->w->rows, 16)}}, 1, &c->acts, c->rows, thread);
}

int im_linear(im_engine *e, const im_matrix *w, const float *x, int rows, int fine, float *y) {
  const int stride = im_pad(w->cols, 32);
  lane l = {0};
  l.panels = aligned_alloc(64, (im_panels_bytes(rows, stride, fine) + 63) / 64 * 64);
  if (!l.panels) return IM_NO_MEMORY;
  for (int i = 0; i < rows; i++) quantize_row(e, &l, fine, x, i, rows, stride);
  linear_call c = {e, w, acts_of(&l, x, stride, fine), rows, y};
  im_pool_run(e->pool, linear_work, &c);
  free(l.panels);
  return IM_DONE;
}

int32_t im_sample_one(const float *logits, int32_t n, const im_sampling *sampling, uint32_t position) {
  float max;
  im_candidate *scratch = malloc((size_t)n * sizeof *scratch);
  if (!scratch) return -1;
  int32_t best = im_kernels_choose(NULL)->argmax(logits, n, &max);
  int32_t token = im_sample(logits, n, best, NULL, sampling, position, scratch);
  free(scratch);
  return token;
}

typedef struct {
  im_engine *e;
  const uint64_t *data;
  size_t words;
  double sum;
} read_call;
static void read_work(void *argument, int thread) {
  read_call *c = argument;
  const size_t from = c->words * (size_t)thread / (size_t)c->e->threads,
               to = c->words * (size_t)(thread + 1) / (size_t)c->e->threads;
  uint64_t s[8] = {0};
  for (size_t i = from; i + 8 <= to; i += 8)
    for (int j = 0; j < 8; j++) s[j] += c->data[i + (size_t)j];
  uint64_t sum = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
  meet(&(walker){c->e, NULL, thread, 0, NULL});
  if (thread == 0) c->sum += (double)sum;
}

double im_read_bandwidth(im_engine *e, const void *data, size_t bytes) {
  read_call c = {e, data, bytes / 8, 0};
  im_pool_run(e->pool, read_work, &c);
  return c.sum;
}
