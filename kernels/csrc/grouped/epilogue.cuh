// SPDX-License-Identifier: Apache-2.0
// The epilogue: what becomes of a work tile's accumulators.
#pragma once
#include "../common/pack.cuh"
#include "scheduler.cuh"

namespace mxfp4_sm120 {
namespace grouped {

// Where a thread's outputs go. Column c (0 or 1) of two m16 tiles' accumulators is four adjacent rows of one slot.
template <bool GATE_UP>
struct Output {
  uint8_t* first;  // in the first slot
  int stride;      // bytes from a slot to the next
  float4 bias;
  static constexpr float SCALE = GATE_UP ? 1.f : PACKED_SCALE;

  __device__ __forceinline__ Output(const Gemm& p, int expert, int slot, int row)
      : stride(GATE_UP ? p.rows : 2 * p.rows), bias{0.f, 0.f, 0.f, 0.f} {
    first = static_cast<uint8_t*>(p.out) + static_cast<int64_t>(slot) * stride + (GATE_UP ? row : 2 * row);
    if (p.bias == nullptr) return;
    const uint2 v = *reinterpret_cast<const uint2*>(p.bias + static_cast<int64_t>(expert) * p.rows + row);
    const float2 lo = unpack_bf16x2(v.x), hi = unpack_bf16x2(v.y);
    bias = {lo.x * SCALE, lo.y * SCALE, hi.x * SCALE, hi.y * SCALE};
  }

  // Without a branch around what is not to be stored: the compiler overlaps one slot's arithmetic with the next one's.
  __device__ __forceinline__ void store(const Activation& activation, bool exists, int slot, const float (&lo)[4],
                                        const float (&hi)[4], int c) const {
    constexpr float scale = ACCUMULATOR_SCALE * SCALE;
    const float v[4] = {lo[c] * scale + bias.x, lo[2 + c] * scale + bias.y, hi[c] * scale + bias.z,
                        hi[2 + c] * scale + bias.w};
    uint8_t* const at = first + static_cast<int64_t>(slot) * stride;
    if constexpr (GATE_UP)
      store_if(exists, at, pack_bf16x2(activate(v[0], v[1], activation), activate(v[2], v[3], activation)));
    else
      store_if(exists, at, pack_four(v));
  }
};

// A warp's outputs of a work tile.
template <bool GATE_UP, typename S>
__device__ __forceinline__ void store(S, const Layer& p, const WorkTile& work, const Part<S>& part,
                                      const float (&acc)[2][S::COLUMN_GROUPS][4]) {
  const Gemm& gemm = p.gemms[!GATE_UP];
  const int lane = threadIdx.x % 32, row = part.tile_row * TILE + 4 * (lane >> 2);
  if (row >= gemm.rows) return;
  const int token = part.column_group * 8 + 2 * (lane & 3);
  const int end = min(int{work.tokens}, (part.column_group + part.column_groups) * 8) - token;
  const Output<GATE_UP> output(gemm, work.expert, work.begin + token, row);
#pragma unroll
  for (int n = 0; n < S::COLUMN_GROUPS; ++n) {
    if (n % 4 == 0 && n >= part.column_groups) break;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      output.store(p.activation, 8 * n + c < end, 8 * n + c, acc[0][n], acc[1][n], c);
  }
}

}  // namespace grouped
}  // namespace mxfp4_sm120
