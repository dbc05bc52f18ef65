// SPDX-License-Identifier: Apache-2.0
// The loader: all threads copy weight tiles and gathered token rows into the ring, ahead of the arithmetic.
#pragma once
#include <climits>

#include "scheduler.cuh"

namespace mxfp4_sm120 {
namespace grouped {

// Fills the ring, a stage at a time, for the work tiles a block will meet.
template <typename S>
struct Loader {
  static constexpr int SOURCES = S::SOURCES, THREADS = S::THREADS;
  const Layer& p;
  Shared<S>& shared;
  int turn = 0;  // the next work tile to begin
  int left = 0;  // tiles along its K that are still to be copied
  // Which this thread makes of a stage: bit i for its i-th of weights, 8 + i of tokens. So 0x301 is one of weights, two
  // of tokens.
  uint32_t copies = 0;
  const uint8_t* weights = nullptr;  // this lane's first chunk of its warp's tile row, at the next tile
  const uint8_t* tokens = nullptr;   // this thread's chunk of row 0, at the next tile
  uint32_t row[SOURCES];             // this thread's rows, in 16-byte units from row 0

  __device__ __forceinline__ Loader(const Layer& p, Shared<S>& shared) : p(p), shared(shared) {}

  __device__ __forceinline__ WorkTile next() const {
    return work_tile_of<S>(shared.taken[turn % TURNS], p, shared.blocks);
  }

  // Has gate-up finished the work tile's token block?
  __device__ __forceinline__ bool is_ready(const WorkTile& work) const {
    return load_acquire(p.finished + work.token_block) == finished_warps<S>(p.gemms[0]);
  }

  // The next work tile, if there is one and its tokens are there: who works on one must not wait for others.
  __device__ __forceinline__ void begin_if_ready() {
    const WorkTile work = next();
    if (work.expert >= 0 && (!work.down || __syncthreads_and(is_ready(work)))) return begin(work);
    if (work.expert < 0) let_next_kernel_start();  // the block is near its end
    left = INT_MAX;
    copies = 0;
  }
  __device__ __forceinline__ void begin_when_ready(const WorkTile& work) {
    if (work.down) wait_for(p.finished + work.token_block, finished_warps<S>(p.gemms[0]));
    begin(work);
  }

  // Where a tile row or a token doesn't exist, the last one is copied in its place and what comes of it not stored.
  __device__ __forceinline__ void begin(const WorkTile& work) {
    const Gemm& gemm = p.gemms[work.down];
    const int tile_rows = gemm.rows / TILE, thread = thread_index();
    if (thread == 0) shared.work_tiles[turn % TURNS] = work;  // long before anyone reads it
    ++turn;
    left = gemm.K / TILE;
    tokens = reinterpret_cast<const uint8_t*>(gemm.in) + thread % 4 * 16;
    copies = thread % 32 < TILE_CHUNKS - 32 ? 3 : 1;
    const int tile_row = min(Part<S>(work, tile_rows, thread / 32).tile_row, tile_rows - 1);
    weights = gemm.weights + (static_cast<int64_t>(work.expert) * tile_rows + tile_row) * left * TILE_BYTES +
              thread % 32 * 16;
#pragma unroll
    for (int i = 0; i < SOURCES; ++i) {
      const int t = (thread + i * THREADS) / 4, at = work.begin + min(t, work.tokens - 1);
      row[i] = static_cast<uint32_t>(work.down ? at : p.order[at]) * (gemm.K / 8);
      if (t < S::TOKENS && (t & ~7) < work.tokens) copies |= 256 << i;
    }
  }

  // Starts the copies of the stage `ahead` of the next: a warp its own tile, all together the tokens, [token][4
  // chunks]. No branches, so that products are scheduled in between.
  __device__ __forceinline__ void load_stage(uint32_t weight_dst, uint32_t token_dst, int ahead) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (copies & 1 << i) cp_async16(weight_dst + i * 512, weights + ahead * TILE_BYTES + i * 512);
#pragma unroll
    for (int i = 0; i < SOURCES; ++i)
      if (copies & 256 << i)
        cp_async16(token_dst + i * THREADS * 16, tokens + static_cast<uint64_t>(row[i]) * 16 + ahead * 64);
    cp_async_commit();
  }

  __device__ __forceinline__ void advance(int k_tiles) {
    weights += k_tiles * TILE_BYTES;
    tokens += k_tiles * 64;
  }
};

}  // namespace grouped
}  // namespace mxfp4_sm120
