// SPDX-License-Identifier: Apache-2.0
// The grouped GEMMs' configurations on FP4 terms, and where their stages have what.
#pragma once
#include "../grouped/scheduler.cuh"
#include "terms.cuh"
#include "weights.cuh"

namespace mxfp4_sm120 {
namespace fp4 {

using grouped::Gemm;  // its `in` points to records
using grouped::Layer;
using grouped::TokenBlocks;
using grouped::WorkTile;

struct Config {
  int terms;
  int warps;   // and tile rows of a row block; half as many warps beside each other have two tile rows each
  int tokens;  // of a token block: two warps one above the other, and two threads copy each token's records
  int stages;  // of the ring, 64 of K each
  int blocks;  // resident on a multiprocessor
};
constexpr Config CONFIGS[] = {
    // terms warps tokens stages blocks
    {1, 4, 64, 4, 2}, {1, 8, 128, 4, 1}, {2, 4, 64, 4, 2}, {2, 8, 128, 4, 1},
    {3, 4, 64, 4, 2}, {3, 8, 128, 4, 1}, {4, 4, 64, 3, 2}, {4, 8, 128, 3, 1},
};
constexpr int CONFIG_COUNT = sizeof(CONFIGS) / sizeof(CONFIGS[0]);

template <int INDEX>
struct Shape {
  static constexpr Config CONFIG = CONFIGS[INDEX];
  static constexpr int TERMS = CONFIG.terms, WARPS = CONFIG.warps, TOKENS = CONFIG.tokens, STAGES = CONFIG.stages;
  static constexpr int BLOCKS = CONFIG.blocks, THREADS = 32 * WARPS, RECORD_BYTES = record_bytes(TERMS);
  static constexpr int M_TILES = TOKENS / 32;  // m16 tiles of a warp, at most
  // A stage: for each term and each half of its 64 of K [token][16 bytes] of codes, then [token][16 bytes] of scales,
  // then each tile row's two tiles.
  static constexpr int PLANE_BYTES = TOKENS * CODE_BYTES, SCALES_AT = TERMS * 2 * PLANE_BYTES;
  static constexpr int WEIGHTS_AT = SCALES_AT + TOKENS * SCALE_BYTES;
  static constexpr int STAGE_BYTES = WEIGHTS_AT + WARPS * 2 * TILE_BYTES, RING_BYTES = STAGES * STAGE_BYTES;
  static_assert(TOKENS * 2 == THREADS && STAGES >= 3 && STAGE_BYTES % 16 == 0);
};

// What a block keeps behind the ring.
template <typename S>
struct Shared {
  int taken;  // the number of its next work tile
  TokenBlocks<S> blocks;
};
template <typename S>
constexpr int BYTES = S::RING_BYTES + sizeof(Shared<S>);

// A warp's part of a work tile: two tile rows, and of the tokens every m_stride-th m16 tile from m_tile on, m_tiles of
// them (in other warps one may be missing; then its last is no token's). Two warps share two tile rows; more where the
// last row block has few.
template <typename S>
struct Part {
  int tile_row, m_tile, m_stride, m_tiles;
  __device__ __forceinline__ Part(const WorkTile& work, int tile_rows, int warp) {
    const int first = work.row_block * S::WARPS, left = min(tile_rows - first, S::WARPS);
    m_stride = left > S::WARPS / 2 ? 2 : left > S::WARPS / 4 ? 4 : 8;
    m_stride = min(m_stride, S::WARPS);
    m_tile = warp % m_stride;
    m_tiles = ((work.tokens + 15) / 16 + m_stride - 1) / m_stride;
    tile_row = first + warp / m_stride * TILE_ROWS;
  }
};

}  // namespace fp4
}  // namespace mxfp4_sm120
