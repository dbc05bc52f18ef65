// SPDX-License-Identifier: Apache-2.0
// What the warps of a block work with.
#pragma once
#include "exchange.cuh"
#include "scheduler.cuh"
#include "shape.cuh"

namespace mxfp4_sm120 {
namespace decode {

// Named barriers by which MMA warps hand sums to the epilogue warp, one for each buffer (0 is __syncthreads).
constexpr int SUMS_FULL = 1;

// What a block's warps work with; each warp has its own copy, and so its own places in the rings.
template <typename S>
struct Block {
  const MoeArgs& args;
  const DecodeWorkspace& ws;
  DecodeExchange* exchange = nullptr;  // this call's
  uint8_t* smem;
  typename S::Routing& rt;
  Ring weights;
  Ring acts;  // a token's activations a stage
  Ring sums;  // full ones are handed over by named barriers instead, SUMS_FULL
  WorkTiles work_tiles;

  __device__ __forceinline__ Block(const MoeArgs& args, const DecodeWorkspace& ws, uint8_t* smem)
      : args(args),
        ws(ws),
        smem(smem),
        rt(*reinterpret_cast<typename S::Routing*>(smem + S::ROUTING)),
        weights{smem_addr(smem + S::BARS), S::RING_STAGES},
        acts{weights.bars + S::RING_STAGES * 16, S::FETCHERS},
        sums{acts.bars + S::FETCHERS * 16, S::SUM_BUFFERS},
        work_tiles{{sums.bars + S::SUM_BUFFERS * 16, WORK_TILES_AHEAD}, reinterpret_cast<int*>(smem + S::WORK_TILES)} {}
  __device__ __forceinline__ void init() const {
    weights.init(PRODUCER_LANES, S::MMA_WARPS);
    acts.init(32, S::MMA_WARPS);
    sums.init(0, 1);
    work_tiles.ring.init(1, S::MMA_WARPS + 1 + S::FETCHERS);
    mbar_init_fence();
  }
  __device__ __forceinline__ int slot_of(int place) const { return token_of(place) * args.top_k + place % MAX_TOP_K; }
  __device__ __forceinline__ uint16_t* act(int place) const {
    return exchange->act + static_cast<int64_t>(slot_of(place)) * args.I;
  }
  __device__ __forceinline__ uint32_t* y(int place) const {
    return ws.y + static_cast<int64_t>(slot_of(place)) * args.H;
  }
  __device__ __forceinline__ const uint8_t* x(int token) const {
    return static_cast<const uint8_t*>(args.x) + static_cast<int64_t>(token) * args.H * 2;
  }
  __device__ __forceinline__ float* sum_buffer() const {
    return reinterpret_cast<float*>(smem + S::SUMS) + sums.stage * S::SUM_FLOATS;
  }
};

}  // namespace decode
}  // namespace mxfp4_sm120
