// SPDX-License-Identifier: Apache-2.0
// The MMA warps: each has the same slice of K of all work tiles, and multiplies it.
#pragma once
#include "../common/weight_tile.cuh"
#include "block.cuh"

namespace mxfp4_sm120 {
namespace decode {

// The B operands of an MMA warp: its slice of a work tile's input, 8 values of column g at each of its tiles.
template <typename S>
struct Slice {
  uint4 b[S::STAGES * S::TILES_PER_WARP];
  int warp, g, q;

  __device__ __forceinline__ Slice(int warp, int lane) : warp(warp), g(lane >> 2), q(lane & 3) {}
  // Of a stage with so many tiles, this warp's.
  __device__ __forceinline__ int first_of(int tiles) const { return tiles * warp / S::MMA_WARPS; }
  __device__ __forceinline__ int count_of(int tiles) const {
    return tiles * (warp + 1) / S::MMA_WARPS - tiles * warp / S::MMA_WARPS;
  }
  // A column's row is a pointer or an address in shared memory, 0 for none: then all its bits are those of `none`.
  template <typename RowOfColumn, typename Read>
  __device__ __forceinline__ void load(int k_tiles, RowOfColumn row_of_column, Read read, uint32_t none = 0) {
    const auto row = row_of_column(g);
#pragma unroll
    for (int c = 0; c < S::STAGES; ++c) {
      const int tiles = max(0, min(S::STAGE_TILES, k_tiles - c * S::STAGE_TILES)), count = count_of(tiles);
      const int first = c * S::STAGE_TILES + first_of(tiles);
#pragma unroll
      for (int t = 0; t < S::TILES_PER_WARP; ++t) {
        b[c * S::TILES_PER_WARP + t] = uint4{none, none, none, none};
        if (row != 0 && t < count) b[c * S::TILES_PER_WARP + t] = read(row + (first + t) * TILE * 2 + q * 16);
      }
    }
  }
  // Exchanged activations, as soon as all are there. Loaded together and then looked at: to look at one before the next
  // is loaded is to wait for it.
  template <typename RowOfColumn>
  __device__ __forceinline__ void load_exchanged(int k_tiles, RowOfColumn row_of_column) {
    bool missing;
    uint32_t rounds = MOST_ROUNDS;
    do {
      load(
          k_tiles, row_of_column, [](const uint8_t* at) { return load_relaxed(reinterpret_cast<const uint4*>(at)); },
          ~0u);
      missing = false;
#pragma unroll
      for (int i = 0; i < S::STAGES * S::TILES_PER_WARP; ++i)
        missing |= !all_there(b[i]);
    } while (missing && --rounds != 0);
    trap_if_none_left(rounds);
#pragma unroll
    for (int i = 0; i < S::STAGES * S::TILES_PER_WARP; ++i)
      b[i] = complement(b[i]);
  }
};

// Fills an MMA warp's slice with a work tile's input.
template <typename S>
__device__ __forceinline__ void load_input(Block<S>& block, Slice<S>& input, WorkTile work, int k_tiles, int lane) {
  const auto& rt = block.rt;
  const int group = work.group();
  if constexpr (S::FETCHERS > 0) {
    const uint32_t chosen = rt.tokens_of(group);
    if (__popc(chosen) <= S::FETCHERS) {
      Ring& acts = block.acts;
      uint32_t mine = 0;
      Ring fetched = acts;
      for (uint32_t left = chosen; left != 0; left &= left - 1) {
        acts.wait_full();
        if (__ffs(left) - 1 == input.g) mine = smem_addr(block.smem) + S::ACTS + acts.stage * S::ROW_BYTES;
        acts.advance();
      }
      input.load(k_tiles, [&](int) { return mine; }, lds128);
      __syncwarp();
      for (int n = __popc(chosen); n > 0; --n) {
        if (lane == 0) mbar_arrive(fetched.empty());
        fetched.advance();
      }
      return;
    }
  }
  auto row_of = [&](int column) -> const uint8_t* {
    const int place = rt.place(group, column);
    return place < 0     ? nullptr
           : work.down() ? reinterpret_cast<const uint8_t*>(block.act(place))
                         : block.x(token_of(place));
  };
  if (work.down())
    input.load_exchanged(k_tiles, row_of);
  else
    input.load(k_tiles, row_of, read_global);
  __syncwarp();
}

// An MMA warp: its slice of K of every work tile, and the sums of that for the epilogue warp.
template <typename S>
__device__ __forceinline__ void multiply_work_tiles(Block<S> block, Slice<S>& input, int lane) {
  constexpr int TILES_PER_WARP = S::TILES_PER_WARP;
  const MoeArgs& args = block.args;
  Ring &weights = block.weights, &sums = block.sums;
  int input_of = -1;
#pragma unroll 1
  for (WorkTile work = block.work_tiles.get(lane); work.exists(); work = block.work_tiles.get(lane)) {
    const int k_tiles = (work.down() ? args.I : args.H) / TILE, columns = block.rt.columns_of(work.group(), args.M);
    if ((work.down() || S::Routing::GATHERED) && work.input() != input_of) {
      input_of = work.input();
      load_input(block, input, work, k_tiles, lane);
    }
    float acc[2][2][4] = {};  // [k16 step][m16 tile]: short chains instead of long ones
#pragma unroll
    for (int c = 0; c < S::STAGES; ++c) {
      const int tiles = k_tiles - c * S::STAGE_TILES;
      if (tiles <= 0) break;
      auto multiply = [&](uint32_t tile_at, int t) {
        const PackedTile tile = load_tile(tile_at, lane);
        const uint4 b = input.b[c * TILES_PER_WARP + t];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const AFragments f = decode_half_tile(tile, m);
          mma_bf16(acc[0][m], f.lo[0], f.hi[0], f.lo[1], f.hi[1], b.x, b.y);
          mma_bf16(acc[1][m], f.lo[2], f.hi[2], f.lo[3], f.hi[3], b.z, b.w);
        }
      };
      const uint32_t stage = smem_addr(block.smem) + weights.stage * S::STAGE_BYTES;
      weights.wait_full();
      if (tiles >= S::STAGE_TILES) {  // no branch between its tiles: they overlap
#pragma unroll
        for (int t = 0; t < TILES_PER_WARP; ++t)
          multiply(stage + (input.warp * TILES_PER_WARP + t) * TILE_BYTES, t);
      } else {
        const int first = input.first_of(tiles), count = input.count_of(tiles);
#pragma unroll
        for (int t = 0; t < TILES_PER_WARP; ++t)
          if (t < count) multiply(stage + (first + t) * TILE_BYTES, t);
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(weights.empty());
      weights.advance();
    }
    sums.wait_empty();
    float* const mine = block.sum_buffer() + input.warp * COLUMNS * RED_PITCH + 4 * input.g;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 2 * input.q + c;
      auto sum = [&](int m, int half) { return acc[0][m][2 * half + c] + acc[1][m][2 * half + c]; };
      if (column < columns)
        *reinterpret_cast<float4*>(mine + column * RED_PITCH) = {sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)};
    }
    barrier_arrive(SUMS_FULL + sums.stage, S::SUM_THREADS);
    sums.advance();
  }
}

}  // namespace decode
}  // namespace mxfp4_sm120
