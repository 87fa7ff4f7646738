// Latent attention (MLA, DeepSeek-V2 2024) in its absorbed form: all query heads share one KV head of kv_rank normed
// numbers, the latent, and a rotated key. KV holds these alone; a head's own keys and values are never made: its
// queries go through the transposed key map instead (k_up), and the latents that it gathers through its value map
// (v_up).
#include "step.h"

typedef struct {
  const im_matrix *map;  // [n_heads * out, in]: a head's rows see its own columns of the input
  const float *from;     // of head h of row i: from[i * from_row + h * from_head]
  float *to;
  int in, out, fine;
  size_t from_row, from_head, to_row, to_head;
} head_map;

// Each head's numbers through its own rows of a map; threads own heads.
static void map_heads(walker *w, const im_part *p, const head_map *m, int count) {
  im_engine *e = w->e;
  const int stride = im_pad(m->in, 32), blocks = m->out / 16;
  lane l = {.normed = e->heads[w->thread], .panels = e->head_panels[w->thread]};
  for (int h = p->n_heads * w->thread / e->threads; h < p->n_heads * (w->thread + 1) / e->threads; h++) {
    for (int i = 0; i < count; i++) {
      float *x = l.normed + (size_t)i * stride;
      memcpy(x, m->from + i * m->from_row + h * m->from_head, (size_t)m->in * 4);
      memset(x + m->in, 0, (size_t)(stride - m->in) * 4);
      if (is_quantized(m->map)) quantize_row(e, &l, m->fine, l.normed, i, count, stride);
    }
    const im_acts acts = acts_of(&l, l.normed, stride, m->fine);
    float *to = m->to + h * m->to_head - (size_t)h * m->out;  // the kernel adds h * out itself
    e->k->linear(m->map, &acts, count, to, m->to_row, h * blocks, (h + 1) * blocks);
  }
  meet(w);
}

// From e->qkv, queries (or what they are made of) and latents before their norm, to e->queries and normed latents.
void im_latent_queries(walker *w, const im_part *p, const im_layer *l, int count) {
  im_engine *e = w->e;
  const int ldy = e->w.qkv, turned = rotated(p), own = p->head_nope + turned, hd = p->head_dim;
  const size_t queries = (size_t)p->n_heads * hd;
  const int low = im_pad(p->q_rank, 32);
  for (int i = w->thread; i < count; i += e->threads) {
    float *latent = e->qkv + (size_t)i * ldy + e->w.q_rows, *x = e->lowered + (size_t)i * low;
    e->k->rms_norm(latent, l->latent_norm, latent, p->kv_rank, p->latent_eps);
    if (!p->q_rank) continue;
    memset(x, 0, (size_t)low * 4);
    memcpy(x, e->qkv + (size_t)i * ldy, (size_t)p->q_rank * 4);
    e->k->rms_norm(x, l->q_down_norm, x, p->q_rank, p->latent_eps);
    if (is_quantized(&l->q)) quantize_row(e, w->l, 1, e->lowered, i, count, low);
  }
  meet(w);
  if (p->q_rank) {
    const im_acts acts = acts_of(w->l, e->lowered, low, 1);
    im_linear_targets(e, (target[]){{&l->q, e->qkv, (size_t)ldy}}, 1, &acts, count, w->thread);
    meet(w);
  }
  for (int i = w->thread; i < count; i += e->threads)
    for (int h = 0; h < p->n_heads; h++)
      memcpy(e->queries + i * queries + (size_t)h * hd + p->kv_rank,
             e->qkv + (size_t)i * ldy + (size_t)h * own + p->head_nope, (size_t)turned * 4);
  map_heads(w, p,
            &(head_map){.map = &l->k_up, .from = e->qkv, .to = e->queries, .in = p->head_nope, .out = p->kv_rank,
                        .fine = 1, .from_row = (size_t)ldy, .from_head = (size_t)own, .to_row = queries,
                        .to_head = (size_t)hd},
            count);
}

// From e->mixed, the latents that each head gathered, to the attention's results.
void im_latent_values(walker *w, const im_part *p, const im_layer *l, int count) {
  im_engine *e = w->e;
  map_heads(w, p,
            &(head_map){.map = &l->v_up, .from = e->mixed, .to = e->shared.attention, .in = p->kv_rank,
                        .out = p->head_v, .fine = 1, .from_row = (size_t)p->n_heads * p->head_dim,
                        .from_head = (size_t)p->head_dim, .to_row = (size_t)e->w.att_pad,
                        .to_head = (size_t)p->head_v},
            count);
}
