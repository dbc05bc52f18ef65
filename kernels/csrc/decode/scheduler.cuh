// SPDX-License-Identifier: Apache-2.0
// The tile scheduler: which work tiles a block computes, and how its producer tells the other warps.
//
// A work tile is 32 weight rows by a column group of tokens, over the whole of K. Those of gate-up come first, then
// those of down; within each, all rows of a column group. With 3 blocks and 14 work tiles of a GEMM, each has
// 14 / 3 - 1 = 3 dealt, in two runs, so that all blocks are at one expert at about the same time, and 5 are the tail:
//
//      work tile   0    1    2    3    4    5    6    7    8    9    10   11   12   13
//      block       0    1    2    0    0    1    1    2    2    whoever comes first
//                  first runs     second runs
#pragma once
#include "../common/weight_tile.cuh"
#include "pipeline.cuh"

namespace mxfp4_sm120 {
namespace decode {

// A GEMM's work tiles: to each block `count`, in two runs; the tail is counted in DecodeExchange::taken.
struct TileScheduler {
  int count, first_run;
  __device__ __forceinline__ explicit TileScheduler(int work_tiles) {
    const int each = work_tiles / gridDim.x;
    count = max(0, each - 1);
    first_run = count / 2;
  }
  __device__ __forceinline__ int work_tile(int turn) const {
    const int block = blockIdx.x, blocks = gridDim.x;
    return turn < first_run ? block * first_run + turn
                            : blocks * first_run + block * (count - first_run) + turn - first_run;
  }
};

// What a block works on next, in one word, which is read and written whole: the tile row in bits 0 to 15, the column
// group in bits 16 to 27, the GEMM in bit 28. So 0x10020005 is tile row 5 of group 2 of down; work of the same input
// (group and GEMM) has the same bits from 16 on; a negative word is no work tile.
struct WorkTile {
  int word;
  __device__ __forceinline__ static WorkTile of(bool down, int group, int tile_row) {
    return {tile_row | group << 16 | down << 28};
  }
  __device__ __forceinline__ static WorkTile none() { return {-1}; }
  __device__ __forceinline__ bool exists() const { return word >= 0; }
  __device__ __forceinline__ int tile_row() const { return word & 0xffff; }
  __device__ __forceinline__ int group() const { return word >> 16 & 0xfff; }
  __device__ __forceinline__ bool down() const { return word >> 28 & 1; }
  __device__ __forceinline__ int input() const { return word >> 16; }  // the same where the input is
};

// The work tiles that the producer has chosen, for the other warps.
struct WorkTiles {
  Ring ring;
  volatile int* words;
  __device__ __forceinline__ void put(WorkTile work, int lane) {
    ring.wait_empty();
    if (lane == 0) {
      words[ring.stage] = work.word;
      mbar_arrive(ring.full());
    }
    ring.advance();
  }
  __device__ __forceinline__ WorkTile get(int lane) {
    ring.wait_full();
    const WorkTile work{words[ring.stage]};
    __syncwarp();
    if (lane == 0) mbar_arrive(ring.empty());
    ring.advance();
    return work;
  }
};

}  // namespace decode
}  // namespace mxfp4_sm120
