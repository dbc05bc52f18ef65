// What the two grouped GEMMs share: the problem, and how an output leaves the accumulators.
#pragma once
#include "dispatch.h"
#include "layer.cuh"

namespace mxfp4_sm120 {

struct Gemm {
  const uint8_t* weights;  // [experts, rows/32, K/32, TILE_BYTES]
  const uint16_t* bias;    // bf16 [experts, rows] or nullptr
  const uint16_t* in;      // bf16 [*, K]: the tokens (gate-up) or activations in sorted order (down)
  void* out;               // gate-up: bf16 [slots, rows/2]; down: fp32 [slots, rows]; both in sorted order
  const int* offsets;      // [experts + 1] where each expert's slots begin
  const int* order;        // [slots] the tokens, in sorted order
  int experts, rows, K;
  bool swiglu_oai;
};

// before[e]: the token tiles of the experts below e; before[experts]: of all. `tiles_of` says how many so many tokens
// make. For one warp.
template <typename TilesOf>
__device__ __forceinline__ void count_tiles(int* before, const int* offsets, int experts, TilesOf tiles_of) {
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int e0 = 0; e0 < experts; e0 += 32) {
    const int e = e0 + lane;
    const int n = inclusive_scan(e < experts ? tiles_of(offsets[e + 1] - offsets[e]) : 0, lane);
    if (e < experts) before[e + 1] = sum + n;
    sum += __shfl_sync(~0u, n, 31);
  }
  if (lane == 0) before[0] = 0;
}

// Of four adjacent rows.
__device__ __forceinline__ float4 bias_of(const Gemm& p, int expert, int row) {
  if (p.bias == nullptr) return {0.f, 0.f, 0.f, 0.f};
  const uint2 v = *reinterpret_cast<const uint2*>(p.bias + static_cast<int64_t>(expert) * p.rows + row);
  const float2 lo = unpack_bf16x2(v.x), hi = unpack_bf16x2(v.y);
  return {lo.x, lo.y, hi.x, hi.y};
}

// Column c (0 or 1) of two m16 tiles' accumulators is four adjacent rows of one slot.
template <bool GATE_UP>
__device__ __forceinline__ void store_rows(const Gemm& p, int slot, int row, const float (&lo)[4], const float (&hi)[4],
                                           int c, float4 bias) {
  const float4 v{lo[c] * ACCUMULATOR_SCALE + bias.x, lo[2 + c] * ACCUMULATOR_SCALE + bias.y,
                 hi[c] * ACCUMULATOR_SCALE + bias.z, hi[2 + c] * ACCUMULATOR_SCALE + bias.w};
  const int64_t at = static_cast<int64_t>(slot) * (GATE_UP ? p.rows / 2 : p.rows) + (GATE_UP ? row / 2 : row);
  if constexpr (GATE_UP)
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at) =
        pack_bf16x2(activate(v.x, v.y, p.swiglu_oai), activate(v.z, v.w, p.swiglu_oai));
  else
    __stcs(reinterpret_cast<float4*>(static_cast<float*>(p.out) + at), v);
}

// Both GEMMs of the layer for many tokens an expert (wide_gemm.cu).
Footprint wide_gemm_footprint();
const char* wide_gemm_forward(const Gemm& gate_up, const Gemm& down, const Device& device, cudaStream_t stream);

}  // namespace mxfp4_sm120
