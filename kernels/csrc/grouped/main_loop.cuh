// SPDX-License-Identifier: Apache-2.0
// The main loop: what a work tile's time goes into.
#pragma once
#include "loader.cuh"

namespace mxfp4_sm120 {
namespace grouped {

// `step` for each of a work tile's k_tiles tiles of K, with how many tiles the loader's pointers lag behind: they move
// on every second step. In runs, of as many steps as the loader has left in its work tile, then in its next.
template <typename L, typename Step>
__device__ __forceinline__ void for_each_tile(int k_tiles, L& loader, Step& step) {
  for (int k = k_tiles; k > 0;) {
    int run = min(k, loader.left);
    const int more = k - loader.left;  // one register for what remains of this work tile, or of the loader's
    for (;;) {
      step(0);
      if (run == 1) {
        loader.advance(1);
        break;
      }
      step(1);
      loader.advance(2);
      if ((run -= 2) == 0) break;
    }
    k = max(more, 0);
    loader.left = max(-more, 0);
    if (loader.left == 0) loader.begin_if_ready();
  }
}

// acc += weights x tokens over one work tile, whose first stage has landed; the next one's has when it returns.
// Software-pipelined: while the tensor cores work on a tile, its lower half is decoded, the next one's tokens take
// the place of its own, and the next one's upper half is decoded, so that a warp always has products to issue. GROUPS:
// column groups that hold tokens, at most.
template <int GROUPS, typename S, typename L>
__device__ __forceinline__ void main_loop(S, float (&acc)[2][S::COLUMN_GROUPS][4], L& loader, uint32_t smem,
                                          int column_group, int k_tiles, uint32_t& stage) {
  constexpr int WEIGHT_BYTES = S::WEIGHT_BYTES, STAGE_BYTES = S::STAGE_BYTES, STAGES = S::STAGES;
  // Column groups whose tokens are in registers: all or, where the accumulators leave no room for so many, half.
  constexpr int HELD = GROUPS <= 7 ? GROUPS : (GROUPS + 1) / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t my_tile = smem + warp * TILE_BYTES + lane * 16;
  const uint32_t my_scales = smem + warp * TILE_BYTES + TILE_CODES + (lane >> 2) * 4;
  const uint32_t my_tokens = smem + WEIGHT_BYTES + column_group * 512 + lane * 16;
  const uint32_t copied_tokens = smem + WEIGHT_BYTES + threadIdx.x * 16;
  auto after = [](uint32_t stage) { return stage + STAGE_BYTES == S::RING_BYTES ? 0 : stage + STAGE_BYTES; };
  auto tile_of = [&](uint32_t stage) { return PackedTile{lds128(my_tile + stage), lds32(my_scales + stage)}; };
  auto tokens_of = [&](uint32_t stage, int n) { return lds128(my_tokens + stage + n * 512); };

  uint4 b[HELD];
#pragma unroll
  for (int n = 0; n < HELD; ++n)
    b[n] = tokens_of(stage, n);
  PackedTile tile = tile_of(stage);
  AFragments upper = decode_half_tile(tile, 0);

  auto step = [&](int ahead) {
    const uint32_t next = after(stage);
    const AFragments lower = decode_half_tile(tile, 1);
#pragma unroll
    for (int n0 = 0; n0 < GROUPS; n0 += HELD) {
      if (n0 + HELD >= GROUPS) {
        // This thread's copies of the next stage have landed and, after the barrier, everyone's; and every warp
        // holds what it still needs of this stage in registers: refill it.
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        loader.load_stage(my_tile + stage, copied_tokens + stage, ahead);
        tile = tile_of(next);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const AFragments& a = s % 2 == 0 ? upper : lower;
        const int k16 = s / 2;
#pragma unroll
        for (int i = 0; i < HELD && n0 + i < GROUPS; ++i)
          mma_bf16(acc[s % 2][n0 + i], a.lo[2 * k16], a.hi[2 * k16], a.lo[2 * k16 + 1], a.hi[2 * k16 + 1],
                   k16 == 0 ? b[i].x : b[i].z, k16 == 0 ? b[i].y : b[i].w);
      }
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        if (n0 + HELD >= GROUPS)
          b[i] = tokens_of(next, i);
        else if (n0 + HELD + i < GROUPS)
          b[i] = tokens_of(stage, n0 + HELD + i);
    }
    upper = decode_half_tile(tile, 0);
    stage = next;
  };
  for_each_tile(k_tiles, loader, step);
}

// The main loop for so many n8 blocks.
template <typename S, int GROUPS = loop_size<S>(1), typename... Args>
__device__ __forceinline__ void run(int column_groups, Args&... args) {
  if constexpr (GROUPS < S::COLUMN_GROUPS)
    if (column_groups > GROUPS) return run<S, loop_size<S>(GROUPS + 1)>(column_groups, args...);
  main_loop<GROUPS>(S{}, args...);
}

}  // namespace grouped
}  // namespace mxfp4_sm120
