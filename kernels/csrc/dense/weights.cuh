// SPDX-License-Identifier: Apache-2.0
// The two kinds of weights, as they lie in a checkpoint or are quantized to: row-major, loaded straight into registers.
//
// A step of the main loop is 64 k of 8 weight rows by 16 tokens: four products m16n8k16 with the tokens as A (rows g
// and g + 8 of lane 4g + q) and the weights as B (column g). Which k a product's k means is free, as long as both sides
// agree. So a lane takes 16 adjacent bytes of its row at a time:
//
//      lane            q = 0      q = 1      q = 2      q = 3
//      bf16, first     k  0..7     8..15     16..23     24..31      products 0 and 1
//      bf16, second    k 32..39   40..47     48..55     56..63      products 2 and 3
//      int8            k  0..15   16..31     32..47     48..63      products 0 to 3, four k each
#pragma once
#include "../common/ptx.cuh"
#include "dense.h"

namespace mxfp4_sm120 {
namespace dense {

constexpr int STEP = 64;  // k

// A lane's weights of one row in a step, as eight bf16 pairs: product j takes `pair(2 j)` and `pair(2 j + 1)`.
struct Bf16 {
  static constexpr bool INT8 = false;
  static constexpr int BYTES = 2;  // of a weight
  uint4 first, second;

  // Where the i-th eight k of lane q begin (of 0 and 1).
  __device__ __forceinline__ static int k_of(int i, int q) { return 32 * i + 8 * q; }
  // `left`: of K, from the step's first k on; zeros beyond, or if the row doesn't exist.
  __device__ __forceinline__ void load(const uint8_t* at, const uint16_t*, bool exists, int left, int) {
    first = load_once_if(exists && left > 0, at);
    second = load_once_if(exists && left > 32, at + 32 * BYTES);
  }
  __device__ __forceinline__ uint2 pairs(int j) const {
    return j == 0   ? uint2{first.x, first.y}
           : j == 1 ? uint2{first.z, first.w}
           : j == 2 ? uint2{second.x, second.y}
                    : uint2{second.z, second.w};
  }
};

// Two of a word's int8 numbers as bf16, times a scale (its bf16 in both halves, and minus it). 0x43 in front of a
// byte's low seven bits is 128 + those; in front of its top bit alone it is 128, or 256 if the bit is set. The first
// less the second is the number in two's complement: 5 is 133 - 128, and -5 = 0xfb is 128 + 0x7b - 256 = 251 - 256.
// Scaled, the second is exact, and the difference is rounded once.
__device__ __forceinline__ uint32_t scaled_pair(uint32_t word, int first_byte, uint32_t scale, uint32_t minus_scale) {
  const uint32_t bytes = __byte_perm(word, 0x43434343u, first_byte == 0 ? 0x4140 : 0x4342);
  const uint32_t low = bytes & 0xff7fff7fu, top = bytes & 0xff80ff80u;
  return fma_bf16x2(low, scale, mul_bf16x2_by_lo(top, minus_scale));
}

// INT8 with a bf16 scale for each 32 along K: 8.5 bits a weight.
struct Int8 {
  static constexpr bool INT8 = true;
  static constexpr int BYTES = 1;
  uint4 codes;
  uint32_t scale;

  __device__ __forceinline__ static int k_of(int i, int q) { return 16 * q + 8 * i; }
  __device__ __forceinline__ void load(const uint8_t* at, const uint16_t* scale_at, bool exists, int left, int q) {
    exists = exists && left > k_of(0, q);
    codes = load_once_if(exists, at);
    scale = load_u16_if(exists, scale_at);
  }
  __device__ __forceinline__ uint2 pairs(int j) const {
    const uint32_t word = j == 0 ? codes.x : j == 1 ? codes.y : j == 2 ? codes.z : codes.w;
    const uint32_t both = scale * 0x10001u, minus = both ^ 0x80008000u;
    return {scaled_pair(word, 0, both, minus), scaled_pair(word, 2, both, minus)};
  }
};

}  // namespace dense
}  // namespace mxfp4_sm120
