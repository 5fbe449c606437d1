// AVX2 and FMA.
#include "attention_avx2.h"
#include "attention_blocks_avx2.h"
#include "decode.h"
#include "isa_256.h"

const sparity::Kernels sparity::avx2_kernels = kernels_256();
const sparity::DecodeKernels sparity::avx2_decode = decode_kernels();
const sparity::AttentionKernels sparity::avx2_attention = attention_kernels<Attention256>();
const sparity::BlockKernels sparity::avx2_blocks = block_kernels<FloatPanels<Blocks256>>();
