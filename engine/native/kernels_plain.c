#include "kernels.h"
#include "simd_plain.h"
#include "kernels_body.h"
KERNELS(im_kernels_plain, SIMD_NAME);
