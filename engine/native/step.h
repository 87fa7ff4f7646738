// What the files of the step share: scratch memory, the walk of one thread, and the blocks of a layer.
//
// The step runs layers over rows on all threads at once. Between two barriers each thread writes only what it owns:
// blocks of 16 output channels in a linear map, rows in a norm, pairs of (row, KV head) in attention. With a single
// row every thread repeats norms and quantization on its own copy, which costs less than a barrier.
#pragma once
#include <string.h>

#include "decoder.h"
#include "kernels.h"
#include "pool.h"
#include "store.h"
#include "sampler.h"

enum { HEAD_ROWS = 32 };  // rows that go through the output head together
enum { NEEDS_HEAD = IM_WANT_LOGITS | IM_WANT_SAMPLE | IM_WANT_CONFIDENCE };

typedef struct {
  int first_layer, last_layer, first, count;
} segment;  // layers with the same active rows

typedef struct {  // what one thread (or all of them together) needs for some rows
  float *x, *normed, *attention, *gate, *delta;
  uint8_t *panels;
} lane;

typedef struct {
  int d, d_pad, heads_pad, att_pad, q_rows, kv_rows, qkv, ff_pad, widest, vocab_pad, max_experts, top_k;
  int q_rank, queries, latent;  // of latent attention: padded; numbers of a row's queries; widest input of a head's map
} widths;

typedef struct {  // where rows go
  float *logits, *x;         // [row][n_experts padded]; [row][d_pad] what the router reads
  int32_t *layer;            // [row] the layer that these are routes to, -1 for none
  int32_t *chosen, *planes;  // [row][top_k] experts, and how many of their planes
  float *weights;            // [row][top_k] what the router gives the chosen experts
} routes;

struct im_engine {
  im_pool *pool;
  const im_kernels *k;
  int threads;
  widths w;
  char *memory;
  size_t capacity;
  lane shared, *own;  // own[thread] for the single row
  float *qkv, *up, **scores, *logits, *rope, *sink_rope, *kept;
  im_candidate **candidates;
  float *lowered, *queries, *mixed, **heads;  // latent attention: see latent.c
  uint8_t **head_panels;
  int32_t **gathered;        // [thread]: the blocks that a row sees, where there is a hole between sinks and window
  int32_t *active;  // active rows of all segments
  routes now, next;  // of the layer under way, and of the one behind it where it is foreseen
  uint8_t *hidden_panels;  // [top_k]: what one row's experts hand to their last maps
  int32_t *wave;           // experts that are computed together
  segment *segments;
  int n_segments, n_logit_rows;
  int32_t *logit_rows;
  im_wanted *wanted, *foreseen;  // [n_experts] room
  im_step_call *call;
  int verdict, n_wave;
  int32_t steps;      // so far
  int64_t waited_ns;  // for experts
};

// ---- linear maps that share their activations
typedef struct {
  const im_matrix *w;
  float *y;
  size_t ldy;
} target;

// The rows of `t`'s matrices times the activations, this thread's share of their blocks.
void im_linear_targets(im_engine *e, const target *t, int n, const im_acts *acts, int rows, int thread);

static inline int is_quantized(const im_matrix *w) { return w->format >= IM_Q8; }

static inline im_acts acts_of(const lane *l, const float *x, int stride, int fine) {
  return (im_acts){x, l->panels, stride, fine};
}

// row `row` of `rows` that go through a linear map together
static inline void quantize_row(const im_engine *e, lane *l, int fine, const float *x, int row, int rows, int stride) {
  size_t step;
  uint8_t *to = l->panels + im_panel_at(row, rows, stride, fine, &step);
  e->k->quantize(x + (size_t)row * (size_t)stride, stride, fine, to, step);
}

typedef struct {
  im_engine *e;
  im_step_call *c;
  int thread, single;
  lane *l;
} walker;

static inline void meet(const walker *w) { im_pool_barrier(w->e->pool, w->thread); }

// The rows of an active set that this thread owns in norms: all of them when it works on a copy of its own.
static inline void own_rows(const walker *w, int count, int *from, int *to) {
  *from = w->single ? 0 : (int)((int64_t)count * w->thread / w->e->threads);
  *to = w->single ? count : (int)((int64_t)count * (w->thread + 1) / w->e->threads);
}

static inline const im_sequence *table_of(const walker *w, int part, const im_row *row) {
  return w->c->tables[part] + row->sequence;
}

// The first position that `row` sees under its sequence's window. With sinks the window begins with a whole block, so
// that what is seen is a list of whole blocks.
static inline int window_start(const im_sequence *table, int position) {
  const int first = table->window && position + 1 > table->window ? position + 1 - table->window : 0;
  return !table->sinks ? first : first / 16 <= table->sinks ? 0 : first / 16 * 16;
}

static inline void norm_row(const im_engine *e, const im_part *p, const float *x, const float *weight,
                            const float *bias, float *out) {
  if (p->layer_norm) e->k->layer_norm(x, weight, bias, out, p->d_model, p->norm_eps);
  else e->k->rms_norm(x, weight, out, p->d_model, p->norm_eps);
}

// x += residual_scale (delta + bias); leaves delta alone, which threads with copies of x share
static inline void add_residual(const im_engine *e, const im_part *p, float *x, const float *delta,
                                const float *bias) {
  if (p->residual_scale != 0.f) {
    for (int j = 0; j < p->d_model; j++) x[j] += p->residual_scale * (bias ? delta[j] + bias[j] : delta[j]);
    return;
  }
  e->k->add(x, delta, im_pad(p->d_model, 16));
  if (bias) e->k->add(x, bias, im_pad(p->d_model, 16));
}

// numbers of a head that are rotated, the last ones
static inline int rotated(const im_part *p) { return p->head_dim - p->kv_rank; }
// numbers of a head's result, which the output matrix sees
static inline int head_out(const im_part *p) { return p->kv_rank ? p->head_v : p->head_dim; }

// scratch.c: memory for a call, zeroed where kernels read padding; and which rows are active in which layers
int im_prepare(im_engine *e, im_step_call *c);
int im_plan_segments(im_engine *e, const im_step_call *c);
// attention.c and feed_forward.c: the two halves of a layer over its active rows. experts gives 0 if they do not come.
void im_attention(walker *w, const im_part *p, int part, int layer, const int32_t *active, int count);
void im_dense(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count);
// router.c: the experts of one row, into its place `slot`; `early`: of the layer behind the one under way
void im_route(const im_part *p, const im_layer *l, int layer, const im_row *row, float *logits, routes *to,
              int slot, int early);
int im_experts(walker *w, const im_part *p, const im_layer *l, const im_layer *next, int layer,
               const int32_t *active, int count);
void im_ffn_norm(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count, int quantized);
// rows [16 b0, 16 b1) of the gated hidden activations of one row: g = the activation of g and u
void im_gate_row(const im_engine *e, const im_part *p, const im_expert *x, float *g, float *u, int b0, int b1);
void im_gated_mlp(walker *w, const im_part *p, const im_expert *x, const im_acts *acts, int count, float *delta);
void im_shared_expert(walker *w, const im_part *p, const im_layer *l, const int32_t *active, int count);
// latent.c: what comes before and after attention over one KV head that all query heads share
void im_latent_queries(walker *w, const im_part *p, const im_layer *l, int count);
void im_latent_values(walker *w, const im_part *p, const im_layer *l, int count);
