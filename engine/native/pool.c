#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0); }
#else  // one lock for all words: sleeping is rare
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_signal = PTHREAD_COND_INITIALIZER;
static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
  pthread_mutex_lock(&sleep_lock);
  while (atomic_load(word) == value) pthread_cond_wait(&sleep_signal, &sleep_lock);
  pthread_mutex_unlock(&sleep_lock);
}
static void wake_all(_Atomic uint32_t *word) {
  (void)word;
  pthread_mutex_lock(&sleep_lock);
  pthread_cond_broadcast(&sleep_signal);
  pthread_mutex_unlock(&sleep_lock);
}
#endif

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

#define SPIN_NS 50000
#define SHORT 100        // a hurried thread spins for this part of it: less than going to sleep costs
#define PROBES 64        // one in so many waits of a hurried thread is a long one
#define IDLE_YIELDS 300  // about 100 us: the next call from Python finds the threads awake

typedef struct {
  _Atomic uint32_t word, sleepers;
  char pad[56];
} event;  // a counter that threads wait to change

typedef struct {
  int hurried;  // barriers since spinning was not long enough, 0 where it is
  char pad[60];
} waiter;  // what a thread knows about waiting

struct im_pool {
  event job, gate;
  _Atomic uint32_t arrived;
  char pad1[60];
  _Atomic int counter;
  char pad2[60];
  int threads, spins, closing;
  waiter *waiters;  // [threads]
  void (*work)(void *, int);
  void *argument;
  pthread_t *handles;
  pid_t owner;  // the process whose threads these are
};

typedef struct {
  im_pool *pool;
  int thread;
} seat;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int spin_until(event *e, uint32_t seen, int spins) {
  for (int i = 0; i < spins; i++) {
    if (atomic_load_explicit(&e->word, memory_order_acquire) != seen) return 1;
    RELAX();
  }
  return 0;
}

static void sleep_until(event *e, uint32_t seen) {
  atomic_fetch_add(&e->sleepers, 1);
  while (atomic_load(&e->word) == seen) sleep_while(&e->word, seen);
  atomic_fetch_sub(&e->sleepers, 1);
}

static void change(event *e) {
  atomic_fetch_add(&e->word, 1);
  if (atomic_load(&e->sleepers)) wake_all(&e->word);
}

// A thread spins for as long as the others need when each has a core of its own. Where that was not enough, somebody
// else wants the cores and two threads of this pool may be on one: whoever spins there keeps the other from what it is
// waited for, at every barrier anew (seen: a third of the speed). So after a wait in vain it goes to sleep at once, and
// only now and then looks whether spinning pays again.
void im_pool_barrier(im_pool *p, int thread) {
  if (p->threads == 1) return;
  uint32_t gate = atomic_load_explicit(&p->gate.word, memory_order_relaxed);
  if (atomic_fetch_add(&p->arrived, 1) + 1 == (uint32_t)p->threads) {
    atomic_store(&p->arrived, 0);
    change(&p->gate);
    return;
  }
  waiter *w = &p->waiters[thread];
  const int patient = w->hurried % PROBES == 0;
  const int short_enough = spin_until(&p->gate, gate, patient ? p->spins : p->spins / SHORT);
  w->hurried = patient && short_enough ? 0 : w->hurried % PROBES + 1;
  if (!short_enough) sleep_until(&p->gate, gate);
}

int im_pool_take(im_pool *p, int count) { return atomic_fetch_add_explicit(&p->counter, count, memory_order_relaxed); }
void im_pool_rewind(im_pool *p) { atomic_store(&p->counter, 0); }

static void *worker(void *argument) {
  seat s = *(seat *)argument;
  im_pool *p = s.pool;
  free(argument);
  uint32_t seen = 0;
  for (;;) {
    int awake = spin_until(&p->job, seen, p->spins);
    for (int i = 0; i < IDLE_YIELDS && !awake; i++) {
      sched_yield();
      awake = atomic_load_explicit(&p->job.word, memory_order_acquire) != seen;
    }
    if (!awake) sleep_until(&p->job, seen);
    seen++;
    if (p->closing) return NULL;
    p->work(p->argument, s.thread);
    im_pool_barrier(p, s.thread);
  }
}

void im_pool_run(im_pool *p, void (*work)(void *, int), void *argument) {
  p->work = work;
  p->argument = argument;
  if (p->threads > 1) change(&p->job);
  work(argument, 0);
  im_pool_barrier(p, 0);
}

im_pool *im_pool_new(int threads) {
  im_pool *p = calloc(1, sizeof *p);
  if (!p) return NULL;
  p->handles = calloc((size_t)threads, sizeof *p->handles);
  p->waiters = calloc((size_t)threads, sizeof *p->waiters);
  if (!p->handles || !p->waiters) {
    free(p->handles);
    free(p->waiters);
    free(p);
    return NULL;
  }
  uint64_t least = UINT64_MAX;  // of several tries: one may be interrupted
  for (int try = 0; try < 5; try++) {
    const uint64_t start = now_ns();
    for (int i = 0; i < 400; i++) RELAX();
    const uint64_t spent = now_ns() - start;
    if (spent < least) least = spent;
  }
  p->spins = (int)(SPIN_NS * 400ull / (least ? least : 1));
  if (p->spins > 100000) p->spins = 100000;
  p->threads = threads;
  p->owner = getpid();
  for (int i = 1; i < threads; i++) {
    seat *s = malloc(sizeof *s);
    if (s) *s = (seat){p, i};
    if (!s || pthread_create(&p->handles[i], NULL, worker, s)) {
      free(s);
      p->threads = i;
      im_pool_free(p);
      return NULL;
    }
  }
  return p;
}

void im_pool_free(im_pool *p) {
  if (!p) return;
  if (p->owner == getpid()) {  // a forked child has none of these threads: joining them there is a crash
    p->closing = 1;
    if (p->threads > 1) change(&p->job);
    for (int i = 1; i < p->threads; i++) pthread_join(p->handles[i], NULL);
  }
  free(p->handles);
  free(p->waiters);
  free(p);
}
