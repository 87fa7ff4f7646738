// Memory and bookkeeping of one call.
#include <stdlib.h>

#include "step.h"

static int max_int(int a, int b) { return a > b ? a : b; }

static void measure(im_engine *e, const im_step_call *c, int *context, size_t *logits) {
  widths w = {0};
  int far = 0;
  for (int i = 0; i < c->n_parts; i++) {
    const im_part *p = c->parts[i];
    w.d = p->d_model;
    w.d_pad = im_pad(p->d_model, 32);
    w.att_pad = im_pad(p->n_heads * head_out(p), 32);
    w.q_rows = im_pad(max_int(p->n_heads * (p->kv_rank ? p->head_nope + rotated(p) : p->head_dim), p->q_rank), 16);
    w.kv_rows = im_pad(p->n_kv_heads * p->head_dim, 16);
    w.qkv = w.q_rows + (p->kv_rank ? 1 : 2) * w.kv_rows;
    w.q_rank = im_pad(p->q_rank, 32);
    w.queries = p->kv_rank ? p->n_heads * p->head_dim : 0;
    w.latent = p->kv_rank ? im_pad(max_int(p->kv_rank, p->head_nope), 32) : 0;
    w.ff_pad = im_pad(max_int(max_int(p->d_ff, p->d_expert), p->d_shared), 32);
    w.vocab_pad = p->has_head ? im_pad(p->head.rows, 16) : 0;
    w.max_experts = max_int(w.max_experts, p->n_experts);
    w.top_k = max_int(w.top_k, p->top_k);
  }
  w.widest = max_int(max_int(w.d_pad, w.att_pad), w.ff_pad);
  *logits = 0;
  for (int i = 0; i < c->n_rows; i++) {
    far = max_int(far, c->rows[i].position);
    *logits += (c->rows[i].want & NEEDS_HEAD) != 0;
  }
  *context = im_pad(far + 1, 16) + 16;
  e->w = w;
}

typedef struct {
  char *at;
  size_t used;
} arena;
static void *carve(arena *a, size_t bytes) {
  void *p = a->at ? a->at + a->used : NULL;
  a->used += (bytes + 127) / 64 * 64;
  return p;
}

static void carve_lane(arena *a, lane *l, const widths *w, int rows) {
  l->x = carve(a, (size_t)rows * (size_t)w->d_pad * 4);
  l->normed = carve(a, (size_t)rows * (size_t)w->d_pad * 4);
  l->attention = carve(a, (size_t)rows * (size_t)w->widest * 4);
  l->gate = carve(a, (size_t)(rows > w->top_k ? rows : w->top_k) * (size_t)w->ff_pad * 4);
  l->delta = carve(a, (size_t)rows * (size_t)w->d_pad * 4);
  const size_t fine = im_panels_bytes(rows, max_int(w->d_pad, w->q_rank), 1);
  const size_t plain = im_panels_bytes(rows, w->widest, 0);
  l->panels = carve(a, fine > plain ? fine : plain);
}

static void carve_routes(arena *a, routes *r, const widths *w, size_t rows) {
  r->logits = carve(a, rows * (size_t)im_pad(w->max_experts, 16) * 4);
  r->x = carve(a, rows * (size_t)w->d_pad * 4);
  r->layer = carve(a, rows * 4);
  r->chosen = carve(a, rows * (size_t)w->top_k * 4);
  r->planes = carve(a, rows * (size_t)w->top_k * 4);
  r->weights = carve(a, rows * (size_t)w->top_k * 4);
}

static void carve_all(im_engine *e, arena *a, const im_step_call *c, int context, size_t logits) {
  const widths *w = &e->w;
  const size_t rows = (size_t)c->n_rows, wide = rows > (size_t)w->top_k ? rows : (size_t)w->top_k;
  const size_t head_rows = logits < HEAD_ROWS ? logits : HEAD_ROWS;
  carve_lane(a, &e->shared, w, c->n_rows > HEAD_ROWS ? c->n_rows : HEAD_ROWS);
  for (int t = 0; t < e->threads; t++) carve_lane(a, &e->own[t], w, 1);
  if (w->max_experts) carve_lane(a, &e->own[e->threads], w, c->n_rows * 1);
  e->qkv = carve(a, rows * (size_t)w->qkv * 4);
  e->up = carve(a, wide * (size_t)w->ff_pad * 4);
  e->lowered = carve(a, rows * (size_t)w->q_rank * 4);
  e->queries = carve(a, rows * (size_t)w->queries * 4);
  e->mixed = carve(a, rows * (size_t)w->queries * 4);
  for (int t = 0; t < e->threads; t++) {
    e->heads[t] = carve(a, rows * (size_t)w->latent * 4);
    e->head_panels[t] = carve(a, w->latent ? im_panels_bytes(c->n_rows, w->latent, 1) : 0);
    e->scores[t] = carve(a, (size_t)context * 16);
    e->gathered[t] = carve(a, (size_t)context / 4);
    e->candidates[t] = carve(a, head_rows ? (size_t)w->vocab_pad * sizeof(im_candidate) : 0);
  }
  e->logits = carve(a, head_rows * (size_t)w->vocab_pad * 4);
  e->rope = carve(a, rows * (size_t)c->parts[0]->head_dim * 4);
  e->sink_rope = carve(a, rows * (size_t)c->parts[0]->head_dim * 4);
  carve_routes(a, &e->now, w, w->max_experts ? rows : 0);
  carve_routes(a, &e->next, w, w->max_experts ? rows : 0);
  e->hidden_panels = carve(a, (size_t)w->top_k * im_panels_bytes(1, w->ff_pad, 0));
  e->wanted = carve(a, (size_t)w->max_experts * sizeof *e->wanted);
  e->foreseen = carve(a, (size_t)w->max_experts * sizeof *e->foreseen);
  e->wave = carve(a, (size_t)w->max_experts * 4);
  e->kept = carve(a, rows * (size_t)w->top_k * (size_t)w->d_pad * 4);
  e->logit_rows = carve(a, rows * 4);
  e->active = carve(a, (2 * rows + 1) * rows * 4);
  e->segments = carve(a, (2 * rows + 1) * sizeof(segment));
}

int im_prepare(im_engine *e, im_step_call *c) {
  int context;
  size_t logits;
  measure(e, c, &context, &logits);
  arena a = {NULL, 0};
  carve_all(e, &a, c, context, logits);
  if (a.used > e->capacity) {
    free(e->memory);
    e->capacity = 0;
    e->memory = aligned_alloc(64, (a.used + a.used / 4 + 4095) / 4096 * 4096);
    if (!e->memory) return IM_NO_MEMORY;
    e->capacity = (a.used + a.used / 4 + 4095) / 4096 * 4096;
  }
  a = (arena){e->memory, 0};
  carve_all(e, &a, c, context, logits);
  // padding that no kernel writes must be zero where a linear map reads it
  const widths *w = &e->w;
  const int att = c->parts[0]->n_heads * head_out(c->parts[0]);
  if (att < w->att_pad)
    for (int i = 0; i < c->n_rows; i++)
      memset(e->shared.attention + (size_t)i * w->att_pad + att, 0, (size_t)(w->att_pad - att) * 4);
  if (w->d_pad > im_pad(w->d, 16)) {
    memset(e->shared.normed, 0, (size_t)max_int(c->n_rows, HEAD_ROWS) * (size_t)w->d_pad * 4);
    if (w->max_experts) memset(e->next.x, 0, (size_t)c->n_rows * (size_t)w->d_pad * 4);
    for (int t = 0; t < e->threads; t++) memset(e->own[t].normed, 0, (size_t)w->d_pad * 4);
  }
  for (int i = 0; i < (w->max_experts ? c->n_rows : 0); i++) e->next.layer[i] = -1;
  e->n_logit_rows = 0;
  const im_part *last = c->parts[c->n_parts - 1];
  for (int i = 0; i < c->n_rows; i++)
    if (c->rows[i].want & NEEDS_HEAD) {
      if (!last->has_head || c->rows[i].leave != last->end) return IM_BAD_ROW;
      e->logit_rows[e->n_logit_rows++] = i;
    }
  return IM_DONE;
}

static int ascending(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

// By exponents, which compilers turn into vectors.
static int all_finite(const float *x, size_t n) {
  uint32_t bad = 0;
  for (size_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !bad;
}

int im_plan_segments(im_engine *e, const im_step_call *c) {
  const int start = c->parts[0]->start, end = c->parts[c->n_parts - 1]->end;
  int32_t *bounds = (int32_t *)e->shared.delta, n = 0, first = 0;  // a buffer that is free until the first layer
  int same = 1, inputs = 0;
  for (int i = 0; i < c->n_rows; i++) {
    const im_row *r = &c->rows[i];
    if (r->enter < start || r->leave > end || r->enter > r->leave || r->position < 0) return IM_BAD_ROW;
    if (r->token >= 0 ? (r->enter || !c->parts[0]->has_embedding || r->token >= c->parts[0]->vocab_size)
                      : (!c->hidden_in || r->hidden < 0 || r->hidden >= c->n_hidden))
      return IM_BAD_ROW;
    if (c->parts[0]->has_input && (r->token >= 0 || r->enter != start)) return IM_BAD_ROW;
    inputs += r->token < 0;
    same &= r->enter == c->rows[0].enter && r->leave == c->rows[0].leave;
  }
  const size_t values = inputs ? (size_t)c->n_hidden * (size_t)c->parts[0]->d_model : 0;
  if (!all_finite(c->hidden_in, values)) return IM_NOT_FINITE;
  e->n_segments = 0;
  if (same) {
    for (int i = 0; i < c->n_rows; i++) e->active[i] = i;
    e->segments[e->n_segments++] = (segment){c->rows[0].enter, c->rows[0].leave, 0, c->n_rows};
    return IM_DONE;
  }
  for (int i = 0; i < c->n_rows; i++) {
    bounds[n++] = c->rows[i].enter;
    bounds[n++] = c->rows[i].leave;
  }
  qsort(bounds, (size_t)n, sizeof *bounds, ascending);
  for (int b = 0; b + 1 < n; b++) {
    if (bounds[b] == bounds[b + 1]) continue;
    segment g = {bounds[b], bounds[b + 1], first, 0};
    for (int i = 0; i < c->n_rows; i++)
      if (c->rows[i].enter <= g.first_layer && c->rows[i].leave >= g.last_layer) e->active[g.first + g.count++] = i;
    if (g.count) e->segments[e->n_segments++] = g;
    first += g.count;
  }
  return IM_DONE;
}
