#if defined(__x86_64__)
#include <math.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "isthmus.h"
#include "simd_avx512.h"
#include "kernels_body.h"
KERNELS(im_kernels_avx512, SIMD_NAME);
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
