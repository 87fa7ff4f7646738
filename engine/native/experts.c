// A mixture of experts: route, ask for what is not in memory, compute each expert as it arrives, add in rank order.
#include <time.h>

#include "step.h"

enum { NOTHING_LEFT, READY, MISSING, LOST };

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// leading planes in memory; below 0 when one of them cannot be read
static int planes_ready(const im_expert *x) {
  const int32_t present = __atomic_load_n(&x->present, __ATOMIC_ACQUIRE);
  return present < 0 ? -1 : !(present & 1) ? 0 : !(present & 2) ? 1 : !(present & 4) ? 2 : 3;
}

static void narrow(im_matrix *m, int planes) {
  if (m->format < IM_N2) return;
  if (planes == 1 && m->format != IM_N2) m->scales = m->mins;
  if (IM_N2 + planes - 1 < m->format) m->format = IM_N2 + planes - 1;
}

static im_expert with_planes(const im_expert *x, int planes) {
  im_expert some = {x->gate, x->up, x->down, x->gate_bias, x->up_bias, x->down_bias, 0, 0};  // the rest may change
  narrow(&some.gate, planes);
  narrow(&some.up, planes);
  narrow(&some.down, planes);
  return some;
}

// ---- what the layer wants
// The planes that rows want of each expert go to its `wanted`.
static void want(im_engine *e, const im_part *p, const im_layer *l, int layer, const routes *r, const int32_t *active,
                 int count) {
  for (int x = 0; x < p->n_experts; x++) l->use[x].wanted = 0;
  for (int i = 0; i < count; i++)
    for (int k = 0; k < p->top_k; k++) {
      const size_t at = (size_t)active[i] * (size_t)p->top_k + (size_t)k;
      im_use *use = &l->use[r->chosen[at]];
      if (r->planes[at] > use->wanted) use->wanted = r->planes[at];
    }
  if (p->store) im_store_begin(p->store);  // which looks at what is wanted
  for (int x = 0; x < p->n_experts; x++) {
    const int ready = planes_ready(&l->experts[x]);
    if (p->store && l->use[x].wanted) im_store_taken(p->store, layer, x, l->use[x].wanted);
    for (int plane = 0; plane < l->use[x].wanted; plane++) {
      im_use *use = &l->use[x];
      const float age = (float)(e->steps - use->last[plane]);
      use->rate[plane] = 1.f + use->rate[plane] * im_exp(-0.6931472f * age / p->half_life);
      use->last[plane] = e->steps;
      use->count[plane]++;
      l->traffic->taken[plane]++;
      l->traffic->missed[plane] += plane >= ready;
      l->traffic->late[plane] += plane >= ready && plane < l->experts[x].asked;
    }
  }
}

// What rows want of a layer's experts and is not asked for, by the sum of their weights, the largest first: how many.
static int name_missing(const im_part *p, const im_layer *l, const routes *to, const int32_t *active, int count,
                        int left_over, im_wanted *found) {
  float sum[p->n_experts];
  int most[p->n_experts], n = 0;
  memset(sum, 0, sizeof sum);
  memset(most, 0, sizeof most);
  for (int i = 0; i < count; i++)
    for (int k = 0; k < p->top_k; k++) {
      const size_t at = (size_t)active[i] * (size_t)p->top_k + (size_t)k;
      const int x = to->chosen[at];
      sum[x] += to->weights[at];
      if (to->planes[at] > most[x]) most[x] = to->planes[at];
    }
  for (int x = 0; x < p->n_experts; x++) {
    if (most[x] <= l->experts[x].asked || (left_over && !l->use[x].wanted)) continue;
    int at = n++;
    for (; at && sum[found[at - 1].expert] < sum[x]; at--) found[at] = found[at - 1];
    found[at] = (im_wanted){x, most[x]};
  }
  return n;
}

// ---- what is computed next
// waits for something to arrive; 0 when nothing does
static int await_since(im_engine *e, const im_part *p, uint32_t seen) {
  if (!p->reader) return 0;
  const int64_t start = now_ns();
  const int arrived = im_reader_wait(p->reader, seen, p->patience_ns);
  e->waited_ns += now_ns() - start;
  return arrived;
}

// waits for something to arrive after `seen`; 0 when nothing is coming
static int await(im_engine *e, const im_part *p, uint32_t seen) {
  if (!p->reader || (!im_reader_busy(p->reader) && im_reader_arrivals(p->reader) == seen)) return 0;
  return await_since(e, p, seen);
}

static int next_wave(im_engine *e, const im_part *p, const im_layer *l) {
  for (;;) {
    const uint32_t seen = p->reader ? im_reader_arrivals(p->reader) : 0;
    int coming = 0, absent = 0;
    e->n_wave = 0;
    for (int x = 0; x < p->n_experts; x++) {
      if (!l->use[x].wanted) continue;
      const int ready = planes_ready(&l->experts[x]);
      if (ready < 0) return LOST;
      if (ready >= l->use[x].wanted) e->wave[e->n_wave++] = x;
      else if (l->experts[x].asked >= l->use[x].wanted) coming++;
      else absent++;
    }
    // Small experts are computed faster than threads are woken for each.
    if (e->n_wave && !(coming && !absent && p->store && im_store_small(p->store))) return READY;
    if (!coming) return absent ? MISSING : NOTHING_LEFT;
    if (!await_since(e, p, seen)) return LOST;
  }
}

// ---- one row: its experts side by side, three barriers for all of them
typedef struct {
  im_expert x;
  int rank;
} taken;

static void one_row(walker *w, const im_part *p, const im_layer *l, const int32_t *active, const im_acts *acts) {
  im_engine *e = w->e;
  const int stride = im_pad(p->d_expert, 32), width = im_pad(p->d_expert, 16), d_pad = e->w.d_pad;
  const size_t row = (size_t)active[0] * (size_t)p->top_k, panel = im_panels_bytes(1, stride, 0);
  taken t[p->top_k];
  int n = 0;
  for (int i = 0; i < e->n_wave; i++)
    for (int r = 0; r < p->top_k; r++)
      if (e->now.chosen[row + (size_t)r] == e->wave[i]) {
        t[n++] = (taken){with_planes(&l->experts[e->wave[i]], e->now.planes[row + (size_t)r]), r};
      }
  float *g = e->shared.gate, *u = e->up;
  const int blocks = width / 16, all = n * blocks;
  for (int b = all * w->thread / e->threads, end = all * (w->thread + 1) / e->threads; b < end;) {
    const int i = b / blocks, b0 = b % blocks, b1 = end - i * blocks < blocks ? end - i * blocks : blocks;
    float *gi = g + (size_t)i * stride, *ui = u + (size_t)i * stride;
    e->k->linear(&t[i].x.gate, acts, 1, gi, (size_t)stride, b0, b1);
    e->k->linear(&t[i].x.up, acts, 1, ui, (size_t)stride, b0, b1);
    im_gate_row(e, p, &t[i].x, gi, ui, b0, b1);
    if (b1 == blocks && width < stride) memset(gi + width, 0, (size_t)(stride - width) * 4);
    b += b1 - b0;
  }
  meet(w);
  if (is_quantized(&l->experts[e->wave[0]].down)) {
    const int groups = stride / 32, every = n * groups;
    for (int j = every * w->thread / e->threads; j < every * (w->thread + 1) / e->threads; j++)
      e->k->quantize(g + (size_t)(j / groups) * stride + 32 * (j % groups), 32, 0,
                     e->hidden_panels + (size_t)(j / groups) * panel + (size_t)(j % groups) * IM_GROUP, IM_GROUP);
    meet(w);
  }
  const int down = im_pad(p->d_model, 16) / 16, total = n * down;
  for (int b = total * w->thread / e->threads, end = total * (w->thread + 1) / e->threads; b < end;) {
    const int i = b / down, b0 = b % down, b1 = end - i * down < down ? end - i * down : down;
    const im_acts hidden = {g + (size_t)i * stride, e->hidden_panels + (size_t)i * panel, stride, 0};
    float *to = e->kept + (size_t)t[i].rank * d_pad;
    e->k->linear(&t[i].x.down, &hidden, 1, to, (size_t)d_pad, b0, b1);
    if (t[i].x.down_bias) e->k->add(to + 16 * b0, t[i].x.down_bias + 16 * b0, 16 * (b1 - b0));
    b += b1 - b0;
  }
}

// ---- many rows: one expert after the other
static int goes(const im_engine *e, const im_part *p, const int32_t *active, int i, int r, int expert, int planes) {
  const size_t at = (size_t)active[i] * (size_t)p->top_k + (size_t)r;
  return e->now.chosen[at] == expert && e->now.planes[at] == planes;
}

// the rows among `count` that take `planes` planes of the expert: their activations, or only how many
static int gather(walker *w, const im_part *p, const int32_t *active, int count, int expert, int planes,
                  const im_acts *from, lane *to, int rows) {
  im_engine *e = w->e;
  const int stride = from->stride;
  int n = 0;
  for (int i = 0; i < count; i++)
    for (int r = 0; r < p->top_k; r++) {
      if (!goes(e, p, active, i, r, expert, planes)) continue;
      if (to && n % e->threads == w->thread) {
        size_t its, step;
        const uint8_t *panel = from->panels + im_panel_at(i, count, stride, 0, &its);
        uint8_t *target = to->panels + im_panel_at(n, rows, stride, 0, &step);
        memcpy(to->normed + (size_t)n * stride, from->x + (size_t)i * stride, (size_t)stride * 4);
        for (int g = 0; g < stride / 32; g++) memcpy(target + g * step, panel + g * its, IM_GROUP);
      }
      n++;
    }
  return n;
}

static void many_rows(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count,
                      const im_acts *acts, int expert, int planes) {
  im_engine *e = w->e;
  const int d_pad = e->w.d_pad, rows = gather(w, p, active, count, expert, planes, acts, NULL, 0);
  if (!rows) return;
  lane *gathered = &e->own[e->threads], *before = w->l, hidden = *gathered;
  gather(w, p, active, count, expert, planes, acts, gathered, rows);
  meet(w);
  const im_expert x = with_planes(&l->experts[expert], planes);
  const im_acts its = acts_of(gathered, gathered->normed, d_pad, 0);
  hidden.panels = (uint8_t *)gathered->attention;  // 4 bytes an activation, of which panels take at most 4
  w->l = &hidden;
  im_gated_mlp(w, p, &x, &its, rows, e->shared.delta);
  w->l = before;
  for (int i = 0, n = 0; i < count; i++)
    for (int r = 0; r < p->top_k; r++)
      if (goes(e, p, active, i, r, expert, planes)) {
        if (n % e->threads == w->thread)
          memcpy(e->kept + ((size_t)i * p->top_k + r) * d_pad, e->shared.delta + (size_t)n * d_pad, (size_t)d_pad * 4);
        n++;
      }
}

static void add_up(walker *w, const im_part *p, const int32_t *active, int count) {
  im_engine *e = w->e;
  const int d_pad = e->w.d_pad;
  for (int i = w->thread; i < count; i += e->threads) {
    float *row = e->shared.x + (size_t)active[i] * d_pad;
    const float *kept = e->kept + (size_t)i * p->top_k * d_pad;
    const size_t at = (size_t)active[i] * (size_t)p->top_k;
    for (int j = 0; j < p->d_model; j++) {
      float sum = 0;
      for (int r = 0; r < p->top_k; r++)
        if (e->now.planes[at + (size_t)r])
          sum += (p->unweighed ? 1.f : e->now.weights[at + (size_t)r]) * kept[(size_t)r * d_pad + j];
      row[j] += sum;
    }
  }
  meet(w);
}

// ---- routing
static int row_wants(const im_part *p, const routes *a, const routes *b, int row) {
  const size_t at = (size_t)row * (size_t)p->top_k;
  int same = 0;
  for (int k = 0; k < p->top_k; k++)
    for (int n = 0; n < p->top_k; n++) same += a->chosen[at + (size_t)k] == b->chosen[at + (size_t)n];
  return same;
}

static void copy_routes(const im_part *p, const routes *from, routes *to, int row) {
  const size_t at = (size_t)row * (size_t)p->top_k, bytes = (size_t)p->top_k * 4;
  memcpy(to->chosen + at, from->chosen + at, bytes);
  memcpy(to->planes + at, from->planes + at, bytes);
  memcpy(to->weights + at, from->weights + at, bytes);
}

static void write_down(const im_part *p, const routes *now, const routes *foreseen, int layer, int row, int position) {
  const im_record *r = p->record;
  if (position >= r->positions) return;
  const size_t k = (size_t)p->top_k, from = (size_t)row * k;
  const size_t to = ((size_t)position * (size_t)(p->end - p->start) + (size_t)(layer - p->start)) * k;
  memcpy(r->chosen + to, now->chosen + from, k * 4);
  memcpy(r->weights + to, now->weights + from, k * 4);
  memcpy(r->foreseen + to, (foreseen->layer[row] == layer ? foreseen : now)->chosen + from, k * 4);
}

// This layer's routes to `now`, and where they are asked for early, the next one's to `next`.
static void route(walker *w, const im_part *p, const im_layer *l, const im_layer *next, int layer,
                  const int32_t *active, int count, const im_acts *acts) {
  im_engine *e = w->e;
  const size_t ldy = (size_t)im_pad(p->n_experts, 16);
  if (next && p->pre_gate) {
    im_linear_targets(e, (target[]){{&next->router, e->next.logits, ldy}}, 1, acts, count, w->thread);
  } else if (next) {
    for (int i = w->thread; i < count; i += e->threads)
      norm_row(e, p, e->shared.x + (size_t)active[i] * e->w.d_pad, next->ffn_norm, next->ffn_norm_bias,
               e->next.x + (size_t)i * e->w.d_pad);
    meet(w);
    const im_acts ahead = acts_of(&e->shared, e->next.x, e->w.d_pad, 0);
    im_linear_targets(e, (target[]){{&next->router, e->next.logits, ldy}}, 1, &ahead, count, w->thread);
  }
  im_linear_targets(e, (target[]){{&l->router, e->now.logits, ldy}}, 1, acts, count, w->thread);
  meet(w);
  for (int i = w->thread; i < count; i += e->threads) {
    const int row = active[i];
    if (p->pre_gate && e->next.layer[row] == layer) copy_routes(p, &e->next, &e->now, row);
    else im_route(p, l, layer, &w->c->rows[row], e->now.logits + (size_t)i * ldy, &e->now, row, 0);
    if (e->next.layer[row] == layer) {
      __atomic_fetch_add(&l->traffic->foreseen, p->top_k, __ATOMIC_RELAXED);
      __atomic_fetch_add(&l->traffic->foreseen_right, row_wants(p, &e->next, &e->now, row), __ATOMIC_RELAXED);
    }
    if (p->record) write_down(p, &e->now, &e->next, layer, row, w->c->rows[row].position);
    if (!next) continue;
    im_route(p, next, layer + 1, &w->c->rows[row], e->next.logits + (size_t)i * ldy, &e->next, row, 1);
    e->next.layer[row] = layer + 1;
  }
  meet(w);
}

// What the layer lacks is asked for, and behind it what the next one will probably lack.
static int ask(im_engine *e, const im_part *p, const im_layer *l, const im_layer *next, int layer,
               const int32_t *active, int count, int first) {
  if (p->store && !first) im_store_begin(p->store);
  const int n = name_missing(p, l, &e->now, active, count, !first, e->wanted);
  const int ahead = first && next ? name_missing(p, next, &e->next, active, count, 0, e->foreseen) : 0;
  if (!n && !ahead) return 1;
  return p->store && im_store_want(p->store, e->steps, layer, e->wanted, n, e->foreseen, ahead) > 0;
}

// one thread decides for all what is computed next
static void decide(walker *w, const im_part *p, const im_layer *l, const im_layer *next, int layer,
                   const int32_t *active, int count, int first) {
  im_engine *e = w->e;
  if (first) ask(e, p, l, next, layer, active, count, 1);
  for (;;) {
    const uint32_t seen = p->reader ? im_reader_arrivals(p->reader) : 0;
    const int found = next_wave(e, p, l);
    if (found == LOST) break;
    if (found != MISSING) return;
    if (!ask(e, p, l, NULL, layer, active, count, 0) && !await(e, p, seen)) break;
  }
  for (int x = 0; x < p->n_experts; x++) l->use[x].wanted = 0;
  w->c->layer = layer;
  e->verdict = IM_NOT_READ;
}

// returns 0 to give up, with e->verdict: every thread sees the same
int im_experts(walker *w, const im_part *p, const im_layer *l, const im_layer *next, int layer, const int32_t *active,
               int count) {
  im_engine *e = w->e;
  const im_acts acts = acts_of(&e->shared, e->shared.normed, e->w.d_pad, 0);
  if (!(p->foresee || p->pre_gate) || (next && !next->experts)) next = NULL;
  im_ffn_norm(w, p, l, active, count, 1);
  route(w, p, l, next, layer, active, count, &acts);
  if (w->thread == 0) want(e, p, l, layer, &e->now, active, count);
  for (int first = 1;; first = 0) {
    if (w->thread == 0) decide(w, p, l, next, layer, active, count, first);
    meet(w);
    if (e->verdict != IM_DONE) return 0;
    if (!e->n_wave) break;
    if (count == 1) one_row(w, p, l, active, &acts);
    else
      for (int i = 0; i < e->n_wave; i++)
        for (int planes = 1; planes <= l->n_planes; planes++)
          many_rows(w, p, l, active, count, &acts, e->wave[i], planes);
    meet(w);
    if (w->thread == 0)
      for (int i = 0; i < e->n_wave; i++) l->use[e->wave[i]].wanted = 0;
  }
  add_up(w, p, active, count);
  if (p->d_shared) im_shared_expert(w, p, l, active, count);
  return 1;
}
