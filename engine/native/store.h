// Experts in a hard budget of bytes: which planes are in memory, which leave for others, and what is read, and when.
#pragma once
#include "reader.h"

// BEGIN SHARED WITH PYTHON
enum { IM_LRU, IM_LFU, IM_LFRU };
enum { IM_HUGE_FROM = 268435456 };  // bytes of a budget in which huge pages are small change

typedef struct {       // where the experts of a layer stand in its file
  int32_t file;        // descriptor, -1 for a layer without experts
  int32_t n_planes;    // that are used
  int32_t drop;        // whether the page cache shall forget what was read
  int64_t start, record_bytes, bytes[3];  // offset of the first expert; bytes of each, and of its planes
  const uint32_t *checksums;              // [n_experts][3]
  // What an expert's matrices point to in each plane: pairs of a word of im_expert and an offset into the plane.
  int32_t n_fields[3];
  const int32_t *fields[3];
} im_shelf;

typedef struct {
  int32_t n_layers, n_experts, policy, ahead;  // ahead: experts that are read ahead of their layer, at most
  float half_life;                             // of im_use.rate
  const im_shelf *shelves;                     // [n_layers]
  im_expert *cells;                            // [n_layers][n_experts]
  im_use *uses;
  int64_t budget;
} im_stock;

typedef struct {
  int64_t resident, most;            // bytes of planes in memory, spare ones included; and their most so far
  int64_t evicted, read, read_ahead, taken_ahead;  // planes; taken: of those read ahead, by their layer
} im_store_report;

im_store *im_store_new(const im_stock *stock, im_reader *reader);  // NULL: no memory
void im_store_free(im_store *store);
void im_store_reports(const im_store *store, im_store_report *report);
// END SHARED WITH PYTHON

typedef struct {
  int32_t expert, planes;
} im_wanted;

// A layer's rows are routed: what was to be read ahead and has not begun is taken back; what they want goes first.
void im_store_begin(im_store *store);
// A layer lacks `n` experts, and the one behind it will probably lack `n_foreseen`, each list in the order of what it
// matters: returns how many of the first are in memory or under way now.
int im_store_want(im_store *store, int step, int layer, const im_wanted *wanted, int n, const im_wanted *foreseen,
                  int n_foreseen);
int im_store_small(const im_store *store);  // whether planes are read in less time than two threads meet twice
// Tells that a layer took planes of an expert.
void im_store_taken(im_store *store, int layer, int expert, int planes);
