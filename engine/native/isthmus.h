// The native engine's data: weights, KV and rows, all plain memory that the caller owns.
#pragma once
#include <stddef.h>
#include <stdint.h>

// BEGIN SHARED WITH PYTHON
// formats of quant/packed.py
enum { IM_F32, IM_F16, IM_BF16, IM_Q8, IM_Q8X, IM_Q4, IM_Q4M, IM_Q4X, IM_N2, IM_N4, IM_N8 };
enum { IM_WANT_HIDDEN = 1, IM_WANT_LOGITS = 2, IM_WANT_SAMPLE = 4, IM_WANT_CONFIDENCE = 8 };
enum { IM_DONE = 0, IM_NO_MEMORY = -1, IM_BAD_ROW = -2, IM_NOT_FINITE = -3, IM_NOT_READ = -4 };
enum { IM_SOFTMAX, IM_SIGMOID, IM_SPARSEMIXER };  // how a router's logits become weights

typedef struct {  // a weight matrix, rows and cols before padding to 16 and 32
  int32_t format, rows, cols;
  const void *codes, *p1, *p2, *scales, *mins;  // of nested formats of 4 and 8 bits, mins: the scales of 2 bits
} im_matrix;

typedef struct im_reader im_reader;
typedef struct im_store im_store;

// An expert's planes are the bit planes of a nested format; other formats have one, which is all of it.
typedef struct {
  im_matrix gate, up, down;                      // in the format of all planes
  const float *gate_bias, *up_bias, *down_bias;  // NULL: none; they are there whether the matrices are or not
  int32_t present;                               // bit p: plane p is in memory; below 0: reading one failed
  int32_t asked;                                 // leading planes that are in memory or on their way there
} im_expert;

typedef struct {              // what evictions are decided by
  int32_t last[3], count[3];  // the step that took each plane last, and how many did
  float rate[3];              // how many did, each counting less with every step since: half after `half_life`
  int32_t wanted;             // planes that the layer under way still has to compute
} im_use;

typedef struct {  // planes of experts that steps took: all, those that were not in memory, and of these under way
  int64_t taken[3], missed[3], late[3];
  int64_t foreseen, foreseen_right;  // experts foreseen one layer early, and those of them that were then chosen
} im_traffic;

typedef struct {  // routing that was recorded, instead of the router's: [positions][layers][top_k]
  int32_t positions;
  const int32_t *chosen, *foreseen;
  const float *weights;
} im_replay;

typedef struct {  // where what routers say is written down: as im_replay
  int32_t positions;  // rows of later ones are left out
  int32_t *chosen, *foreseen;
  float *weights;
} im_record;

typedef struct {  // NULL or format -1: the layer has none
  const float *attn_norm, *ffn_norm, *q_norm, *k_norm, *q_bias, *k_bias, *v_bias;
  im_matrix q, k, v, o, gate, up, down, router;
  im_expert *experts;  // [n_experts]; the pinned table of what is resident
  im_use *use;         // [n_experts]
  int32_t n_planes;    // of each expert
  im_traffic *traffic;
  const float *tolerance;  // [n_planes] the least share in its row that takes each plane of an expert; NULL: all planes
  int32_t window;      // positions that attention sees, 0 for all
  const float *attn_norm_bias, *ffn_norm_bias, *o_bias;
  const float *q_norm_whole, *k_norm_whole;  // over all heads together, instead of q_norm and k_norm
  const float *sink_logits;                  // [n_heads]: a logit beside the scores of each head, with no value
  const float *router_bias, *choice_bias;    // [n_experts]: on the logits; on the scores, for the choice only
  im_matrix shared_gate;                     // [1, d_model]
  im_expert shared;                          // where the part has d_shared
  im_matrix q_down, latent, k_up, v_up;      // where it has kv_rank; see latent.c
  const float *q_down_norm, *latent_norm;
} im_layer;

typedef struct {  // layers [start, end)
  int32_t d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size, start, end;
  int32_t n_experts, top_k, renormalize, d_expert;
  int32_t foresee;  // whether the next layer's router is asked early
  int32_t unweighed, pre_gate;  // chosen experts count in full; routers read what the layer before them reads
  float norm_eps, rope_scale;
  const float *inv_freq;  // [head_dim / 2]
  int32_t has_embedding, has_head, has_input;
  im_matrix embedding, head, input;  // input: what hidden states that come in go through before the first layer
  const float *final_norm;
  const int32_t *head_tokens;  // [head.rows] the token of each of the head's rows, ascending; NULL: row i is token i
  im_layer *layers;  // [end - start]
  im_reader *reader;  // bring experts; NULL: all are in memory
  im_store *store;
  int64_t patience_ns;  // how long a step waits for a read
  float half_life;      // of im_use.rate, in steps
  const im_replay *replay;  // NULL: routers decide
  const im_record *record;  // NULL: nobody writes down
  int32_t kv_f32;    // KV in float32 instead of float16
  uint8_t *kv;       // blocks of 16 positions
  size_t kv_block_bytes;
  // What 0 and NULL turn off:
  int32_t layer_norm;  // norms subtract the mean and have a bias
  const float *final_norm_bias, *head_bias;
  float embedding_scale, attention_scale, residual_scale, logit_scale;  // attention's is 1 / sqrt(head_dim) then
  float swiglu_alpha, swiglu_limit;                                     // of the gated network; a limit of 0: SiLU
  // the router: expert_scale is a factor on all weights; group_best: experts whose scores make a group's
  int32_t score, n_groups, top_groups, group_best, d_shared;
  float expert_scale, jitter;
  // latent attention: one KV head of kv_rank + rotated numbers serves all heads, whose queries have head_nope +
  // rotated numbers and whose values have head_v
  int32_t kv_rank, q_rank, head_nope, head_v;
  float latent_eps;
} im_part;

typedef struct {
  const int32_t *blocks;  // blocks[p / 16] of position p
  int32_t window;         // positions that rows see, 0 for all
  int32_t sinks;          // whole blocks at the front that rows see as well, as if they stood just before the window
} im_sequence;

typedef struct {
  int32_t sequence, position, token, hidden;  // token >= 0, or else row `hidden` of hidden_in
  int32_t enter, leave, want, sampling;
} im_row;

typedef struct {
  float temperature;
  int32_t top_k;
  double top_p;
  uint64_t seed;
  uint32_t stream;
} im_sampling;

typedef struct {
  const im_part *const *parts;       // [n_parts], each one's end is the next one's start
  const im_sequence *const *tables;  // [n_parts][sequences]
  const im_row *rows;
  const im_sampling *samplings;
  const float *hidden_in;          // [n_hidden][d_model]
  float *hidden_out, *logits_out;  // of the rows that want them, in order
  int32_t *tokens_out;
  int32_t n_parts, n_rows, n_hidden;
  int32_t layer;  // after IM_NOT_READ: whose experts did not come
  float *confidence_out;       // of the rows that want it: the softmax probability of their largest logit
} im_step_call;

typedef struct im_engine im_engine;
// END SHARED WITH PYTHON

typedef struct {        // one KV head of one layer for a sequence
  const uint8_t *base;  // block 0's data of this layer and head
  const int32_t *blocks;
  size_t block_bytes;
  int32_t head_dim, f32;  // head_dim padded to 16
  float scale;
  int32_t sinks;        // the first so many blocks are scored with sink_q instead of q
  const float *sink_q;  // [heads][head_dim], as q
  const float *sink_logits;  // [heads] in the softmax's sum, or NULL
} im_kv_view;

static inline int32_t im_pad(int32_t n, int32_t to) { return (n + to - 1) / to * to; }
