// SPDX-License-Identifier: Apache-2.0
// The loader: all threads copy records of gathered tokens and weight tiles into the ring.
#pragma once
#include "layer.cuh"

namespace mxfp4_sm120 {
namespace fp4 {

template <typename S>
struct Loader {
  const uint8_t* record = nullptr;   // of this thread's token, at the next step: its half of a term
  const uint8_t* weights = nullptr;  // this lane's first chunk of its warp's tile row, at the next step
  uint32_t destination = 0;          // of the next stage, in the ring
  int left = 0;                      // steps that are still to be copied
  bool half = false;                 // K ends in half a step

  // Where a tile row or a token doesn't exist, the last one is copied in its place and what comes of it not stored.
  __device__ __forceinline__ void begin(const Layer& p, const WorkTile& work) {
    const Gemm& gemm = p.gemms[work.down];
    const int tile_rows = gemm.rows / TILE, tiles = gemm.K / TILE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    left = steps_of(gemm.K);
    half = tiles % 2 != 0;
    destination = 0;
    const int at = work.begin + min(static_cast<int>(threadIdx.x) / 2, work.tokens - 1);
    record = reinterpret_cast<const uint8_t*>(gemm.in) +
             static_cast<int64_t>(work.down ? at : p.order[at]) * left * S::RECORD_BYTES + threadIdx.x % 2 * CODE_BYTES;
    const int tile_row = min(work.row_block * S::WARPS + warp, tile_rows - 1);
    weights =
        gemm.weights + (static_cast<int64_t>(work.expert) * tile_rows + tile_row) * tiles * TILE_BYTES + lane * 16;
  }

  // Starts the copies of the next stage, and always closes a group of them.
  __device__ __forceinline__ void load_stage(uint32_t smem) {
    if (left > 0) {
      const uint32_t stage = smem + destination, token = threadIdx.x / 2, side = threadIdx.x % 2;
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
      for (int t = 0; t < S::TERMS; ++t)
        cp_async16(stage + (2 * t + side) * S::PLANE_BYTES + token * CODE_BYTES, record + t * TERM_BYTES);
      if (side == 0) cp_async16(stage + S::SCALES_AT + token * SCALE_BYTES, record + S::TERMS * TERM_BYTES);
      // Where K ends in half a step, the first tile once more: activations are 0 there, and nothing beyond is read.
      const uint32_t tiles = stage + S::WEIGHTS_AT + warp * 2 * TILE_BYTES + lane * 16;
      const bool single = half && left == 1;
#pragma unroll
      for (int i = 0; i < (2 * TILE_CHUNKS + 31) / 32; ++i) {
        const int chunk = lane + 32 * i;
        if (chunk < 2 * TILE_CHUNKS)
          cp_async16(tiles + i * 512, weights + i * 512 - (single && chunk >= TILE_CHUNKS ? TILE_BYTES : 0));
      }
      record += S::RECORD_BYTES;
      weights += 2 * TILE_BYTES;
      destination = destination + S::STAGE_BYTES == S::RING_BYTES ? 0 : destination + S::STAGE_BYTES;
      --left;
    }
    cp_async_commit();
  }

  // All stages but one: the main loop fills that as its first.
  __device__ __forceinline__ void fill(const Layer& p, const WorkTile& work, uint32_t smem) {
    begin(p, work);
    for (int s = 0; s < S::STAGES - 1; ++s)
      load_stage(smem);
  }
};

}  // namespace fp4
}  // namespace mxfp4_sm120
