// Uses the thread pool in every way that the engine does; for a thread
// sanitizer. Prints the number of rounds.
#include <stdio.h>

#include "pool.h"

enum { THREADS = 4, PHASES = 200, RUNS = 20, PIECES = 8 };

static im_pool *pool;
static int threads;
static long rounds[THREADS], sum, wrong;

static void work(void *argument, int thread) {
  long *out = argument;
  for (int phase = 0; phase < PHASES; phase++) {
    rounds[thread]++;
    for (volatile int i = 0; i < (thread * 37 + phase) % 400;)
      i = i + 1;
    im_pool_barrier(pool, thread);
    if (thread == 0) {
      im_pool_rewind(pool);
      sum = 0;
      for (int t = 0; t < threads; t++)
        sum += rounds[t];
    }
    im_pool_barrier(pool, thread);
    for (int i; (i = im_pool_take(pool, 1)) < PIECES;)
      out[i] = sum;
    im_pool_barrier(pool, thread);
    if (thread == phase % threads)
      for (int i = 0; i < PIECES; i++)
        wrong += out[i] != sum;
  }
}

int main(void) {
  for (threads = 1; threads <= THREADS; threads++) {
    long out[PIECES];
    for (int t = 0; t < THREADS; t++)
      rounds[t] = 0;
    pool = im_pool_new(threads);
    if (!pool)
      return 2;
    for (int run = 0; run < RUNS; run++)
      im_pool_run(pool, work, out);
    im_pool_free(pool);
    if (wrong || sum != (long)threads * PHASES * RUNS)
      return 1;
    printf("%ld\n", sum);
  }
  return 0;
}
