#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  im_read *at;  // [room], a ring
  int first, count;
} queue;

struct im_reader {
  pthread_mutex_t lock;
  pthread_cond_t asked, arrived;
  queue urgent, idle;  // idle: what nobody waits for yet
  int32_t *done;       // [room] tags
  int room, threads, closing, n_done;
  int ahead;      // whether a thread reads what is not urgent: one at a time, so that the likeliest is there first
  uint32_t turn;  // times that such reads were taken back
  uint32_t arrivals;
  double bytes_per_second;
  int64_t free_at, busy_since;  // when an emulated device has given all that was asked of it
  im_reader_report report;
  pthread_t *handles;
  pid_t owner;
};

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_until(int64_t ns) {
  struct timespec t = {ns / 1000000000, ns % 1000000000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) continue;
}

static int64_t length(const im_read *r) {
  int64_t bytes = 0;
  for (int p = 0; p < 3; p++) bytes += r->to[p] ? r->bytes[p] : 0;
  return bytes;
}

enum { PIECE_NS = 500000, LEAST = 64 << 10, USUAL = 256 << 10, MOST = 1 << 20 };

// Bytes of a read that is not urgent, after which an urgent one may go first: what took half a millisecond so far.
static int64_t piece_of(const im_reader *reader) {
  const im_reader_report *r = &reader->report;
  if (r->bytes < MOST || r->busy_ns <= 0) return USUAL;
  const double bytes = (double)r->bytes / (double)r->busy_ns * PIECE_NS;
  return bytes < LEAST ? LEAST : bytes > MOST ? MOST : (int64_t)bytes / 4096 * 4096;
}

// Reads at most `most` bytes more, in one system call where the kernel gives them at once; 0, or IM_READ_* with errno.
static int fetch(im_read *r, int64_t most, int *error) {
  for (const int64_t end = r->begun + most; r->begun < end;) {
    struct iovec parts[3];
    int n = 0;
    int64_t skip = r->begun, left = end - r->begun;
    for (int p = 0; p < 3; p++) {
      if (!r->to[p]) continue;
      int64_t bytes = r->bytes[p] - skip;
      if (bytes > left) bytes = left;
      if (bytes > 0) {
        parts[n++] = (struct iovec){(char *)r->to[p] + skip, (size_t)bytes};
        left -= bytes;
      }
      skip = skip > r->bytes[p] ? skip - r->bytes[p] : 0;
    }
    const ssize_t got = preadv(r->file, parts, n, r->offset + r->begun);
    if (got < 0 && errno == EINTR) continue;
    *error = got < 0 ? errno : 0;
    if (got <= 0) return got < 0 ? IM_READ_FILE : IM_READ_SHORT;
    r->begun += got;
  }
  return 0;
}

// What was read is whole and as it was written.
static int check(const im_read *r) {
#if defined(POSIX_FADV_DONTNEED)
  if (r->drop) posix_fadvise(r->file, r->offset, length(r), POSIX_FADV_DONTNEED);
#endif
  for (int p = 0; p < 3; p++)
    if (r->to[p] && r->check >> p & 1 && im_crc32c(0, r->to[p], (size_t)r->bytes[p]) != r->checksum[p])
      return IM_READ_CHECKSUM;
  return 0;
}

static im_read pop(queue *q, int room) {
  im_read r = q->at[q->first];
  q->first = (q->first + 1) % room;
  q->count--;
  return r;
}

static void push_front(queue *q, const im_read *r, int room) {
  q->first = (q->first + room - 1) % room;
  q->at[q->first] = *r;
  q->count++;
}

// when an emulated device has given so many bytes more; 0 where there is none
static int64_t due(im_reader *reader, int64_t bytes, int64_t now) {
  if (reader->bytes_per_second <= 0) return 0;
  if (reader->free_at < now) reader->free_at = now;
  const double ns = (double)bytes / reader->bytes_per_second * 1e9;
  return reader->free_at += ns < 1e13 ? (int64_t)ns : (int64_t)1e13;
}

static void finish(im_reader *reader, const im_read *r, int failure, int error) {
  int32_t there = failure ? INT32_MIN : 0;
  for (int p = 0; p < 3; p++) there |= r->to[p] ? 1 << p : 0;
  __atomic_fetch_or(&r->expert->present, there, __ATOMIC_RELEASE);
  reader->report.reads++;
  if (failure) {
    reader->report.failure = failure;
    reader->report.error = error;
    reader->report.failed_tag = r->tag;
  }
  reader->done[reader->n_done++] = r->tag;
  reader->arrivals++;
  pthread_cond_broadcast(&reader->arrived);
}

static void *work(void *argument) {
  im_reader *reader = argument;
  pthread_mutex_lock(&reader->lock);
  for (;;) {
    while (!reader->closing && !reader->urgent.count && (!reader->idle.count || reader->ahead))
      pthread_cond_wait(&reader->asked, &reader->lock);
    if (reader->closing) break;
    int urgent = reader->urgent.count > 0, dropped = 0;
    const int ahead = !urgent;
    const int64_t most = piece_of(reader);
    uint32_t turn = reader->turn;
    reader->ahead |= ahead;
    im_read r = pop(urgent ? &reader->urgent : &reader->idle, reader->room);
    if (!reader->report.under_way++) reader->busy_since = now_ns();
    int failure = 0, error = 0, whole;
    do {
      const int64_t left = length(&r) - r.begun, piece = urgent || left < most ? left : most;
      const int64_t until = due(reader, piece, now_ns());
      pthread_mutex_unlock(&reader->lock);
      failure = fetch(&r, piece, &error);
      whole = piece == left;
      if (whole && !failure) failure = check(&r);
      if (until) sleep_until(until);
      pthread_mutex_lock(&reader->lock);
      reader->report.bytes += piece;
      if (!urgent && r.wanted && !whole && !failure && turn != reader->turn) {  // now it is known whether it was right
        turn = reader->turn;
        urgent = __atomic_load_n(r.wanted, __ATOMIC_RELAXED) > r.least;
        dropped = !urgent;
      }
    } while (!whole && !failure && !dropped && (urgent || !reader->urgent.count) && !reader->closing);
    if (!--reader->report.under_way) reader->report.busy_ns += now_ns() - reader->busy_since;
    if (ahead) {
      reader->ahead = 0;
      if (reader->idle.count) pthread_cond_signal(&reader->asked);
    }
    if (dropped) {
      reader->report.dropped += r.begun;
      reader->done[reader->n_done++] = -1 - r.tag;
      reader->arrivals++;
      pthread_cond_broadcast(&reader->arrived);
    } else if (whole || failure) {
      finish(reader, &r, failure, error);
    } else {
      push_front(&reader->idle, &r, reader->room);
    }
  }
  pthread_mutex_unlock(&reader->lock);
  return NULL;
}

static int outstanding(const im_reader *r) {
  return r->urgent.count + r->idle.count + r->report.under_way + r->n_done;
}

int im_reader_ask(im_reader *reader, const im_read *reads, int n, int urgent) {
  pthread_mutex_lock(&reader->lock);
  queue *q = urgent ? &reader->urgent : &reader->idle;
  int taken = 0;
  for (; taken < n && outstanding(reader) < reader->room; taken++) {
    q->at[(q->first + q->count++) % reader->room] = reads[taken];
    reader->report.dropped -= reads[taken].begun;
  }
  pthread_cond_broadcast(&reader->asked);
  pthread_mutex_unlock(&reader->lock);
  return taken;
}

int im_reader_withdraw(im_reader *reader, im_read *reads) {
  pthread_mutex_lock(&reader->lock);
  int n = 0;
  while (reader->idle.count) {
    reads[n] = pop(&reader->idle, reader->room);
    reader->report.dropped += reads[n].begun;
    reader->report.withdrawn += !reads[n++].begun;
  }
  reader->turn++;
  pthread_mutex_unlock(&reader->lock);
  return n;
}

int im_reader_done(im_reader *reader, int32_t *tags, int room) {
  pthread_mutex_lock(&reader->lock);
  const int n = reader->n_done < room ? reader->n_done : room;
  memcpy(tags, reader->done, (size_t)n * sizeof *tags);
  reader->n_done -= n;
  memmove(reader->done, reader->done + n, (size_t)reader->n_done * sizeof *tags);
  pthread_mutex_unlock(&reader->lock);
  return n;
}

void im_reader_reports(im_reader *reader, im_reader_report *report) {
  pthread_mutex_lock(&reader->lock);
  *report = reader->report;
  report->waiting = reader->urgent.count + reader->idle.count;
  pthread_mutex_unlock(&reader->lock);
}

uint32_t im_reader_arrivals(im_reader *reader) {
  pthread_mutex_lock(&reader->lock);
  const uint32_t found = reader->arrivals;
  pthread_mutex_unlock(&reader->lock);
  return found;
}

int im_reader_busy(im_reader *reader) {
  pthread_mutex_lock(&reader->lock);
  const int found = reader->urgent.count + reader->idle.count + reader->report.under_way > 0;
  pthread_mutex_unlock(&reader->lock);
  return found;
}

int im_reader_wait(im_reader *reader, uint32_t seen, int64_t timeout_ns) {
  const int64_t until = now_ns() + timeout_ns;
  const struct timespec t = {until / 1000000000, until % 1000000000};
  pthread_mutex_lock(&reader->lock);
  int late = 0;
  while (reader->arrivals == seen && late != ETIMEDOUT)
    late = pthread_cond_timedwait(&reader->arrived, &reader->lock, &t);
  const int arrived = reader->arrivals != seen;
  pthread_mutex_unlock(&reader->lock);
  return arrived;
}

im_reader *im_reader_new(int threads, int room, double bytes_per_second) {
  im_reader *r = calloc(1, sizeof *r);
  if (!r) return NULL;
  pthread_condattr_t steady;
  pthread_condattr_init(&steady);
  pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
  pthread_mutex_init(&r->lock, NULL);
  pthread_cond_init(&r->asked, NULL);
  pthread_cond_init(&r->arrived, &steady);
  pthread_condattr_destroy(&steady);
  r->room = room;
  r->bytes_per_second = bytes_per_second;
  r->owner = getpid();
  r->urgent.at = calloc((size_t)room, sizeof *r->urgent.at);
  r->idle.at = calloc((size_t)room, sizeof *r->idle.at);
  r->done = calloc((size_t)room, sizeof *r->done);
  r->handles = calloc((size_t)threads, sizeof *r->handles);
  if (!r->urgent.at || !r->idle.at || !r->done || !r->handles) {
    im_reader_free(r);
    return NULL;
  }
  for (; r->threads < threads; r->threads++)
    if (pthread_create(&r->handles[r->threads], NULL, work, r)) {
      im_reader_free(r);
      return NULL;
    }
  return r;
}

void im_reader_free(im_reader *r) {
  if (!r) return;
  if (r->owner == getpid()) {  // a forked child has none of these threads
    pthread_mutex_lock(&r->lock);
    r->closing = 1;
    pthread_cond_broadcast(&r->asked);
    pthread_mutex_unlock(&r->lock);
    for (int i = 0; i < r->threads; i++) pthread_join(r->handles[i], NULL);
  }
  free(r->urgent.at);
  free(r->idle.at);
  free(r->done);
  free(r->handles);
  free(r);
}
