// SPDX-License-Identifier: Apache-2.0
// What blocks hand each other through the workspace: activations and results, that say by themselves whether they are
// there.
//
// Nothing is 0, and a value v is written as its complement ~v, in words of 32 bits: two BF16 activations, or one FP32
// result. Whoever waits loads the word until it isn't 0, and complements it. So 1.5 and -2 as BF16, 0xc0003fc0, travel
// as 0x3fffc03f, and two zeros as 0xffffffff. Only a word of ones could not travel, two NaNs of a kind that no
// arithmetic here makes (an instruction that makes a NaN makes 0x7fff, or passes one on that isn't all ones). A word is
// written at once, so who sees it sees all of it; no fence, counter or barrier of the grid is needed.
#pragma once
#include "../common/ptx.cuh"
#include "../workspace.h"

namespace mxfp4_sm120 {
namespace decode {

// Eight activations as blocks exchange them, and whether all of them are there.
__device__ __forceinline__ uint4 complement(uint4 v) { return {~v.x, ~v.y, ~v.z, ~v.w}; }
__device__ __forceinline__ bool all_there(uint4 v) { return min(min(v.x, v.y), min(v.z, v.w)) != 0; }

__device__ __forceinline__ uint4 read_global(const uint8_t* at) { return __ldcg(reinterpret_cast<const uint4*>(at)); }

// A row of exchanged activations into shared memory, each 16 bytes as soon as they are there.
template <int MAX_BYTES>
__device__ __forceinline__ void fetch_row(uint8_t* dst, const uint16_t* row, int bytes, int lane) {
  constexpr int PIECES = (MAX_BYTES + 511) / 512;
  const uint4* const src = reinterpret_cast<const uint4*>(row) + lane;
  const int pieces = max(0, (bytes / 16 - lane + 31) / 32);
  uint4 v[PIECES];
  uint32_t left = (1u << pieces) - 1;
  uint32_t rounds = MOST_ROUNDS;
#pragma unroll 1
  do {
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
      if (left >> p & 1) v[p] = load_relaxed(src + 32 * p);
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
      if ((left >> p & 1) && all_there(v[p])) {
        left &= ~(1u << p);
        reinterpret_cast<uint4*>(dst)[32 * p + lane] = complement(v[p]);
      }
  } while (left != 0 && --rounds != 0);
  trap_if_none_left(rounds);
}

}  // namespace decode
}  // namespace mxfp4_sm120
