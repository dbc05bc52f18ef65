// SPDX-License-Identifier: Apache-2.0
// The two kinds of weights, as they lie in a checkpoint or are quantized to, row-major; and how a warp multiplies by
// them, a tile of 8 rows and 64 k at a time, which has come to shared memory before.
//
// Four products m16n8k16 take the tokens as A (rows g and g + 8 of lane 4g + q) and the weights as B (column g). Which
// k a product's k means is free, as long as both sides agree: lane 4g + q takes the eight adjacent k from 8q on of each
// half, the first four of them for the half's first product.
//
//      lane               q = 0      q = 1      q = 2      q = 3
//      first half         k  0..7     8..15     16..23     24..31      products 0 and 1
//      second half        k 32..39   40..47     48..55     56..63      products 2 and 3
//
// So all k of two products have the same INT8 scale: the products are of whole numbers, exact in BF16, and the FP32 sum
// of 32 of them is scaled, not each weight.
#pragma once
#include "../common/ptx.cuh"
#include "dense.h"

namespace mxfp4_sm120 {
namespace dense {

constexpr int STEP = DENSE_STEP, HALF = DENSE_BLOCK;  // k

// A row's two scales of a step: INT8 weights have bf16 [K / 64, N, 2].
__device__ __forceinline__ const uint16_t* scales_of(const uint16_t* scales, int N, int step, int row) {
  return scales + (static_cast<int64_t>(step) * N + row) * 2;
}

// A word's four int8 numbers, each plus 128: what `whole_pair` takes.
__device__ __forceinline__ uint32_t offset_by_128(uint32_t word) { return word ^ 0x80808080u; }

// Two of them as bf16, a 64th of each number. A byte u alone is the bf16 u * 2^-133: below 128 a subnormal, and from
// there on the smallest normal numbers, which go on in the same steps. Times 2^127 less 2, exactly: (u - 128) / 64.
constexpr float OF_WHOLE = 64.f;
__device__ __forceinline__ uint32_t whole_pair(uint32_t offset, int first_byte) {
  return fma_bf16x2(__byte_perm(offset, 0, first_byte == 0 ? 0x4140 : 0x4342), 0x7f007f00u, 0xc000c000u);
}

// A lane's x in a half of a step: eight k of token g, and of token g + 8 where a product's 16 tokens are there.
template <bool BOTH>
struct HalfOfTokens {
  uint4 of[BOTH ? 2 : 1];
};

// The same, as the half's two products take it: four registers in a row each. Of the loads' registers the compiler
// would make those anew for each row tile, if it saw that these are the same. `zero` is 0, which it doesn't know.
template <bool BOTH>
struct TokenFragments {
  static constexpr int SUMS = BOTH ? 4 : 2;  // of a product's four that belong to tokens
  uint32_t a[2][4];
  __device__ __forceinline__ TokenFragments(const HalfOfTokens<BOTH>& x, uint32_t zero) {
    const uint4 upper = x.of[0], lower = BOTH ? x.of[BOTH ? 1 : 0] : uint4{0, 0, 0, 0};
    const uint32_t words[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      a[i / 4][i % 4] = BOTH || i % 2 == 0 ? words[i / 4][i % 4] | zero : words[i / 4][i % 4 - 1] & zero;
  }
  template <int PRODUCT>
  __device__ __forceinline__ void multiply(float (&acc)[4], uint32_t b0, uint32_t b1) const {
    mma_bf16(acc, a[PRODUCT][0], a[PRODUCT][1], a[PRODUCT][2], a[PRODUCT][3], b0, b1);
  }
};

// A stage is a step's row tiles; `Half` is what a lane takes of it for a half.
template <int TILES>
struct Bf16 {
  static constexpr bool INT8 = false;
  static constexpr int BYTES = 2, STAGE_BYTES = TILES * 1024;  // of a weight; of a stage: [tile][half][lane][16 bytes]
  static constexpr float OF_SUMS = 1.f;                        // what a sum is to be multiplied with

  // Copies what this lane will read of a tile: `at` is its row's first k of the step.
  __device__ __forceinline__ static void copy(uint32_t stage, int n, const uint8_t* at, const uint16_t*, bool exists) {
    const int lane = threadIdx.x % 32, q = lane % 4;
    cp_async16_if(exists, stage + 1024 * n + lane * 16, at + 8 * q * BYTES);
    cp_async16_if(exists, stage + 1024 * n + 512 + lane * 16, at + (HALF + 8 * q) * BYTES);
  }
  struct Half {
    uint4 w[TILES];
    __device__ __forceinline__ Half(uint32_t stage, int half) {
#pragma unroll
      for (int n = 0; n < TILES; ++n)
        w[n] = lds128(stage + 1024 * n + 512 * half + threadIdx.x % 32 * 16);
    }
    // acc += tokens . tile n
    template <bool BOTH>
    __device__ __forceinline__ void multiply(float (&acc)[4], int n, const TokenFragments<BOTH>& x) const {
      x.template multiply<0>(acc, w[n].x, w[n].y);
      x.template multiply<1>(acc, w[n].z, w[n].w);
    }
  };
};

// Where a half of a row's INT8 codes begins in a stage; the other is 32 bytes further or before: they change places in
// rows 2, 3, 6, 7, so that a half warp that reads a half of four rows reads from all banks.
__device__ __forceinline__ uint32_t half_of_row(int row, int half) { return row * STEP + (half ^ row / 2 % 2) * HALF; }

// INT8 with a bf16 scale for each 32 along K: 8.5 bits a weight. A stage is
//
//      codes     [tile][row][64 bytes]
//      scales    [tile][row][of the first and of the second half]
template <int TILES>
struct Int8 {
  static constexpr bool INT8 = true;
  static constexpr int BYTES = 1, SCALES = TILES * 512, STAGE_BYTES = (SCALES + TILES * 32 + 63) / 64 * 64;
  static constexpr float OF_SUMS = OF_WHOLE;

  // The warp copies all; a lane 16 bytes of its row, and of each row one lane the scales.
  __device__ __forceinline__ static void copy(uint32_t stage, int n, const uint8_t* at, const uint16_t* scale,
                                              bool exists) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    cp_async16_if(exists, stage + 512 * n + half_of_row(g, q / 2) + q % 2 * 16, at + 16 * q);
    if (q == 0) cp_async4_if(exists, stage + SCALES + 32 * n + 4 * g, scale);
  }
  struct Half {
    uint4 w[TILES];
    float scale[TILES][2];  // of rows 2q and 2q + 1, this lane's in the products' result
    __device__ __forceinline__ Half(uint32_t stage, int half) {
      const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const uint2 loaded = lds64(stage + 512 * n + half_of_row(g, half) + 8 * q);
        const uint2 codes = {offset_by_128(loaded.x), offset_by_128(loaded.y)};
        w[n] = {whole_pair(codes.x, 0), whole_pair(codes.x, 2), whole_pair(codes.y, 0), whole_pair(codes.y, 2)};
        const uint2 scales = lds64(stage + SCALES + 32 * n + 8 * q);
        scale[n][0] = __uint_as_float(half == 0 ? scales.x << 16 : scales.x & 0xffff0000u);
        scale[n][1] = __uint_as_float(half == 0 ? scales.y << 16 : scales.y & 0xffff0000u);
      }
    }
    template <bool BOTH>
    __device__ __forceinline__ void multiply(float (&acc)[4], int n, const TokenFragments<BOTH>& x) const {
      float whole[4] = {0.f, 0.f, 0.f, 0.f};
      x.template multiply<0>(whole, w[n].x, w[n].y);
      x.template multiply<1>(whole, w[n].z, w[n].w);
#pragma unroll
      for (int i = 0; i < TokenFragments<BOTH>::SUMS; ++i)
        acc[i] += scale[n][i % 2] * whole[i];
    }
  };
};

}  // namespace dense
}  // namespace mxfp4_sm120
