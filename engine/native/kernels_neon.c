#if defined(__aarch64__)
#include <math.h>
#include <string.h>
#include "isthmus.h"
#include "simd_neon.h"
#include "kernels_body.h"
KERNELS(im_kernels_neon, "neon");
#endif
