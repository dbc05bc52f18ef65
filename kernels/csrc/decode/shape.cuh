// SPDX-License-Identifier: Apache-2.0
// The decode kernel's configurations, and what follows from each.
#pragma once
#include "../common/launch.h"
#include "../common/weight_tile.cuh"
#include "routing_table.cuh"

namespace mxfp4_sm120 {
namespace decode {

// GPT-OSS's 90 tiles of K are three stages of 10 warps x 3 tiles.
struct Few {
  using Routing = AllTokens;
  static constexpr int MMA_WARPS = 10;      // which share every stage
  static constexpr int TILES_PER_WARP = 3;  // of a stage
  static constexpr int STAGES = 3;          // of a work tile, at most
  static constexpr int RING_STAGES = 4;     // in shared memory
  static constexpr int FETCHERS = 2;        // warps that fetch a row of activations each, ahead
};
struct FewWide : Few {  // longer rows
  static constexpr int STAGES = 8, FETCHERS = 0;
};
struct Gathered : Few {
  using Routing = OwnTokens;
  static constexpr int FETCHERS = 0;
};

// Floats between two columns of a reduction buffer: 32 rows and 4 more, so that a quarter warp's 16-byte stores hit all
// banks.
constexpr int RED_PITCH = TILE + 4;
// Work tiles chosen before all warps are done with the first of them: the weights' ring holds two, and parts of one
// more.
constexpr int WORK_TILES_AHEAD = 4;

template <typename Config>
struct Shape : Config {
  using Config::FETCHERS;
  using Config::MMA_WARPS;
  using Config::RING_STAGES;
  using Config::STAGES;
  using Config::TILES_PER_WARP;
  using Routing = typename Config::Routing;
  // Warps: those that multiply, and then
  static constexpr int EPILOGUE = MMA_WARPS, PRODUCER = MMA_WARPS + 1, FIRST_FETCHER = MMA_WARPS + 2;
  static constexpr int THREADS = 32 * (FIRST_FETCHER + FETCHERS);
  static constexpr int SUM_THREADS = 32 * (EPILOGUE + 1);  // those who make a work tile's sums and who adds them up
  static constexpr int STAGE_TILES = MMA_WARPS * TILES_PER_WARP, STAGE_BYTES = STAGE_TILES * TILE_BYTES;
  static constexpr int MAX_K = STAGES * STAGE_TILES * TILE;
  // Shared memory: weights, activations, two buffers of sums (so that adding up and multiplying overlap), barriers, the
  // work tiles, the routing.
  static constexpr int ROW_BYTES = MAX_K * 2, SUM_FLOATS = MMA_WARPS * COLUMNS * RED_PITCH, SUM_BUFFERS = 2;
  static constexpr int ACTS = RING_STAGES * STAGE_BYTES, SUMS = ACTS + FETCHERS * ROW_BYTES;
  static constexpr int BARS = SUMS + SUM_BUFFERS * SUM_FLOATS * 4;
  static constexpr int WORK_TILES = BARS + (RING_STAGES + FETCHERS + SUM_BUFFERS + WORK_TILES_AHEAD) * 16;
  static constexpr int ROUTING = WORK_TILES + WORK_TILES_AHEAD * 4;
  static constexpr int BYTES = ROUTING + static_cast<int>(sizeof(Routing));
  static_assert(BYTES <= MAX_SHARED_BYTES && sizeof(typename Routing::Scratch) <= SUM_BUFFERS * SUM_FLOATS * 4);
};
template <typename Config>
constexpr Footprint footprint{Shape<Config>::THREADS, Shape<Config>::BYTES};

}  // namespace decode
}  // namespace mxfp4_sm120
