// SPDX-License-Identifier: Apache-2.0
// The one instruction that SM 12.x has and other cards lack, and its twin for all others.
//
// D[16, 8] += sum over k of (A[16, 64] * scale) x (B[64, 8] * scale): e2m1 codes, an E8M0 scale for each row of A and
// column of B and 32 of K (PTX ISA, "Matrix Fragments for mma.m16n8k64" and "Block Scaling for mma.sync"; CUTLASS's
// mma_traits_sm120.hpp agrees). Lane 4g + q holds, eight codes in a word, the first in the lowest bits:
//
//      A   a[0] row g, a[1] row g + 8: k = 8q .. 8q + 7         a[2], a[3] the same rows: k = 32 + 8q ..
//      B   b[0] column g: k = 8q .. 8q + 7                      b[1] column g: k = 32 + 8q ..
//      D   d[0], d[1] row g, columns 2q, 2q + 1                 d[2], d[3] row g + 8
//
// A lane's word of scales has two pairs: bytes 0, 1 and bytes 2, 3. BYTE (0 or 2) says which is meant, for k 0 .. 31
// and 32 .. 63. THREAD says which lanes of each quad are asked, so that one word serves several products:
//
//      A   row g: lane 4g + 2 THREAD, row g + 8: lane 4g + 2 THREAD + 1   (THREAD 0 or 1)
//      B   column g: lane 4g + THREAD                                      (THREAD 0 .. 3)
#pragma once
#include "../common/ptx.cuh"
#include "ptx.cuh"

namespace mxfp4_sm120 {
namespace fp4 {

// Which scales a product takes.
template <int A_BYTE, int A_THREAD, int B_BYTE, int B_THREAD>
struct Selector {
  static_assert(A_BYTE % 2 == 0 && A_BYTE < 4 && A_THREAD < 2 && B_BYTE % 2 == 0 && B_BYTE < 4 && B_THREAD < 4);
};

// An E8M0 scale as a float: 2^(byte - 127), the smallest a subnormal; 255 is NaN.
__device__ __forceinline__ float scale_value(uint32_t byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fffffffu : byte << 23);
}

// Codes j and j + 4 of a word as two FP16 numbers, 2^-14 times the codes' values: an e2m1 code's exponent and mantissa
// are FP16's lowest exponent bits and highest mantissa bit. 0.5 is a subnormal, exactly.
__device__ __forceinline__ uint32_t two_fp16(uint32_t codes, int j) {
  const uint32_t high = codes << (12 - 4 * j);  // code j in bits 15 .. 12, code j + 4 in bits 31 .. 28
  return (high & 0x80008000u) | ((high >> 3) & 0x0e000e00u);
}

// The same result from ordinary products. Those of a block of 32 are multiples of 0.25 below 1152: their sum is exact
// in any order. The scales come after it, B's first, which are never large: the product is exact unless it is beyond
// FP32.
template <int A_BYTE, int A_THREAD, int B_BYTE, int B_THREAD>
__device__ __forceinline__ void mma_mxf4_twin(Selector<A_BYTE, A_THREAD, B_BYTE, B_THREAD>, float (&d)[4],
                                              const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scales_a,
                                              uint32_t scales_b) {
  const int lane = threadIdx.x % 32, quad = lane & ~3, columns = 8 * (lane & 3);
  const uint32_t row_scales[2] = {__shfl_sync(~0u, scales_a, quad + 2 * A_THREAD),
                                  __shfl_sync(~0u, scales_a, quad + 2 * A_THREAD + 1)};
  const uint32_t column_scales[2] = {__shfl_sync(~0u, scales_b, columns + B_THREAD),
                                     __shfl_sync(~0u, scales_b, columns + 4 + B_THREAD)};
  // Not unrolled: what is made of one product's operands shall not be kept for others, there are too few registers.
#pragma unroll 1
  for (int block = 0; block < 2; ++block) {
    const uint32_t upper = block == 0 ? a[0] : a[2], lower = block == 0 ? a[1] : a[3],
                   column = block == 0 ? b[0] : b[1];
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      mma_fp16(sums, two_fp16(upper, j), two_fp16(lower, j), two_fp16(upper, j + 1), two_fp16(lower, j + 1),
               two_fp16(column, j), two_fp16(column, j + 1));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float by_row = scale_value(row_scales[i / 2] >> 8 * (A_BYTE + block) & 0xff);
      const float by_column = scale_value(column_scales[i % 2] >> 8 * (B_BYTE + block) & 0xff);
      d[i] += sums[i] * static_cast<float>(1 << 28) * by_column * by_row;
    }
  }
}

template <int A_BYTE, int A_THREAD, int B_BYTE, int B_THREAD>
__device__ __forceinline__ void mma_mxf4(Selector<A_BYTE, A_THREAD, B_BYTE, B_THREAD> selector, float (&d)[4],
                                         const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scales_a,
                                         uint32_t scales_b) {
#ifdef MXFP4_SM120_BLOCK_SCALED
  mma_mxf4_instruction<A_BYTE, A_THREAD, B_BYTE, B_THREAD>(d, a, b, scales_a, scales_b);
#else
  mma_mxf4_twin(selector, d, a, b, scales_a, scales_b);
#endif
}

}  // namespace fp4
}  // namespace mxfp4_sm120
