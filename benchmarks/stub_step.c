// A step in the engine's rhythm that computes nothing: phases of equal work on
// every thread, a barrier after each; once on the engine's own pool and once on
// OpenMP. The work is counted, not timed, so that waiting for a core shows.
#define _GNU_SOURCE
#include <stdint.h>
#include <time.h>

#include "pool.h"

static void toil(long count) {
  uint32_t x = 1;
  for (long i = 0; i < count; i++) {
    x = x * 1664525u + 1013904223u;
    __asm__ volatile("" : "+r"(x));
  }
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Work that takes a thread that long when it has a core to itself; the fastest
// of many tries.
long stub_work(double seconds) {
  const long count = 1000000;
  double best = 1e9;
  for (int i = 0; i < 100; i++) {
    const double begin = now_s();
    toil(count);
    const double spent = now_s() - begin;
    if (spent < best)
      best = spent;
  }
  return (long)(seconds / best * (double)count);
}

typedef struct {
  im_pool *pool;
  int phases;
  long work;
} plan;

static void phases(void *argument, int thread) {
  const plan *p = argument;
  for (int i = 0; i < p->phases; i++) {
    toil(p->work);
    im_pool_barrier(p->pool, thread);
  }
}

void stub_step_pool(im_pool *pool, int phases_, long work) {
  plan p = {pool, phases_, work};
  im_pool_run(pool, phases, &p);
}

void stub_step_openmp(int threads, int phases_, long work) {
#pragma omp parallel num_threads(threads)
  for (int i = 0; i < phases_; i++) {
    toil(work);
#pragma omp barrier
  }
}
