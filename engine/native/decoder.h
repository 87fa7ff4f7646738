// One step of a decoder over mixed rows; see engine/part.py for what a row is.
#pragma once
#include "isthmus.h"

// BEGIN SHARED WITH PYTHON
im_engine *im_engine_new(int threads, const char *cpu);  // NULL: no such kernels here, or no threads
void im_engine_free(im_engine *engine);
const char *im_engine_cpu(const im_engine *engine);
int64_t im_engine_waited(const im_engine *engine);  // ns that steps waited for experts so far
const char *im_cpu_best(void);
int im_cpu_supported(const char *cpu);
// Computes call->rows: IM_DONE, or an error below 0.
int im_step(im_engine *engine, im_step_call *call);
// y[rows][pad16(w->rows)] = w times x[rows][pad32(w->cols)], x in 16 bits when `fine`; for tests and measurements
int im_linear(im_engine *engine, const im_matrix *w, const float *x, int rows, int fine, float *y);
void im_embed(const im_matrix *w, int32_t token, float *x);
int32_t im_sample_one(const float *logits, int32_t n, const im_sampling *sampling, uint32_t position);
double im_read_bandwidth(im_engine *engine, const void *data, size_t bytes);  // reads all of it; returns a checksum
// END SHARED WITH PYTHON
