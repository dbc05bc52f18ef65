// SPDX-License-Identifier: Apache-2.0
// One layer as the grouped GEMMs see it, and the kernel's configurations.
#pragma once
#include "../common/activation.cuh"
#include "../common/launch.h"
#include "../common/weight_tile.cuh"

namespace mxfp4_sm120 {
namespace grouped {

struct Gemm {
  const uint8_t* weights;  // [experts, rows/32, K/32, TILE_BYTES]
  const uint16_t* bias;    // bf16 [experts, rows] or nullptr
  const uint16_t* in;      // bf16 [*, K]: the tokens (gate-up) or activations in sorted order (down)
  void* out;               // gate-up: bf16 [slots, rows/2]; down: [slots, rows] packed by four; both in sorted order
  int rows, K;
};
struct Layer {
  Gemm gemms[2];       // gate-up, down
  const int* offsets;  // [experts + 1] where each expert's slots begin
  const int* order;    // [slots] the tokens, in sorted order
  int* taken;          // work tiles that blocks have taken, beyond those dealt; zero at the start
  int* finished;       // warps that have finished gate-up of a token block; zero at the start
  int experts;
  Activation activation;
};

// One configuration of the kernel.
struct Config {
  int warps;   // one above the other, 32 weight rows each
  int tokens;  // of a token block: a multiple of 8
  int stages;  // of the ring, one tile of K each
  int blocks;  // resident on a multiprocessor
};
// By tokens, which they are named after. What each is good for was measured: configs/tuning.
constexpr Config CONFIGS[] = {
    //  warps tokens stages blocks
    {4, 24, 8, 3}, {4, 40, 6, 3}, {4, 48, 5, 3}, {4, 64, 4, 3}, {4, 80, 4, 3}, {8, 112, 7, 1}, {8, 144, 6, 1},
};
constexpr int CONFIG_COUNT = sizeof(CONFIGS) / sizeof(CONFIGS[0]);

template <int INDEX>
struct Shape {
  static constexpr Config CONFIG = CONFIGS[INDEX];
  static constexpr int WARPS = CONFIG.warps, TOKENS = CONFIG.tokens, STAGES = CONFIG.stages, BLOCKS = CONFIG.blocks;
  static constexpr int THREADS = 32 * WARPS, COLUMN_GROUPS = TOKENS / 8;
  static constexpr int WEIGHT_BYTES = WARPS * TILE_BYTES, STAGE_BYTES = WEIGHT_BYTES + TOKENS * 64;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
  static constexpr int SOURCES = (TOKENS * 4 + THREADS - 1) / THREADS;  // token rows a thread copies 16 bytes of
  // There is a main loop for each even number of column groups up to this, and for each number above.
  static constexpr int EVEN_UP_TO = COLUMN_GROUPS / 2;
};

}  // namespace grouped
}  // namespace mxfp4_sm120
