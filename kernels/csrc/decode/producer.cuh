// SPDX-License-Identifier: Apache-2.0
// The producer warp and the fetchers: everything that is brought into shared memory.
#pragma once
#include "block.cuh"

namespace mxfp4_sm120 {
namespace decode {

// The producer warp: chooses the block's work tiles, and copies their weights, a stage after another. The tail is for
// whoever comes first, since multiprocessors don't get weights equally fast. So the first experts' activations are
// finished when down begins with these.
template <typename S>
__device__ __forceinline__ void produce_weights(Block<S> block, int lane) {
  const MoeArgs& args = block.args;
  Ring& ring = block.weights;
#pragma unroll 1
  for (int down = 0; down < 2; ++down) {
    const int tile_rows = (down ? args.H : 2 * args.I) / TILE,
              bytes_each = (down ? args.I : args.H) / TILE * TILE_BYTES;
    const int count = block.rt.groups * tile_rows;
    const TileScheduler scheduler(count);
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      int n = scheduler.work_tile(turn);
      if (turn >= scheduler.count) {
        if (lane == 0) n = gridDim.x * scheduler.count + atomicAdd(block.exchange->taken + down, 1);
        n = __shfl_sync(~0u, n, 0);
        if (n >= count) break;
      }
      const int group = n / tile_rows, tile_row = n - group * tile_rows;
      block.work_tiles.put(WorkTile::of(down, group, tile_row), lane);
      const uint8_t* src = (down ? args.w2 : args.w13) +
                           (static_cast<int64_t>(block.rt.expert_of(group)) * tile_rows + tile_row) * bytes_each;
#pragma unroll 1
      for (int left = bytes_each; left > 0; left -= S::STAGE_BYTES) {
        const int bytes = min(left, S::STAGE_BYTES);
        ring.wait_empty();
        copy_to_stage(ring, smem_addr(block.smem) + ring.stage * S::STAGE_BYTES, src, bytes, lane);
        src += bytes;
        ring.advance();
      }
    }
  }
  block.work_tiles.put(WorkTile::none(), lane);
}

// A fetcher warp: activations of the experts to come, every so many-th row. An expert that many tokens chose is left to
// the MMA warps.
template <typename S>
__device__ __forceinline__ void fetch_activations(Block<S> block, int fetcher, int lane) {
  const MoeArgs& args = block.args;
  const auto& rt = block.rt;
  Ring& acts = block.acts;
  int input_of = -1;
#pragma unroll 1
  for (WorkTile work = block.work_tiles.get(lane); work.exists(); work = block.work_tiles.get(lane)) {
    if (!work.down() || work.group() == input_of) continue;
    input_of = work.group();
    const uint32_t chosen = rt.tokens_of(input_of);
    if (__popc(chosen) > S::FETCHERS) continue;
#pragma unroll 1
    for (uint32_t left = chosen; left != 0; left &= left - 1) {
      const int token = __ffs(left) - 1;
      if (acts.stage == fetcher) {
        acts.wait_empty();
        fetch_row<S::ROW_BYTES>(block.smem + S::ACTS + fetcher * S::ROW_BYTES, block.act(rt.place(input_of, token)),
                                args.I * 2, lane);
        mbar_arrive(acts.full());
      }
      acts.advance();
    }
  }
}

}  // namespace decode
}  // namespace mxfp4_sm120
