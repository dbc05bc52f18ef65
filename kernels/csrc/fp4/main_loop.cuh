// SPDX-License-Identifier: Apache-2.0
// The main loop: what a work tile's time goes into.
#pragma once
#include "loader.cuh"
#include "mma.cuh"

namespace mxfp4_sm120 {
namespace fp4 {

// A warp's sums: token g of an m16 tile, rows 8q + r and 8q + 4 + r of tile row t are [m][4t + r][0] and [1], token g +
// 8 [2] and [3].
template <typename S>
using Sums = float[S::M_TILES][4 * TILE_ROWS][4];

// The products of one m16 tile and term, m16 tile M of the warp: its scales are pair TERM % 2 of word TERM / 2, in
// lanes of THREAD M % 2.
template <int TERM, int M, int N = 0>
__device__ __forceinline__ void multiply(float (&sums)[4 * TILE_ROWS][4], const uint32_t (&a)[4], uint32_t scales,
                                         const WeightFragments& w) {
  if constexpr (N < 4 * TILE_ROWS) {
    mma_mxf4(Selector<TERM % 2 * 2, M % 2, N / 4 * 2, N % 4>{}, sums[N], a, w.b[N], scales, w.scales);
    multiply<TERM, M, N + 1>(sums, a, scales, w);
  }
}

// All products of a step with one term.
template <int M_TILES, int TERM, int M, typename S>
__device__ __forceinline__ void multiply_term(S, Sums<S>& sums, uint32_t codes, uint32_t stride,
                                              const uint2 (&scales)[(M_TILES + 1) / 2], const WeightFragments& w) {
  if constexpr (M < M_TILES) {
    uint32_t a[4];
    load_matrices(a, codes + TERM * 2 * S::PLANE_BYTES + M * stride);
    multiply<TERM, M>(sums[M], a, TERM < 2 ? scales[M / 2].x : scales[M / 2].y, w);
    multiply_term<M_TILES, TERM, M + 1>(S{}, sums, codes, stride, scales, w);
  }
}
template <int M_TILES, typename S, int TERM = 0>
__device__ __forceinline__ void multiply_terms(S, Sums<S>& sums, uint32_t codes, uint32_t stride,
                                               const uint2 (&scales)[(M_TILES + 1) / 2], const WeightFragments& w) {
  if constexpr (TERM < S::TERMS) {
    multiply_term<M_TILES, TERM, 0>(S{}, sums, codes, stride, scales, w);
    multiply_terms<M_TILES, S, TERM + 1>(S{}, sums, codes, stride, scales, w);
  }
}

// sums += tokens x weights over one work tile, whose first stages are on their way. M_TILES: m16 tiles of the warp.
// While the tensor cores work on a step, the next one's weights are read and made into operands.
template <int M_TILES, typename S>
__device__ __forceinline__ void main_loop(S, Sums<S>& sums, Loader<S>& loader, uint32_t smem, const Part<S>& part,
                                          int steps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2;
  const uint32_t weights = smem + S::WEIGHTS_AT + warp / part.m_stride * (TILE_ROWS * 2 * TILE_BYTES);
  // Operand A's four words are four matrices of 8 x 16 bytes: tokens 0 .. 7 and 8 .. 15, then the same of the other
  // half.
  const uint32_t codes = smem + lane / 16 * S::PLANE_BYTES + (part.m_tile * 16 + lane % 16) * CODE_BYTES;
  const uint32_t codes_stride = part.m_stride * 16 * CODE_BYTES;
  // Lanes 4g + 2t, 4g + 2t + 1 have the scales of tokens g, g + 8 of the m16 tile t of a pair.
  const int row = g + 8 * (lane & 1), second = lane >> 1 & 1;
  const uint32_t scales_of_tokens = smem + S::SCALES_AT + (part.m_tile * 16 + row) * SCALE_BYTES;
  const uint32_t scales_stride = part.m_stride * 16 * SCALE_BYTES;

  cp_async_wait<S::STAGES - 2>();
  __syncthreads();
  WeightFragments w = fragments_of(load_weights(weights, lane));
  uint32_t stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const uint32_t next = stage + S::STAGE_BYTES == S::RING_BYTES ? 0 : stage + S::STAGE_BYTES;
    // This thread's copies of the next stage have landed and, after the barrier, everyone's; and everyone has read the
    // stage before this one: refill it.
    cp_async_wait<S::STAGES - 3>();
    __syncthreads();
    loader.load_stage(smem);
    const PackedWeights packed = load_weights(weights + next, lane);
    uint2 scales[(M_TILES + 1) / 2];
#pragma unroll
    for (int pair = 0; pair < (M_TILES + 1) / 2; ++pair) {
      const int m = 2 * pair + (2 * pair + 1 < M_TILES ? second : 0);
      scales[pair] = lds64(scales_of_tokens + stage + m * scales_stride);
    }
    multiply_terms<M_TILES>(S{}, sums, codes + stage, codes_stride, scales, w);
    w = fragments_of(packed);
    stage = next;
  }
  cp_async_wait<0>();  // of groups without copies
  __syncthreads();     // everyone has read the last stage
}

// The main loop for so many m16 tiles.
template <typename S, int M_TILES = 1>
__device__ __forceinline__ void run(const Part<S>& part, Sums<S>& sums, Loader<S>& loader, uint32_t smem, int steps) {
  if constexpr (M_TILES < S::M_TILES)
    if (part.m_tiles > M_TILES) return run<S, M_TILES + 1>(part, sums, loader, smem, steps);
  main_loop<M_TILES>(S{}, sums, loader, smem, part, steps);
}

}  // namespace fp4
}  // namespace mxfp4_sm120
