// SPDX-License-Identifier: Apache-2.0
// A whole MoE layer in one launch, for few tokens: the time is the time to stream the chosen experts' weights once.
//
// A persistent grid, one block per multiprocessor; what it computes at a time is a work tile (scheduler.cuh): 32 weight
// rows of one active expert by at most 8 tokens, the columns of a product. Blocks work on some of gate-up, then on some
// of down. Their warps have four trades. The producer chooses work tiles and copies their weights into a ring of
// stages, each a stretch of a work tile's K. The MMA warps share every stage, so each has the same slice of K of all
// work tiles, and multiply. The epilogue warp adds the slices up, applies bias and activation, and writes. Fetchers
// bring activations as soon as they are there. MMA warps so hardly wait for anything but weights, and the ring runs
// ahead over the seam between the two GEMMs: weights of down are in flight while the last activations are still being
// made.
//
//      time ->
//      producer    |routing| copy gate-up 0 | 1 | 2 | tail | copy down 0 | 1 | 2 | tail |
//      fetchers    |routing|                                  fetch | fetch | ...
//      MMA warps   |routing|      multiply gate-up 0 | 1 | 2 | tail | down 0 | 1 | 2 | tail |
//      epilogue    |routing| empty    sums 0 | 1 | 2 | tail |  ...  sums 0 | 1 | 2 | tail |
//                           the next exchange                              all warps: add each token's results up
//
// Up to 8 tokens, all of them are columns of every active expert's product: a column whose token did not choose the
// expert costs nothing that matters here (the tensor cores idle) and is ignored afterwards. A warp's slice of the input
// stays in its registers for as long as it is the input: the whole of gate-up, and one expert's work tiles of down.
// More tokens are gathered: an expert's own make its columns, in as many groups of 8 as it takes, each of which reads
// the expert's weights anew.
//
// Blocks hand each other activations, and results in FP32, through the workspace (exchange.cuh). Every output is summed
// in the order of its token's choices: same bits every run.
#include <algorithm>
#include <climits>

#include "../dispatch.h"
#include "epilogue.cuh"
#include "mma_warps.cuh"
#include "producer.cuh"
#include "routing.cuh"

namespace mxfp4_sm120 {
namespace decode {
namespace {

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) decode_layer(const MoeArgs args, const DecodeWorkspace ws) {
  uint8_t* const smem = dynamic_shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Block<S> block(args, ws, smem);
  auto& rt = block.rt;
  if (threadIdx.x == 0) block.init();
  auto& scratch = *reinterpret_cast<typename S::Routing::Scratch*>(smem + S::SUMS);  // long before there are sums
  rt.clear(scratch);
  __syncthreads();

  wait_for_previous_kernel();
  const bool odd = __ldcg(ws.calls) < 0;
  block.exchange = ws.exchange + odd;
  Slice<S> input(warp, lane);
  if (warp < S::MMA_WARPS && !S::Routing::GATHERED)
    input.load(args.H / TILE, [&](int token) { return token < args.M ? block.x(token) : nullptr; }, read_global);
  build_routing(args, rt, scratch, warp, lane);

  if (warp == S::PRODUCER)
    produce_weights(block, lane);
  else if (warp < S::MMA_WARPS)
    multiply_work_tiles(block, input, lane);
  else if (warp == S::EPILOGUE) {
    prepare_next_call(block, ws.exchange[!odd], lane);
    finish_work_tiles(block, lane);
  } else if constexpr (S::FETCHERS > 0)
    fetch_activations(block, warp - S::FIRST_FETCHER, lane);

  // Each token's results are added up as soon as they are there, in the order of its choices, and taken away.
  let_next_kernel_start();
  const int fours = args.M * args.H / 4, each = (fours + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each;
  for (int i = begin + threadIdx.x; i < min(fours, begin + each); i += S::THREADS) {
    const int token = i / (args.H / 4), first = (i - token * (args.H / 4)) * 4;
    uint4 v[MAX_TOP_K];
    auto has = [&](int j) { return rt.expert[token * MAX_TOP_K + j] >= 0; };
    auto y = [&](int j) { return reinterpret_cast<uint4*>(block.y(token * MAX_TOP_K + j) + first); };
    bool missing;
    uint32_t rounds = MOST_ROUNDS;
    do {
      missing = false;
#pragma unroll
      for (int j = 0; j < MAX_TOP_K; ++j) {
        v[j] = has(j) ? load_relaxed(y(j)) : uint4{~0u, ~0u, ~0u, ~0u};
        missing |= !all_there(v[j]);
      }
    } while (missing && --rounds != 0);
    trap_if_none_left(rounds);
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < MAX_TOP_K; ++j) {
      sum[0] += __uint_as_float(~v[j].x);
      sum[1] += __uint_as_float(~v[j].y);
      sum[2] += __uint_as_float(~v[j].z);
      sum[3] += __uint_as_float(~v[j].w);
      if (has(j)) *y(j) = uint4{0, 0, 0, 0};
    }
    reinterpret_cast<uint2*>(args.out)[i] = {pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3])};
  }
}

template <typename Config>
const char* launch(const MoeArgs& args, const Device& device, void* stream) {
  using S = Shape<Config>;
  // Cooperative, for blocks wait for each other's results: all of them must be resident.
  return launch_kernel(decode_layer<S>, device.multiprocessors, S::THREADS, S::BYTES, static_cast<cudaStream_t>(stream),
                       {device.dependent_launch, /*cooperative=*/true}, args, carve(args).decode);
}
const char* launch_few(const MoeArgs& args, const Device& device, void* stream) {
  const bool short_rows = std::max(args.H, args.I) <= Shape<Few>::MAX_K;
  return short_rows ? launch<Few>(args, device, stream) : launch<FewWide>(args, device, stream);
}

static_assert(MAX_SIZE <= Shape<FewWide>::MAX_K && COLUMNS * MAX_TOP_K * MAX_SIZE <= DECODE_MAX_VALUES);

constexpr Footprint larger(Footprint a, Footprint b) {
  return {std::max(a.threads, b.threads), std::max(a.shared_bytes, b.shared_bytes)};
}

}  // namespace
}  // namespace decode

std::vector<Configuration> decode_configurations() {
  using namespace decode;
  return {{"decode", {/*tokens=*/COLUMNS}, larger(footprint<Few>, footprint<FewWide>), launch_few},
          {"gathered",
           {OwnTokens::TOKENS, /*size=*/Shape<Gathered>::MAX_K, /*values=*/DECODE_MAX_VALUES},
           footprint<Gathered>,
           launch<Gathered>}};
}

}  // namespace mxfp4_sm120
