#if defined(__x86_64__)
#include <math.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "isthmus.h"
#include "simd_avx2.h"
#include "kernels_body.h"
KERNELS(im_kernels_avx2, SIMD_NAME);
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
