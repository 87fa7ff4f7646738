#if defined(__aarch64__)
#include <math.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define IM_DOTPROD
#include "isthmus.h"
#include "simd_neon.h"
#include "kernels_body.h"
KERNELS(im_kernels_neon_dot, "neon-dotprod");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
