// SPDX-License-Identifier: Apache-2.0
// The tile scheduler: which work tiles there are, and in what order.
//
// An expert's tokens make full token blocks and a tail; weight rows make row blocks of WARPS tile rows, of which the
// last may have fewer. A work tile is a token block by a row block, over the whole of K:
//
//                         row block 0   row block 1   ...   row block 11 (GPT-OSS's down: 90 tile rows = 11 x 8 + 2)
//      expert 0, full         x             x                   x
//      expert 0, full         x             x                   x   (here four warps share a tile row, and the tokens)
//      expert 0, tail         x             x                   x
//      expert 1, tail         x             x                   x
//
// Work tiles are numbered; blocks take numbers.
#pragma once
#include "../common/warp.cuh"
#include "../moe.h"
#include "layer.cuh"

namespace mxfp4_sm120 {
namespace grouped {

template <typename S>
__device__ __forceinline__ int row_blocks(const Gemm& p) {
  return (p.rows / TILE + S::WARPS - 1) / S::WARPS;
}
// A token block's warps that have finished gate-up, once all have.
template <typename S>
__device__ __forceinline__ int finished_warps(const Gemm& gate_up) {
  return row_blocks<S>(gate_up) * S::WARPS;
}

// How many warps share a tile row of the last row block, which has `left` of them (0: as many as the others).
template <typename S>
__device__ __forceinline__ int sharers(int left) {
  return left == 0 || left > S::WARPS / 2 ? 1 : left > S::WARPS / 4 ? 2 : 4;
}

// All token blocks: of each expert the full ones and the tail.
template <typename S>
struct TokenBlocks {
  static constexpr int TOKENS = S::TOKENS, THREADS = S::THREADS;
  int offsets[MAX_EXPERTS + 1];  // where each expert's tokens begin
  int full[MAX_EXPERTS + 1];     // full token blocks before each expert
  int tails[MAX_EXPERTS];        // experts with a tail, the longest first
  int tail_count;
  int long_tails;  // no shorter than a warp's share of a full token block in down's last row block

  __device__ int gate_up_work_tiles(const Layer& p) const {
    return (full[p.experts] + tail_count) * row_blocks<S>(p.gemms[0]);
  }
  __device__ int tail_of(int e) const { return (offsets[e + 1] - offsets[e]) % TOKENS; }

  __device__ void prepare(const Layer& p) {
    const int experts = p.experts;
    for (int e = threadIdx.x; e <= experts; e += THREADS)
      offsets[e] = __ldcg(p.offsets + e);
    if (threadIdx.x == 0) tail_count = long_tails = 0;
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      int before = 0;
      for (int e0 = 0; e0 < experts; e0 += 32) {
        const int e = e0 + lane;
        const int n = inclusive_scan(e < experts ? (offsets[e + 1] - offsets[e]) / TOKENS : 0, lane);
        if (e < experts) full[e + 1] = before + n;
        before += __shfl_sync(~0u, n, 31);
      }
      if (lane == 0) full[0] = 0;
    }
    for (int e = threadIdx.x; e < experts; e += THREADS) {
      const int mine = tail_of(e);
      if (mine == 0) continue;
      atomicAdd(&tail_count, 1);
      if (mine * sharers<S>(p.gemms[1].rows / TILE % S::WARPS) >= TOKENS) atomicAdd(&long_tails, 1);
      int rank = 0;
      for (int other = 0; other < experts; ++other) {
        const int theirs = tail_of(other);
        rank += theirs > mine || (theirs == mine && other < e);
      }
      tails[rank] = e;
    }
    __syncthreads();
  }
};

struct WorkTile {
  short down, expert, row_block, tokens;  // down: 0 or 1
  int begin, token_block;                 // of its first token; which of all token blocks
};

constexpr int TURNS = 16;  // that a block remembers

// What a block keeps behind the ring. (In front, with the ring at an odd multiple of 16 bytes, layers took a quarter to
// nearly a half longer.)
template <typename S>
struct Shared {
  int taken[TURNS];            // the work tile of a turn, by number
  WorkTile work_tiles[TURNS];  // and in full, once the loader has begun it
  TokenBlocks<S> blocks;
};
template <typename S>
constexpr int BYTES = S::RING_BYTES + sizeof(Shared<S>);

// A work tile by its number; past the last its expert is -1. Gate-up's come first, all of a full token block or a tail
// (an expert's full ones together: they read the same weights) one after the other, for down's to be ready as they
// come. Of down's those that take longer come first, for the end to be even: full token blocks' whole row blocks; long
// tails' whole row blocks; the last row block, if it has fewer tile rows, of full ones and of tails; the other tails'
// whole row blocks. For whole warps.
template <typename S>
__device__ __forceinline__ WorkTile work_tile_of(int n, const Layer& p, const TokenBlocks<S>& blocks) {
  constexpr int WARPS = S::WARPS, TOKENS = S::TOKENS;
  const int full = blocks.full[p.experts], tails = blocks.tail_count, gate_up_work_tiles = blocks.gate_up_work_tiles(p);
  const bool down = n >= gate_up_work_tiles;
  if (down) n -= gate_up_work_tiles;
  // Gate-up: all row blocks of a token block one after the other.
  const int tile_rows = p.gemms[down].rows / TILE, part = down && tile_rows % WARPS != 0;
  const int whole = row_blocks<S>(p.gemms[down]) - part;
  const int long_tails = down ? blocks.long_tails : tails;
  const int longer = (full + long_tails) * whole, parts = (full + tails) * part;
  const bool in_part = n >= longer && n < longer + parts;
  if (in_part)
    n -= longer;
  else if (n >= longer)
    n -= parts;
  const int groups = in_part ? 1 : whole;
  WorkTile work{static_cast<short>(down), -1, static_cast<short>(whole), 0, 0, 0};
  if (n < full * groups) {
    int expert = 0;  // as many as end before
    for (int e0 = 0; e0 < p.experts; e0 += 32) {
      const int e = e0 + threadIdx.x % 32;
      expert += __popc(__ballot_sync(~0u, e < p.experts && blocks.full[e + 1] * groups <= n));
    }
    const int before = blocks.full[expert], here = blocks.full[expert + 1] - before;
    n -= before * groups;
    work.token_block = before + n % here;
    if (!in_part) work.row_block = n / here;
    work.expert = expert;
    work.begin = blocks.offsets[expert] + n % here * TOKENS;
    work.tokens = TOKENS;
  } else if ((n -= full * groups) < tails * groups) {
    if (!in_part) work.row_block = n % whole;
    work.token_block = full + n / groups;
    work.expert = blocks.tails[n / groups];
    work.tokens = blocks.tail_of(work.expert);
    work.begin = blocks.offsets[work.expert + 1] - work.tokens;
  }
  return work;
}

// The column groups of the main loop for so many with tokens.
template <typename S>
__host__ __device__ constexpr int loop_size(int column_groups) {
  return column_groups > S::EVEN_UP_TO ? column_groups : column_groups + column_groups % 2;
}

// A warp's part of a work tile. The last row block may have few tile rows (GPT-OSS's 90 and 180 are 11 x 8 + 2 and 22 x
// 8
// + 4); then several warps share one, each with a part of the tokens. Parts may overlap, and two warps then compute the
// same: a main loop may have more column groups than there are, and reads none beyond the stage's.
template <typename S>
struct Part {
  int tile_row, column_group, column_groups;  // the first of its column groups, and how many
  __device__ Part(const WorkTile& work, int tile_rows, int warp) {
    constexpr int WARPS = S::WARPS;
    const int first = work.row_block * WARPS;
    const int parts = sharers<S>(tile_rows - first);
    tile_row = first + warp % (WARPS / parts);
    const int share = ((work.tokens + 7) / 8 + parts - 1) / parts;
    column_groups = loop_size<S>(share);
    column_group = min(warp / (WARPS / parts) * share, S::COLUMN_GROUPS - column_groups);
  }
};

}  // namespace grouped
}  // namespace mxfp4_sm120
