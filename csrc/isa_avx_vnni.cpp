// AVX2 and FMA with VNNI of 256 bits: dot products of whole numbers are one instruction.
#include "isa_256.h"

const sparity::Kernels sparity::avx_vnni_kernels = kernels_256();
