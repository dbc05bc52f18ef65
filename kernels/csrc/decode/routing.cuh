// SPDX-License-Identifier: Apache-2.0
// A block finds out by itself who goes where, all of the tokens, before its warps part.
#pragma once
#include "../common/routing.cuh"
#include "routing_table.cuh"
#include "scheduler.cuh"

namespace mxfp4_sm120 {
namespace decode {

// Of one token, whose j-th expert lane j has: the weights of this block's first work tile, into L2, while the others
// hear of the routing.
__device__ __forceinline__ void prefetch_first_work_tile(const MoeArgs& args, int expert, int lane) {
  int active = 0, place = 0;
#pragma unroll
  for (int j = 0; j < MAX_TOP_K; ++j) {
    const int other = __shfl_sync(~0u, expert, j);
    active += other >= 0;
    place += other >= 0 && other < expert;
  }
  const int tile_rows = 2 * args.I / TILE, bytes_each = args.H / TILE * TILE_BYTES;
  const TileScheduler scheduler(active * tile_rows);
  const int n = scheduler.work_tile(0);
  const uint32_t has = __ballot_sync(~0u, expert >= 0 && place == n / tile_rows);
  if (scheduler.count == 0 || has == 0) return;
  expert = __shfl_sync(~0u, expert, __ffs(has) - 1);
  const uint8_t* src = args.w13 + (static_cast<int64_t>(expert) * tile_rows + n % tile_rows) * bytes_each;
  for (int at = lane * 128; at < bytes_each; at += 32 * 128)
    prefetch_to_l2(src + at);
}

template <typename Routing>
__device__ __forceinline__ void build_routing(const MoeArgs& args, Routing& rt, typename Routing::Scratch& scratch,
                                              int warp, int lane) {
  const int warps = blockDim.x / 32;
  for (int token = warps - 1 - warp; token < args.M; token += warps) {  // MMA warps last: they have inputs to load
    const Choice c = route_token(args, token, lane, /*merge=*/true);
    if (lane < MAX_TOP_K) {
      rt.expert[token * MAX_TOP_K + lane] = static_cast<int16_t>(c.expert);
      rt.weight[token * MAX_TOP_K + lane] = c.weight;
    }
    if (args.M == 1) prefetch_first_work_tile(args, c.expert, lane);
    if (c.expert >= 0) rt.add(scratch, c.expert, token);
  }
  __syncthreads();
  rt.build(scratch, args);
  __syncthreads();
}

}  // namespace decode
}  // namespace mxfp4_sm120
