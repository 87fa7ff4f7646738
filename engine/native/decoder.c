// The engine and its step: the walk of every thread through the layers, and what rows give at the end.
#include "decoder.h"

#include <stdlib.h>

#include "rope.h"
#include "step.h"

static const im_part *part_of(const im_step_call *c, int layer, int *index) {
  int p = 0;
  while (layer >= c->parts[p]->end) p++;
  *index = p;
  return c->parts[p];
}

// NULL behind the last one
static const im_layer *layer_of(const im_step_call *c, int layer) {
  int part;
  if (layer >= c->parts[c->n_parts - 1]->end) return NULL;
  const im_part *p = part_of(c, layer, &part);
  return &p->layers[layer - p->start];
}

void im_linear_targets(im_engine *e, const target *t, int n, const im_acts *acts, int rows, int thread) {
  int total = 0, done = 0;
  for (int i = 0; i < n; i++) total += im_pad(t[i].w->rows, 16) / 16;
  const int b0 = (int)((int64_t)total * thread / e->threads), b1 = (int)((int64_t)total * (thread + 1) / e->threads);
  for (int i = 0; i < n; i++) {
    const int blocks = im_pad(t[i].w->rows, 16) / 16;
    const int from = b0 > done ? b0 - done : 0, to = b1 - done < blocks ? b1 - done : blocks;
    if (from < to) e->k->linear(t[i].w, acts, rows, t[i].y, t[i].ldy, from, to);
    done += blocks;
  }
}

// ---- what rows give at the end
static void give_hidden(walker *w) {
  im_step_call *c = w->c;
  const im_part *p = c->parts[0];
  if (!w->single) meet(w);
  for (int i = 0, n = 0; i < c->n_rows; i++)
    if (c->rows[i].want & IM_WANT_HIDDEN) {
      if (n % w->e->threads == w->thread)
        memcpy(c->hidden_out + (size_t)n * p->d_model, w->l->x + (size_t)i * w->e->w.d_pad, (size_t)p->d_model * 4);
      n++;
    }
}

static void give_logits(walker *w) {
  im_engine *e = w->e;
  im_step_call *c = w->c;
  const im_part *p = c->parts[c->n_parts - 1];
  const int d_pad = e->w.d_pad, ldy = e->w.vocab_pad;
  const int n = p->head.rows;
  int logits = 0, tokens = 0, confidences = 0;
  if (!w->single && e->n_logit_rows) meet(w);
  for (int start = 0; start < e->n_logit_rows; start += HEAD_ROWS) {
    const int count = e->n_logit_rows - start < HEAD_ROWS ? e->n_logit_rows - start : HEAD_ROWS;
    const int32_t *rows = e->logit_rows + start;
    int from, to;
    own_rows(w, count, &from, &to);
    for (int i = from; i < to; i++) {
      norm_row(e, p, w->l->x + (size_t)rows[i] * d_pad, p->final_norm, p->final_norm_bias,
               w->l->normed + (size_t)i * d_pad);
      if (is_quantized(&p->head)) quantize_row(e, w->l, 0, w->l->normed, i, count, d_pad);
    }
    if (!w->single) meet(w);
    im_acts acts = acts_of(w->l, w->l->normed, d_pad, 0);
    im_linear_targets(e, (target[]){{&p->head, e->logits, (size_t)ldy}}, 1, &acts, count, w->thread);
    meet(w);
    for (int i = 0; i < count; i++) {
      const im_row *row = &c->rows[rows[i]];
      float *y = e->logits + (size_t)i * ldy;
      const int mine = i % e->threads == w->thread;
      if (mine && p->head_bias)
        for (int j = 0; j < n; j++) y[j] += p->head_bias[j];
      if (mine && p->logit_scale != 0.f)
        for (int j = 0; j < n; j++) y[j] *= p->logit_scale;
      if (row->want & IM_WANT_LOGITS) {
        if (mine) memcpy(c->logits_out + (size_t)logits * (size_t)n, y, (size_t)n * 4);
        logits++;
      }
      float max = 0;
      const int chosen = row->want & (IM_WANT_SAMPLE | IM_WANT_CONFIDENCE);
      const int best = mine && chosen ? e->k->argmax(y, n, &max) : 0;
      if (row->want & IM_WANT_SAMPLE) {
        if (mine)
          c->tokens_out[tokens] = im_sample(y, n, best, p->head_tokens, &c->samplings[row->sampling],
                                            (uint32_t)row->position, e->candidates[w->thread]);
        tokens++;
      }
      if (row->want & IM_WANT_CONFIDENCE) {
        if (mine) c->confidence_out[confidences] = e->k->confidence(y, n, max);
        confidences++;
      }
    }
    meet(w);
  }
}

// Rows of hidden states through the part's input map.
static void map_rows(walker *w) {
  im_engine *e = w->e;
  im_step_call *c = w->c;
  const im_part *p = c->parts[0];
  const int d_pad = e->w.d_pad, quantized = is_quantized(&p->input);
  int from, to;
  own_rows(w, c->n_rows, &from, &to);
  for (int i = from; i < to; i++) {
    float *x = w->l->normed + (size_t)i * d_pad;
    memcpy(x, c->hidden_in + (size_t)c->rows[i].hidden * p->d_model, (size_t)p->d_model * 4);
    memset(x + p->d_model, 0, (size_t)(d_pad - p->d_model) * 4);
    if (quantized) quantize_row(e, w->l, 1, w->l->normed, i, c->n_rows, d_pad);
  }
  if (!w->single) meet(w);
  im_acts acts = acts_of(w->l, w->l->normed, d_pad, 1);
  im_linear_targets(e, (target[]){{&p->input, e->shared.delta, (size_t)d_pad}}, 1, &acts, c->n_rows, w->thread);
  meet(w);
}

static void start_rows(walker *w) {
  im_engine *e = w->e;
  im_step_call *c = w->c;
  const im_part *p = c->parts[0];
  int from, to;
  if (p->has_input) map_rows(w);
  own_rows(w, c->n_rows, &from, &to);
  for (int i = from; i < to; i++) {
    const im_row *row = &c->rows[i];
    float *x = w->l->x + (size_t)i * e->w.d_pad;
    if (row->token >= 0) {
      im_embed(&p->embedding, row->token, x);
      if (p->embedding_scale != 0.f)
        for (int j = 0; j < p->d_model; j++) x[j] *= p->embedding_scale;
    } else {
      const float *hidden = p->has_input ? e->shared.delta + (size_t)i * e->w.d_pad
                                         : c->hidden_in + (size_t)row->hidden * p->d_model;
      memcpy(x, hidden, (size_t)p->d_model * 4);
      memset(x + p->d_model, 0, (size_t)(e->w.d_pad - p->d_model) * 4);
    }
    if (!w->single || w->thread == 0) {
      const int half = rotated(p) / 2, first = window_start(table_of(w, 0, row), row->position);
      const size_t at = (size_t)i * (size_t)p->head_dim;
      im_rope(p->inv_freq, half, row->position, p->rope_scale, e->rope + at);
      if (first && table_of(w, 0, row)->sinks)
        im_rope(p->inv_freq, half, row->position - first + 16 * table_of(w, 0, row)->sinks, p->rope_scale,
                e->sink_rope + at);
    }
  }
  if (!w->single) meet(w);  // a single row's angles are needed after the first linear map, which ends in a barrier
}

static void walk(void *argument, int thread) {
  im_engine *e = argument;
  im_step_call *c = e->call;
  walker w = {e, c, thread, c->n_rows == 1 && !e->w.max_experts && !e->w.latent, NULL};
  w.l = w.single ? &e->own[thread] : &e->shared;
  start_rows(&w);
  for (int s = 0; s < e->n_segments; s++) {
    if (s) meet(&w);  // rows change their threads between segments
    const segment *g = &e->segments[s];
    const int32_t *active = e->active + g->first;
    for (int layer = g->first_layer; layer < g->last_layer && g->count; layer++) {
      int part;
      const im_part *p = part_of(c, layer, &part);
      const im_layer *l = &p->layers[layer - p->start];
      im_attention(&w, p, part, layer, active, g->count);
      if (!l->experts) im_dense(&w, p, l, active, g->count);
      else if (!im_experts(&w, p, l, layer_of(c, layer + 1), layer, active, g->count)) return;
    }
  }
  give_hidden(&w);
  give_logits(&w);
}

int im_step(im_engine *e, im_step_call *c) {
  if (c->n_rows < 1 || c->n_parts < 1) return IM_BAD_ROW;
  for (int i = 0; i + 1 < c->n_parts; i++)
    if (c->parts[i]->end != c->parts[i + 1]->start) return IM_BAD_ROW;
  int status = im_prepare(e, c);
  if (status == IM_DONE) status = im_plan_segments(e, c);
  if (status != IM_DONE) return status;
  e->call = c;
  e->steps++;
  e->verdict = IM_DONE;
  im_pool_run(e->pool, walk, e);
  return e->verdict;
}

im_engine *im_engine_new(int threads, const char *cpu) {
  const im_kernels *k = im_kernels_choose(cpu);
  if (!k || threads < 1) return NULL;
  im_engine *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  e->k = k;
  e->threads = threads;
  e->own = calloc((size_t)threads + 1, sizeof *e->own);
  e->scores = calloc((size_t)threads, sizeof *e->scores);
  e->candidates = calloc((size_t)threads, sizeof *e->candidates);
  e->gathered = calloc((size_t)threads, sizeof *e->gathered);
  e->heads = calloc((size_t)threads, sizeof *e->heads);
  e->head_panels = calloc((size_t)threads, sizeof *e->head_panels);
  e->pool = im_pool_new(threads);
  if (!e->own || !e->scores || !e->candidates || !e->gathered || !e->heads || !e->head_panels || !e->pool) {
    im_engine_free(e);
    return NULL;
  }
  return e;
}

void im_engine_free(im_engine *e) {
  if (!e) return;
  im_pool_free(e->pool);
  free(e->memory);
  free(e->own);
  free(e->scores);
  free(e->candidates);
  free(e->gathered);
  free(e->heads);
  free(e->head_panels);
  free(e);
}

int64_t im_engine_waited(const im_engine *e) { return e->waited_ns; }
const char *im_engine_cpu(const im_engine *e) { return e->k->name; }
const char *im_cpu_best(void) { return im_kernels_choose(NULL)->name; }
int im_cpu_supported(const char *cpu) { return im_kernels_choose(cpu) != NULL; }
