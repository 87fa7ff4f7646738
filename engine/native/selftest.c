// Prints one hash of logits, hidden states, KV and samples for each weight format and kernel family that this CPU has,
// over a small synthetic decoder run with several chunkings and thread counts. All runs of a line must agree.
// usage: selftest [--quick] [FORMAT...]; quick leaves runs out (for emulators) and changes no hash.
//   cc -O2 -std=gnu11 -ffp-contract=off -pthread selftest.c [the engine's sources] -lm && ./a.out
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "kernels.h"

enum { LAYERS = 3, D = 96, HEADS = 6, KV = 2, HEAD = 24, FF = 80, VOCAB = 333, TOKENS = 37, EXPERTS = 4, BLOCKS = 8 };

static uint32_t state;
static uint32_t next(void) { return (state = state * 1664525u + 1013904223u) >> 8; }
static float uniform(float low, float high) { return low + (high - low) * (float)next() / 16777216.f; }
static void *take(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  if (!p) exit(3);
  return p;
}

static void *codes(size_t bytes) {
  uint8_t *p = take(bytes);
  for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)(next() >> 5);
  return p;
}
static void *halves(size_t n, float low, float high) {
  uint16_t *p = take(n * 2);
  for (size_t i = 0; i < n; i++) p[i] = im_float_to_half(uniform(low, high));
  return p;
}
static float *floats(size_t n, size_t real, float low, float high) {
  float *p = take(n * 4);
  for (size_t i = 0; i < n; i++) p[i] = i < real ? uniform(low, high) : 0.f;
  return p;
}

static im_matrix matrix(int format, int rows, int cols) {
  const size_t n = (size_t)im_pad(rows, 16) / 16 * (size_t)im_pad(cols, 32) / 32;
  const float s = 0.9f / sqrtf((float)cols);
  im_matrix m = {format, rows, cols, NULL, NULL, NULL, NULL, NULL};
  switch (format) {
    case IM_F32: m.codes = floats(n * 512, n * 512, -s, s); break;
    case IM_F16: m.codes = halves(n * 512, -s, s); break;
    case IM_BF16: {
      float *f = floats(n * 512, n * 512, -s, s);
      uint16_t *h = take(n * 1024);
      for (size_t i = 0; i < n * 512; i++) {
        uint32_t u;
        memcpy(&u, &f[i], 4);
        h[i] = (uint16_t)(u >> 16);
      }
      m.codes = h;
      break;
    }
    case IM_Q8:
      m.codes = codes(n * 512);
      m.scales = halves(n * 16, 0, s / 64);
      break;
    case IM_Q8X:
      m.codes = codes(n * 512);
      m.scales = floats(n * 32, n * 32, 0, s / 64);
      break;
    case IM_Q4:
      m.codes = codes(n * 256);
      m.scales = halves(n * 16, 0, s / 4);
      break;
    case IM_Q4M:
      m.codes = codes(n * 256);
      m.scales = halves(n * 16, 0, s / 4);
      m.mins = halves(n * 16, -s, s / 8);
      break;
    case IM_Q4X:
      m.codes = codes(n * 256);
      m.scales = floats(n * 16, n * 16, 0, s / 4);
      m.mins = floats(n * 16, n * 16, -s, s / 8);
      break;
    default:
      m.codes = codes(n * 128);
      if (format != IM_N2) m.p1 = codes(n * 128);
      if (format == IM_N8) m.p2 = codes(n * 256);
      m.scales = halves(n * 16, 0, format == IM_N2 ? s : s / 4);
  }
  return m;
}

static uint64_t fnv(uint64_t h, const void *data, size_t bytes) {
  const uint8_t *p = data;
  for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 1099511628211ull;
  return h;
}

typedef struct {
  im_part part;
  im_layer layers[LAYERS];
  size_t kv_bytes;
} model;

static void build(model *m, int format) {
  memset(m, 0, sizeof *m);
  state = 12345u + (uint32_t)format;
  im_part *p = &m->part;
  p->d_model = D;
  p->n_heads = HEADS;
  p->n_kv_heads = KV;
  p->head_dim = HEAD;
  p->d_ff = FF;
  p->vocab_size = VOCAB;
  p->start = 0;
  p->end = LAYERS;
  p->norm_eps = 1e-5f;
  p->rope_scale = 1.f;
  p->n_experts = EXPERTS;
  p->top_k = 2;
  p->renormalize = 1;
  p->half_life = 16;
  p->d_expert = FF;
  float *freq = take(HEAD / 2 * 4);
  for (int i = 0; i < HEAD / 2; i++) freq[i] = 1.f / (float)(1 << i);
  p->inv_freq = freq;
  p->has_embedding = p->has_head = 1;
  p->embedding = p->head = matrix(format, VOCAB, D);
  p->final_norm = floats(im_pad(D, 32), D, 0.5f, 1.5f);
  p->layers = m->layers;
  for (int i = 0; i < LAYERS; i++) {
    im_layer *l = &m->layers[i];
    l->attn_norm = floats(im_pad(D, 32), D, 0.5f, 1.5f);
    l->ffn_norm = floats(im_pad(D, 32), D, 0.5f, 1.5f);
    if (i != 1) {
      l->q_norm = floats(32, HEAD, 0.5f, 1.5f);
      l->k_norm = floats(32, HEAD, 0.5f, 1.5f);
    }
    if (i != 2) {
      l->q_bias = floats(HEADS * HEAD, HEADS * HEAD, -1, 1);
      l->k_bias = floats(KV * HEAD, KV * HEAD, -1, 1);
      l->v_bias = floats(KV * HEAD, KV * HEAD, -1, 1);
    }
    l->q = matrix(format, HEADS * HEAD, D);
    l->k = matrix(format, KV * HEAD, D);
    l->v = matrix(format, KV * HEAD, D);
    l->o = matrix(format, D, HEADS * HEAD);
    if (i == 1) {
      l->router = matrix(IM_F32, EXPERTS, D);
      l->experts = calloc(EXPERTS, sizeof *l->experts);
      for (int e = 0; e < EXPERTS; e++)
        l->experts[e] =
            (im_expert){matrix(format, FF, D), matrix(format, FF, D), matrix(format, D, FF), NULL, NULL, NULL, 7, 3};
      l->use = calloc(EXPERTS, sizeof *l->use);
      l->traffic = calloc(1, sizeof *l->traffic);
      l->n_planes = format < IM_N2 ? 1 : format - IM_N2 + 1;
    } else {
      l->gate = matrix(format, FF, D);
      l->up = matrix(format, FF, D);
      l->down = matrix(format, D, FF);
    }
    l->window = i == 2 ? 9 : 0;
  }
}

static const float *some(int n) { return floats((size_t)im_pad(n, 32), (size_t)n, -1, 1); }

static void make_latent(im_part *p, im_layer *l, int format) {
  const int own = HEADS * (p->head_nope + p->head_dim - p->kv_rank);
  l->q_norm = l->k_norm = l->q_bias = l->k_bias = l->v_bias = NULL;
  l->q_down = matrix(format, p->q_rank, D);
  l->q = matrix(format, own, p->q_rank);
  l->latent = matrix(format, p->head_dim, D);
  l->k_up = matrix(format, HEADS * p->kv_rank, p->head_nope);
  l->v_up = matrix(format, HEADS * p->head_v, p->kv_rank);
  l->o = matrix(format, D, HEADS * p->head_v);
  l->v.format = -1;
  l->q_down_norm = some(p->q_rank);
  l->latent_norm = some(p->kv_rank);
}

enum { BIASED = 1, SPARSE, GROUPS, LATENT };

// What families have beyond the plain decoder, some of it at a time.
static void vary(model *m, int format, int variant) {
  im_part *p = &m->part;
  im_layer *mixed = &m->layers[1];
  if (variant == LATENT) {
    p->kv_rank = 32;
    p->q_rank = 40;
    p->head_nope = 20;
    p->head_v = 16;
    p->n_kv_heads = 1;
    p->head_dim = 40;
    p->attention_scale = 0.2f;
    p->latent_eps = 1e-6f;
  }
  if (variant == BIASED) {
    p->swiglu_alpha = 1.702f;
    p->swiglu_limit = 0.8f;
    mixed->router_bias = some(EXPERTS);
    for (int e = 0; e < EXPERTS; e++) {
      mixed->experts[e].gate_bias = some(FF);
      mixed->experts[e].up_bias = some(FF);
      mixed->experts[e].down_bias = some(D);
    }
  }
  if (variant == SPARSE) {
    p->layer_norm = 1;
    p->final_norm_bias = some(D);
    p->head_bias = some(VOCAB);
    p->embedding_scale = 2.f;
    p->attention_scale = 0.3f;
    p->residual_scale = 0.6f;
    p->logit_scale = 0.7f;
    p->score = IM_SPARSEMIXER;
    p->renormalize = 0;
    p->jitter = 0.1f;
  }
  if (variant == GROUPS) {
    p->score = IM_SIGMOID;
    p->n_groups = p->group_best = 2;
    p->top_groups = 1;
    p->expert_scale = 2.5f;
    p->d_shared = FF;
    mixed->choice_bias = some(EXPERTS);
    mixed->shared_gate = matrix(IM_F32, 1, D);
    mixed->shared.gate = matrix(format, FF, D);
    mixed->shared.up = matrix(format, FF, D);
    mixed->shared.down = matrix(format, D, FF);
  }
  for (int i = 0; i < LAYERS; i++) {
    im_layer *l = &m->layers[i];
    if (variant == LATENT) make_latent(p, l, format);
    if (variant == BIASED) l->sink_logits = some(HEADS);
    if (variant == BIASED || variant == SPARSE) l->o_bias = some(D);
    if (variant == SPARSE) {
      l->attn_norm_bias = some(D);
      l->ffn_norm_bias = some(D);
    }
    if (variant != GROUPS) continue;
    l->q_norm = l->k_norm = l->q_bias = l->k_bias = NULL;
    l->q_norm_whole = some(HEADS * HEAD);
    l->k_norm_whole = some(KV * HEAD);
  }
}

// Runs two sequences of tokens in steps of the given sizes (0 ends the list) and hashes everything that comes out.
static uint64_t run(model *m, const char *cpu, int threads, int kv_f32, const int *steps) {
  im_part *p = &m->part;
  p->kv_f32 = kv_f32;
  p->kv_block_bytes = (size_t)(LAYERS * p->n_kv_heads * 32 * im_pad(p->head_dim, 16) * (kv_f32 ? 4 : 2));
  m->kv_bytes = p->kv_block_bytes * BLOCKS;
  p->kv = take(m->kv_bytes);
  memset(p->kv, 0, m->kv_bytes);
  const int32_t blocks[2][3] = {{5, 0, 3}, {1, 7, 2}};
  const im_sequence tables[2] = {{blocks[0], 0, 0}, {blocks[1], 12, 0}}, *table = tables;
  const im_part *parts[1] = {p};
  im_sampling samplings[3] = {{0.8f, 0, 1.0, 42, 0}, {1.1f, 40, 0.9, 7, 1}, {0, 0, 1, 0, 0}};
  im_engine *e = im_engine_new(threads, cpu);
  if (!e) exit(4);
  float *logits = take(2 * TOKENS * VOCAB * 4), *hidden = take(2 * TOKENS * D * 4);
  im_row *rows = calloc(2 * TOKENS, sizeof *rows);
  int32_t tokens[2 * TOKENS];
  uint64_t *outs = calloc(2 * TOKENS, sizeof *outs), h = 14695981039346656037ull;
  for (int from = 0, s = 0; from < TOKENS; s += steps[s + 1] != 0) {
    const int to = from + steps[s] < TOKENS ? from + steps[s] : TOKENS;
    int n = 0;
    for (int q = 0; q < 2; q++)
      for (int i = from; i < to; i++)
        rows[n++] = (im_row){
            q,    i, (i * 37 + q * 101 + 5) % VOCAB, 0, 0, LAYERS, IM_WANT_HIDDEN | IM_WANT_LOGITS | IM_WANT_SAMPLE,
            i % 3};
    im_step_call c = {parts, &table, rows, samplings, NULL, hidden, logits, tokens, 1, n, 0, 0, NULL};
    if (im_step(e, &c) != IM_DONE) exit(5);
    for (int i = 0; i < n; i++) {
      uint64_t o = fnv(14695981039346656037ull, logits + (size_t)i * VOCAB, VOCAB * 4);
      o = fnv(o, hidden + (size_t)i * D, D * 4);
      outs[rows[i].sequence * TOKENS + rows[i].position] = fnv(o, &tokens[i], 4);
    }
    from = to;
  }
  h = fnv(h, outs, 2 * TOKENS * sizeof *outs);
  h = fnv(h, p->kv, m->kv_bytes);
  im_engine_free(e);
  free(p->kv);
  free(logits);
  free(hidden);
  free(rows);
  free(outs);
  return h;
}

static int chosen(const char *name, int argc, char **argv) {
  for (int i = 0; i < argc; i++)
    if (!strcmp(argv[i], name)) return 1;
  return argc == 0;
}

int main(int argc, char **argv) {
  static const char *const names[] = {"f32", "f16", "bf16", "q8", "q8x", "q4", "q4m", "q4x", "n2", "n4", "n8",
                                     "q4-biased", "q4-sparse", "q4-groups", "q4-latent"};
  static const char *const cpus[] = {"plain", "avx2", "avx512-vnni", "neon", "neon-dotprod"};
  static const int whole[] = {TOKENS, 0}, single[] = {1, 0}, mixed[] = {5, 1, 16, 2, 0};
  static const int *const chunkings[] = {whole, mixed, single};
  const int quick = argc > 1 && !strcmp(argv[1], "--quick");
  argc -= 1 + quick;
  argv += 1 + quick;
  int wrong = 0;
  for (int f = 0; f < 15; f++) {
    if (!chosen(names[f], argc, argv)) continue;
    model m;
    build(&m, f < 11 ? f : IM_Q4);
    if (f >= 11) vary(&m, IM_Q4, f - 10);
    for (int kv_f32 = 0; kv_f32 < (quick && f != IM_Q4 ? 1 : 2); kv_f32++) {
      uint64_t first = 0;
      for (int c = 0; c < 5; c++) {
        if (!im_cpu_supported(cpus[c])) continue;
        for (int s = 0; s < (quick ? 2 : 3); s++)
          for (int threads = 1; threads < 4; threads++) {
            if (quick && threads != s + 1) continue;  // whole on one thread, mixed on two
            uint64_t h = run(&m, cpus[c], threads, kv_f32, chunkings[s]);
            if (!first) first = h;
            if (h != first) {
              wrong++;
              printf("DIFFERS %s kv-%s %s chunking %d threads %d %016llx\n", names[f], kv_f32 ? "f32" : "f16", cpus[c],
                     s, threads, (unsigned long long)h);
            }
          }
      }
      printf("%s kv-%s %016llx\n", names[f], kv_f32 ? "f32" : "f16", (unsigned long long)first);
    }
  }
  printf("families");
  for (int c = 0; c < 5; c++)
    if (im_cpu_supported(cpus[c])) printf(" %s", cpus[c]);
  printf("\n");
  return wrong != 0;
}
