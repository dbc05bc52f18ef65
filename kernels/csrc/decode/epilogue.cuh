// SPDX-License-Identifier: Apache-2.0
// The epilogue warp: what becomes of a work tile's sums.
#pragma once
#include "../common/activation.cuh"
#include "../common/pack.cuh"
#include "block.cuh"

namespace mxfp4_sm120 {
namespace decode {

// The epilogue warp: adds slices up, then bias and activation, or bias and the routing weight. A lane has four adjacent
// rows of one column, and so two outputs of gate-up or four of down; the warp four columns at a time.
template <typename S>
__device__ __forceinline__ void finish_work_tiles(Block<S> block, int lane) {
  constexpr int LANES = TILE / 4, AT_ONCE = 32 / LANES;  // of a column; columns
  const MoeArgs& args = block.args;
  const auto& rt = block.rt;
  Ring& sums = block.sums;
  const int row = lane % LANES * 4;
  // Fetched before a work tile's sums are there: under the load of the weights a single value takes as long as one.
  auto bias_of = [&](WorkTile work) {
    const void* const bias = work.down() ? args.w2_bias : args.w13_bias;
    if (bias == nullptr) return uint2{0, 0};
    const int tile_rows = (work.down() ? args.H : 2 * args.I) / TILE;
    const int64_t first = (static_cast<int64_t>(rt.expert_of(work.group())) * tile_rows + work.tile_row()) * TILE;
    return *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(bias) + first + row);
  };
  const Activation activation = activation_of(args.swiglu_oai);
#pragma unroll 1
  for (WorkTile work = block.work_tiles.get(lane); work.exists(); work = block.work_tiles.get(lane)) {
    const int group = work.group(), columns = rt.columns_of(group, args.M);
    const uint2 packed_bias = bias_of(work);
    barrier_wait(SUMS_FULL + sums.stage, S::SUM_THREADS);
    const float2 lo = unpack_bf16x2(packed_bias.x), hi = unpack_bf16x2(packed_bias.y);
    const uint32_t parts = smem_addr(block.sum_buffer()) + row * 4;
#pragma unroll 1
    for (int first = 0; first < columns; first += AT_ONCE) {
      const int column = first + lane / LANES, place = rt.place(group, column);
      if (place < 0) continue;
      float v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < S::MMA_WARPS; ++w) {
        const uint4 part = lds128(parts + (w * COLUMNS + column) * RED_PITCH * 4);
        v[0] += __uint_as_float(part.x);
        v[1] += __uint_as_float(part.y);
        v[2] += __uint_as_float(part.z);
        v[3] += __uint_as_float(part.w);
      }
      v[0] = v[0] * ACCUMULATOR_SCALE + lo.x;
      v[1] = v[1] * ACCUMULATOR_SCALE + lo.y;
      v[2] = v[2] * ACCUMULATOR_SCALE + hi.x;
      v[3] = v[3] * ACCUMULATOR_SCALE + hi.y;
      if (work.down()) {
        const float weight = rt.weight[place];
        store_relaxed(reinterpret_cast<uint4*>(block.y(place) + work.tile_row() * TILE + row),
                      complement(uint4{__float_as_uint(v[0] * weight), __float_as_uint(v[1] * weight),
                                       __float_as_uint(v[2] * weight), __float_as_uint(v[3] * weight)}));
      } else {
        store_relaxed(reinterpret_cast<uint32_t*>(block.act(place) + (work.tile_row() * TILE + row) / 2),
                      ~pack_bf16x2(activate(v[0], v[1], activation), activate(v[2], v[3], activation)));
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(sums.empty());
    sums.advance();
  }
}

// Count this call, once all of the block have read the count, and empty the next call's exchange. The epilogue warp
// does it, which has nothing else to do yet.
template <typename S>
__device__ __forceinline__ void prepare_next_call(const Block<S>& block, DecodeExchange& next, int lane) {
  const int used = next.act_used;
  if (lane == 0) {
    // Together blocks flip the highest bit, which says whose turn it is of the two exchanges, and leave the others as
    // they were: of G blocks, G - 1 add 1 and block 0 adds 2^31 - (G - 1), in any order. With G = 3:
    // 0 + 1 + 0x7ffffffe + 1 = 0x80000000, and after another call 0 again.
    atomicAdd(block.ws.calls, blockIdx.x == 0 ? INT_MIN - static_cast<int>(gridDim.x - 1) : 1);
    if (blockIdx.x == 0) {
      block.exchange->act_used = block.args.M * block.args.top_k * block.args.I;
      next.taken[0] = next.taken[1] = 0;
    }
  }
  uint4* const act = reinterpret_cast<uint4*>(next.act);
  for (int i = blockIdx.x * 32 + lane; i < used / 8; i += gridDim.x * 32)
    act[i] = uint4{0, 0, 0, 0};
}

}  // namespace decode
}  // namespace mxfp4_sm120
