#define _GNU_SOURCE
#include "store.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

// Memory for planes of one size: a run of addresses as long as the whole budget. Memory stands behind a place only
// while it is taken, or was and is not needed for another size yet. So nothing has to be moved, however sizes change.
typedef struct {
  int64_t bytes, size;  // of a plane, and of the pages that it takes
  size_t length;        // of the run
  char *run;
  int32_t given, n_spare, n_bare;  // places used at least once; free ones with memory behind them, and without
  int32_t *spare, *bare;
} places;

enum { VICTIMS = 32, AGES = 1024, RANKS = 16, SIZES = 16, ASKS = 4 };
enum { LARGE = 262144 };  // planes of so many bytes are read one by one, so that two readers share an expert

typedef struct {
  float worth;
  int32_t cell, plane;
} victim;

struct im_store {
  im_stock stock;
  im_reader *reader;
  places sizes[SIZES];
  int n_sizes;
  int32_t *place;                // [cells][3]
  uint8_t *checked, *under_way;  // [cells] planes that were compared with their checksums; reads
  uint8_t *early;                // [cells] planes read ahead
  int32_t *ahead;                // [cells] 1 + rank in the list it was read ahead by, 0: it was not
  float decay[AGES];
  victim victims[VICTIMS];       // the one to leave first is the last
  int n_victims;
  float tried[RANKS], right[RANKS];  // of reads ahead by rank, of late
  int32_t *tags, ahead_layer;
  im_read *back;                 // [3 cells] reads ahead that were taken back
  im_read asks[ASKS];            // that the reader is still to be told of
  int n_asks;
  im_store_report report;
};

// ---- memory
static places *places_of(im_store *s, int64_t bytes) {
  int i = 0;
  while (s->sizes[i].bytes != bytes) i++;
  return &s->sizes[i];
}

static void strip(im_store *s, places *p) {
  const int32_t place = p->spare[--p->n_spare];
  madvise(p->run + place * p->size, (size_t)p->size, MADV_DONTNEED);
  p->bare[p->n_bare++] = place;
  s->report.resident -= p->size;
}

// a place, or -1 when the budget is spent; `stripping`: spare ones of other sizes may give their memory back
static int32_t take(im_store *s, places *p, int stripping) {
  if (p->n_spare) return p->spare[--p->n_spare];
  for (int i = 0; i < s->n_sizes && stripping; i++)
    while (s->sizes[i].n_spare && s->report.resident + p->size > s->stock.budget) strip(s, &s->sizes[i]);
  if (s->report.resident + p->size > s->stock.budget) return -1;
  s->report.resident += p->size;
  if (s->report.resident > s->report.most) s->report.most = s->report.resident;
  return p->n_bare ? p->bare[--p->n_bare] : p->given++;
}

static void release(im_store *s, int cell, int plane) {
  places *p = places_of(s, s->stock.shelves[cell / s->stock.n_experts].bytes[plane]);
  p->spare[p->n_spare++] = s->place[3 * cell + plane];
}

// ---- eviction
static int ready(const im_expert *x) {
  const int32_t present = __atomic_load_n(&x->present, __ATOMIC_ACQUIRE);
  return present < 0 ? 0 : !(present & 1) ? 0 : !(present & 2) ? 1 : !(present & 4) ? 2 : 3;
}

static float worth(const im_store *s, const im_use *use, int plane, int step) {
  if (s->stock.policy == IM_LRU) return (float)use->last[plane];
  if (s->stock.policy == IM_LFU) return (float)use->count[plane];
  const int age = step - use->last[plane];
  return use->rate[plane] * s->decay[age < 0 ? 0 : age < AGES ? age : AGES - 1];
}

static int leaves_before(const victim *a, const victim *b) {  // of the same expert the higher plane goes first
  return a->worth != b->worth ? a->worth < b->worth : a->cell != b->cell ? a->cell < b->cell : a->plane > b->plane;
}

// Planes of an expert that may not leave: those that its layer still has to compute. When nothing else is left, they
// may if others of them are not even asked for: else the first planes of many could keep each of them from the rest.
static int kept(const im_store *s, int cell, int desperate) {
  const int wanted = s->stock.uses[cell].wanted;
  return desperate > 1 && s->stock.cells[cell].asked < wanted ? 0 : wanted;
}

// The planes of the least worth; those read ahead for a layer that is still to come only where nothing else is left.
static void choose(im_store *s, int step, int desperate) {
  const int cells = s->stock.n_layers * s->stock.n_experts;
  victim *v = s->victims;
  int n = 0;
  for (int c = 0; c < cells; c++) {
    if (s->under_way[c] || (s->ahead[c] && !desperate)) continue;
    const int held = ready(&s->stock.cells[c]);
    for (int plane = held - 1; plane >= kept(s, c, desperate); plane--) {
      const victim one = {worth(s, &s->stock.uses[c], plane, step), c, plane};
      if (n == VICTIMS && !leaves_before(&one, &v[0])) continue;
      int at = n < VICTIMS ? n++ : 0;
      if (n == VICTIMS && at == 0) {  // the last to leave makes room
        for (; at + 1 < n && leaves_before(&one, &v[at + 1]); at++) v[at] = v[at + 1];
      } else {
        for (; at && leaves_before(&v[at - 1], &one); at--) v[at] = v[at - 1];
      }
      v[at] = one;
    }
  }
  s->n_victims = n;
}

static void evict(im_store *s, const victim *v, int desperate) {
  im_expert *x = &s->stock.cells[v->cell];
  if (s->under_way[v->cell] || kept(s, v->cell, desperate) > v->plane) return;  // since it was chosen
  for (int plane = x->asked - 1; plane >= v->plane; plane--) {  // those above are of no use without it
    __atomic_fetch_and(&x->present, ~(1 << plane), __ATOMIC_RELEASE);
    release(s, v->cell, plane);
    s->report.evicted++;
  }
  if (x->asked > v->plane) x->asked = v->plane;
  s->ahead[v->cell] = 0;
}

// Whoever leaves mostly leaves with planes of all sizes: memory changes its size only where that does not help.
static int32_t room(im_store *s, places *p, int step, int urgent) {
  for (int desperate = 0, left = 0;;) {
    int32_t place = take(s, p, left >= 3);
    if (place >= 0) return place;
    if (!s->n_victims) choose(s, step, desperate);
    if (s->n_victims) {
      evict(s, &s->victims[--s->n_victims], desperate);
      left++;
      continue;
    }
    if ((place = take(s, p, 1)) >= 0) return place;
    if (desperate == urgent) return -1;
    desperate++;
  }
}

// ---- reads
static void point(im_store *s, int cell, int plane) {
  const im_shelf *shelf = &s->stock.shelves[cell / s->stock.n_experts];
  const places *p = places_of(s, shelf->bytes[plane]);
  const char *address = p->run + s->place[3 * cell + plane] * p->size;
  for (int i = 0; i < shelf->n_fields[plane]; i++) {
    const void *to = address + shelf->fields[plane][2 * i + 1];
    memcpy((char *)&s->stock.cells[cell] + 8 * (size_t)shelf->fields[plane][2 * i], &to, sizeof to);
  }
}

// Tells the reader of several at once: each time wakes its threads.
static void flush(im_store *s, int urgent) {
  if (s->n_asks) im_reader_ask(s->reader, s->asks, s->n_asks, urgent);
  s->n_asks = 0;
}

// Reads planes [first, end) of an expert, whose places are taken.
static void ask(im_store *s, int cell, int first, int end, int urgent) {
  const im_shelf *shelf = &s->stock.shelves[cell / s->stock.n_experts];
  const int expert = cell % s->stock.n_experts;
  im_read r = {.file = shelf->file, .drop = shelf->drop, .expert = &s->stock.cells[cell]};
  r.tag = (cell * 3 + first) * 4 + end - first;
  r.offset = shelf->start + expert * shelf->record_bytes;
  for (int plane = 0; plane < first; plane++) r.offset += shelf->bytes[plane];
  for (int plane = first; plane < end; plane++) {
    const places *p = places_of(s, shelf->bytes[plane]);
    r.to[plane] = p->run + s->place[3 * cell + plane] * p->size;
    r.bytes[plane] = shelf->bytes[plane];
    r.checksum[plane] = shelf->checksums[3 * expert + plane];
    if (!(s->checked[cell] >> plane & 1)) r.check |= 1 << plane;
  }
  r.wanted = &s->stock.uses[cell].wanted;
  r.least = first;
  s->under_way[cell]++;
  s->report.read += end - first;
  s->asks[s->n_asks++] = r;
  if (s->n_asks == ASKS) flush(s, urgent);
}

// Sees to it that an expert's planes are on their way; 0 when there is no room for all of them.
static int fetch(im_store *s, int step, int cell, int planes, int urgent) {
  const im_shelf *shelf = &s->stock.shelves[cell / s->stock.n_experts];
  im_expert *x = &s->stock.cells[cell];
  const int first = x->asked;
  int plane = first;
  s->under_way[cell]++;  // so that its own planes do not make room for each other
  for (int32_t place = 0; plane < planes && place >= 0; plane += place >= 0)
    if ((place = room(s, places_of(s, shelf->bytes[plane]), step, urgent)) >= 0) s->place[3 * cell + plane] = place;
  s->under_way[cell]--;
  if (plane < planes) {
    while (--plane >= first) release(s, cell, plane);
    return 0;
  }
  for (plane = first; plane < planes; plane++) point(s, cell, plane);
  x->asked = planes;
  for (plane = first; plane < planes;) {
    const int end = shelf->bytes[plane] < LARGE || !urgent ? planes : plane + 1;
    ask(s, cell, plane, end, urgent);
    plane = end;
  }
  return 1;
}

// A guess that failed counts for nothing: it is read anew where it is wanted.
static void forgive(im_store *s, int cell) {
  im_expert *x = &s->stock.cells[cell];
  if (x->present >= 0 || s->under_way[cell] || (s->stock.uses[cell].wanted && !s->ahead[cell])) return;
  for (int plane = 0; plane < x->asked; plane++) release(s, cell, plane);
  x->asked = s->ahead[cell] = s->checked[cell] = s->early[cell] = 0;
  __atomic_store_n(&x->present, 0, __ATOMIC_RELEASE);
}

// A read ahead will not arrive: its planes give back their places, and those above are of no use without them.
static void drop(im_store *s, int tag, int begun) {
  const int cell = tag / 12, first = tag / 4 % 3, count = tag % 4;
  im_expert *x = &s->stock.cells[cell];
  s->under_way[cell]--;
  s->report.read -= count;
  s->report.read_ahead -= count;
  s->early[cell] &= (uint8_t)~(((1 << count) - 1) << first);
  if (s->under_way[cell]) {  // a layer gave up in the middle, and the planes above are still on their way
    ask(s, cell, first, first + count, 1);
    flush(s, 1);
    return;
  }
  for (int plane = x->asked - 1; plane >= first; plane--) {
    if (x->present >= 0) __atomic_fetch_and(&x->present, ~(1 << plane), __ATOMIC_RELEASE);
    release(s, cell, plane);
  }
  if (x->asked > first) x->asked = first;
  if (s->ahead[cell] && !begun) s->tried[s->ahead[cell] - 1] -= 1.f;  // it was not tried
  s->ahead[cell] = 0;
  forgive(s, cell);
}

static void collect(im_store *s) {
  for (int n; (n = im_reader_done(s->reader, s->tags, 256)) > 0;)
    for (int i = 0; i < n; i++) {
      const int tag = s->tags[i], cell = tag / 12, first = tag / 4 % 3, count = tag % 4;
      if (tag < 0) {
        drop(s, -1 - tag, 1);
        continue;
      }
      s->under_way[cell]--;
      if (s->stock.cells[cell].present >= 0)
        for (int plane = first; plane < first + count; plane++) s->checked[cell] |= (uint8_t)(1 << plane);
      forgive(s, cell);
    }
}

// Takes back what was to be read ahead. What has begun and is wanted goes on at once; all else is dropped.
static void take_back(im_store *s) {
  const int n = im_reader_withdraw(s->reader, s->back);
  for (int i = 0; i < n; i++) {
    const im_read *r = &s->back[i];
    if (r->begun && *r->wanted > r->least) im_reader_ask(s->reader, r, 1, 1);
    else drop(s, r->tag, r->begun > 0);
  }
}

// The layers up to `layer` are there: what was read ahead for them and not taken was read in vain.
static void settle(im_store *s, int layer) {
  if (s->ahead_layer < 0 || s->ahead_layer == layer + 1) return;
  const size_t n = (size_t)s->stock.n_experts;
  memset(s->ahead + (size_t)s->ahead_layer * n, 0, n * sizeof *s->ahead);
  s->ahead_layer = -1;
}

// Whether reading ahead what stands at this place of the list was mostly right of late; now and then it is tried anew.
static int pays(im_store *s, int rank) {
  if (s->tried[rank] > 64) {
    s->tried[rank] *= 0.5f;
    s->right[rank] *= 0.5f;
  }
  if (s->tried[rank] < 8 || s->right[rank] > 0.4f * s->tried[rank]) return 1;
  s->tried[rank] *= 0.999f;
  s->right[rank] = s->right[rank] * 0.999f + 0.0005f;
  return 0;
}

int im_store_small(const im_store *s) {
  int64_t most = 0;
  for (int i = 0; i < s->n_sizes; i++) most = s->sizes[i].bytes > most ? s->sizes[i].bytes : most;
  return most < LARGE;
}

void im_store_taken(im_store *s, int layer, int expert, int planes) {
  const int cell = layer * s->stock.n_experts + expert;
  if (!s->ahead[cell]) return;
  s->right[s->ahead[cell] - 1] += 1.f;
  s->report.taken_ahead += __builtin_popcount(s->early[cell] & ((1 << planes) - 1));
  s->ahead[cell] = 0;
}

void im_store_begin(im_store *s) {
  collect(s);
  take_back(s);
}

int im_store_want(im_store *s, int step, int layer, const im_wanted *wanted, int n, const im_wanted *foreseen,
                  int n_foreseen) {
  settle(s, layer);
  s->n_victims = 0;
  int found = 0;
  for (int i = 0; i < n; i++) {
    const int cell = layer * s->stock.n_experts + wanted[i].expert;
    found += fetch(s, step, cell, wanted[i].planes, found ? 1 : 2);
  }
  flush(s, 1);
  if (found < n) return found;
  const int most = s->stock.ahead < RANKS ? s->stock.ahead : RANKS;
  for (int i = 0; i < n_foreseen && i < most; i++) {
    const int cell = (layer + 1) * s->stock.n_experts + foreseen[i].expert;
    if (!pays(s, i)) continue;
    const int before = s->stock.cells[cell].asked;
    if (!fetch(s, step, cell, foreseen[i].planes, 0)) break;
    s->ahead[cell] = i + 1;
    s->early[cell] = (uint8_t)(((1 << foreseen[i].planes) - 1) & ~((1 << before) - 1));
    s->ahead_layer = layer + 1;
    s->tried[i] += 1.f;
    s->report.read_ahead += foreseen[i].planes - before;
  }
  flush(s, 0);
  return found;
}

void im_store_reports(const im_store *s, im_store_report *report) { *report = s->report; }

static int add_size(im_store *s, int64_t bytes) {
  for (int i = 0; i < s->n_sizes; i++)
    if (s->sizes[i].bytes == bytes) return 1;
  if (s->n_sizes == SIZES) return 0;
  places *p = &s->sizes[s->n_sizes++];
  const int64_t page = sysconf(_SC_PAGESIZE);
  p->bytes = bytes;
  p->size = (bytes + page - 1) / page * page;
  const size_t count = (size_t)(s->stock.budget / p->size) + 1;
  p->length = count * (size_t)p->size;
  p->spare = calloc(count, sizeof *p->spare);
  p->bare = calloc(count, sizeof *p->bare);
  void *run = mmap(NULL, p->length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (run == MAP_FAILED) return 0;
  p->run = run;
#if defined(MADV_HUGEPAGE)
  // With small pages every second megabyte of weights costs a walk through page tables. A large page more than what is
  // taken must not count in the budget.
  if (s->stock.budget >= IM_HUGE_FROM) madvise(run, p->length, MADV_HUGEPAGE);
#endif
  return p->spare && p->bare;
}

im_store *im_store_new(const im_stock *stock, im_reader *reader) {
  im_store *s = calloc(1, sizeof *s);
  if (!s) return NULL;
  const size_t cells = (size_t)stock->n_layers * (size_t)stock->n_experts;
  s->stock = *stock;
  s->reader = reader;
  s->ahead_layer = -1;
  s->place = calloc(3 * cells, sizeof *s->place);
  s->checked = calloc(cells, 1);
  s->under_way = calloc(cells, 1);
  s->early = calloc(cells, 1);
  s->ahead = calloc(cells, sizeof *s->ahead);
  s->tags = calloc(3 * cells + 256, sizeof *s->tags);
  s->back = calloc(3 * cells + 1, sizeof *s->back);
  int fine = s->place && s->checked && s->under_way && s->early && s->ahead && s->tags && s->back;
  for (int i = 0; i < stock->n_layers && fine; i++)
    for (int plane = 0; plane < stock->shelves[i].n_planes && stock->shelves[i].file >= 0 && fine; plane++)
      fine = add_size(s, stock->shelves[i].bytes[plane]);
  for (int age = 0; age < AGES; age++) s->decay[age] = im_exp(-0.6931472f * (float)age / stock->half_life);
  if (fine) return s;
  im_store_free(s);
  return NULL;
}

void im_store_free(im_store *s) {
  if (!s) return;
  for (int i = 0; i < s->n_sizes; i++) {
    if (s->sizes[i].run) munmap(s->sizes[i].run, s->sizes[i].length);
    free(s->sizes[i].spare);
    free(s->sizes[i].bare);
  }
  free(s->place);
  free(s->checked);
  free(s->under_way);
  free(s->early);
  free(s->ahead);
  free(s->tags);
  free(s->back);
  free(s);
}
