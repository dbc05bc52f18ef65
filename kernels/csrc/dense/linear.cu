// SPDX-License-Identifier: Apache-2.0
// y = x . weight^T + bias for up to 32 tokens at once: the time is the time to read the weights once.
//
// One block a multiprocessor, each with its even share of the weight rows, to the row: 5120 rows are 38 or 39 for each
// of 132. The block takes up to 40 rows at once, over the whole of K, and its warps share K: so no block waits for
// another, and nothing goes through memory but weights, tokens and results. A warp loads its weights straight into
// registers, some steps ahead of the products, and across the end of a pass:
//
//      time ->
//      before the previous kernel ends   weights of steps 0, 1
//      after it                          tokens of steps 0, 1 | step 0, load 2 | step 1, load 3 | ... | sums of the
//      pass meanwhile                                                          the next pass's first steps are under
//      way
//
// The warps' sums go through shared memory and are added up in the order of the warps: same bits every run, whatever
// the number of multiprocessors and of other tokens that share the configuration.
#include <algorithm>
#include <string>

#include "../common/launch.h"
#include "../common/pack.cuh"
#include "rows.cuh"
#include "table.h"
#include "weights.cuh"

namespace mxfp4_sm120 {
namespace dense {
namespace {

template <typename Weights_, int TOKEN_TILES_>
struct Shape {
  using Weights = Weights_;
  static constexpr int TOKEN_TILES = TOKEN_TILES_, TOKENS = 16 * TOKEN_TILES;
  // Steps in registers, of 8 or 12 warps: 40 to 80 KB of weights under way in a multiprocessor, of which about 20 hide
  // the latency of an idle memory. Two steps of 12 warps rather than three of 8: the latter spill on sm_120.
  static constexpr int AHEAD = 2, WARPS = Weights::INT8 && TOKEN_TILES == 1 ? 12 : 8, THREADS = 32 * WARPS;
  static constexpr int ROW_TILES = 5, ROWS = 8 * ROW_TILES;
  static constexpr int SUM_FLOATS = WARPS * TOKENS * ROWS, SUM_BUFFERS = 2;
  static constexpr int BYTES = SUM_BUFFERS * SUM_FLOATS * 4;
  static_assert(BYTES <= MAX_SHARED_BYTES);
};

// What a warp has in registers of a step.
template <typename S>
struct Stage {
  typename S::Weights weights[S::ROW_TILES];
  uint4 x[2 * S::TOKEN_TILES][2];  // [half of an m16 tile: row g, or g + 8][eight k]
};

// Walks a warp's steps: of a pass, every WARPS-th along K, in whole rounds of the stages; then the next pass. Past the
// last one, zeros are loaded, which costs nothing.
template <typename S>
struct Loader {
  static constexpr int STRIDE = STEP * S::WARPS;  // of k, from a step to the next
  using Weights = typename S::Weights;
  const DenseArgs& args;
  const Rows& rows;
  int turns, left;        // of a pass, and of this one
  int row, k;             // of the step's first weights
  const uint8_t* weight;  // this lane's, in the first row tile
  const uint16_t* scale;
  const uint16_t* x;  // this lane's, of the first token tile

  __device__ __forceinline__ Loader(const DenseArgs& args, const Rows& rows) : args(args), rows(rows) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    turns = left = (args.K + STRIDE * S::AHEAD - 1) / (STRIDE * S::AHEAD) * S::AHEAD;
    row = rows.begin;
    k = threadIdx.x / 32 * STEP;
    const int mine = k + Weights::k_of(0, q);
    weight =
        static_cast<const uint8_t*>(args.weight) + (static_cast<int64_t>(row + g) * args.K + mine) * Weights::BYTES;
    scale = args.scale + static_cast<int64_t>(row + g) * (args.K / DENSE_BLOCK) + mine / DENSE_BLOCK;
    x = static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(blockIdx.y * S::TOKENS + g) * args.K + mine;
  }
  __device__ __forceinline__ void load_weights(Stage<S>& stage) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int exist = min(rows.of_pass, rows.end - row) - g;
#pragma unroll
    for (int n = 0; n < S::ROW_TILES; ++n)
      stage.weights[n].load(weight + static_cast<int64_t>(8 * n * Weights::BYTES) * args.K,
                            scale + static_cast<int64_t>(8 * n) * (args.K / DENSE_BLOCK), 8 * n < exist, args.K - k, q);
  }
  __device__ __forceinline__ void load_tokens(Stage<S>& stage) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int exist = row < rows.end ? args.M - static_cast<int>(blockIdx.y) * S::TOKENS - g : 0;
#pragma unroll
    for (int t = 0; t < 2 * S::TOKEN_TILES; ++t)  // eight tokens: the upper or lower half of an m16 tile
#pragma unroll
      for (int i = 0; i < 2; ++i)
        stage.x[t][i] = load_if(8 * t < exist && k + Weights::k_of(i, q) < args.K,
                                x + static_cast<int64_t>(8 * t) * args.K + Weights::k_of(i, 0));
  }
  __device__ __forceinline__ void advance() {
    int by = STRIDE;
    if (--left == 0) {
      left = turns;
      by -= turns * STRIDE;
      row += rows.of_pass;
      weight += static_cast<int64_t>(rows.of_pass) * args.K * Weights::BYTES;
      scale += static_cast<int64_t>(rows.of_pass) * (args.K / DENSE_BLOCK);
    }
    k += by;
    weight += by * Weights::BYTES;
    scale += by / DENSE_BLOCK;
    x += by;
  }
};

template <typename S>
__device__ __forceinline__ void multiply(float (&acc)[S::ROW_TILES][S::TOKEN_TILES][4], const Stage<S>& stage) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // a product's 16 k: words 2j and 2j + 1 of the lane's eight of x
    auto words = [&](int t) {
      const uint4 v = stage.x[t][j / 2];
      return j % 2 == 0 ? uint2{v.x, v.y} : uint2{v.z, v.w};
    };
#pragma unroll
    for (int n = 0; n < S::ROW_TILES; ++n) {
      const uint2 b = stage.weights[n].pairs(j);
#pragma unroll
      for (int m = 0; m < S::TOKEN_TILES; ++m) {
        const uint2 upper = words(2 * m), lower = words(2 * m + 1);
        mma_bf16(acc[n][m], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
      }
    }
  }
}

// The pass's outputs: each warp hands in its share of K, then a thread adds up an output's, in the order of the warps.
template <typename S>
__device__ __forceinline__ void store(const DenseArgs& args, float* sums, int first_row, int rows,
                                      const float (&acc)[S::ROW_TILES][S::TOKEN_TILES][4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  float* const mine = sums + warp * S::TOKENS * S::ROWS;
#pragma unroll
  for (int n = 0; n < S::ROW_TILES; ++n)
#pragma unroll
    for (int m = 0; m < S::TOKEN_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)  // ROWS is 8 modulo 32: a half warp's stores hit all banks
        *reinterpret_cast<float2*>(mine + (16 * m + 8 * half + g) * S::ROWS + 8 * n + 2 * q) = {
            acc[n][m][2 * half], acc[n][m][2 * half + 1]};
  __syncthreads();
  const int first_token = blockIdx.y * S::TOKENS, tokens = min(S::TOKENS, args.M - first_token);
  for (int i = threadIdx.x; i < tokens * S::ROWS; i += S::THREADS) {
    const int token = i / S::ROWS, row = i % S::ROWS;
    if (row >= rows) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < S::WARPS; ++w)
      sum += sums[w * S::TOKENS * S::ROWS + i];
    if (args.bias != nullptr) sum += unpack_bf16x2(args.bias[first_row + row]).x;
    args.out[static_cast<int64_t>(first_token + token) * args.N + first_row + row] =
        static_cast<uint16_t>(pack_bf16x2(sum, 0.f));
  }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) linear(const DenseArgs args) {
  float* const sums = reinterpret_cast<float*>(dynamic_shared_memory());
  const Rows rows(args.N, S::ROWS);
  Loader<S> loader(args, rows);
  Stage<S> stages[S::AHEAD];
  {
    Loader<S> weights = loader;  // which no kernel writes: on their way before the previous one ends
#pragma unroll
    for (int i = 0; i < S::AHEAD; ++i) {
      weights.load_weights(stages[i]);
      weights.advance();
    }
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < S::AHEAD; ++i) {
    loader.load_tokens(stages[i]);
    loader.advance();
  }
  int pass = 0;
#pragma unroll 1
  for (int row = rows.begin; row < rows.end; row += rows.of_pass, ++pass) {
    float acc[S::ROW_TILES][S::TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < loader.turns; turn += S::AHEAD) {
#pragma unroll
      for (int i = 0; i < S::AHEAD; ++i) {
        multiply<S>(acc, stages[i]);
        loader.load_weights(stages[i]);
        loader.load_tokens(stages[i]);
        loader.advance();
      }
    }
    if (row + rows.of_pass >= rows.end) let_next_kernel_start();
    // Two buffers: who writes to one again has been through the barrier after which all had read it.
    store<S>(args, sums + pass % S::SUM_BUFFERS * S::SUM_FLOATS, row, min(rows.of_pass, rows.end - row), acc);
  }
}

template <typename S>
const char* launch(const DenseArgs& args, const Device& device, void* stream) {
  const dim3 grid(std::min(device.multiprocessors, (args.N + 7) / 8), (args.M + S::TOKENS - 1) / S::TOKENS);
  return launch_kernel(linear<S>, grid, S::THREADS, S::BYTES, static_cast<cudaStream_t>(stream),
                       {device.dependent_launch}, args);
}

template <typename Weights, int TOKEN_TILES>
DenseConfiguration configuration() {
  using S = Shape<Weights, TOKEN_TILES>;
  return {(Weights::INT8 ? "int8_tokens" : "bf16_tokens") + std::to_string(S::TOKENS),
          Weights::INT8,
          S::TOKENS,
          DENSE_BLOCK,
          {S::THREADS, S::BYTES},
          [](const DenseArgs&, const Device&) -> int64_t { return 0; },
          launch<S>};
}

}  // namespace

std::vector<DenseConfiguration> streaming_configurations() {
  return {configuration<Bf16, 1>(), configuration<Bf16, 2>(), configuration<Int8, 1>(), configuration<Int8, 2>()};
}

}  // namespace dense
}  // namespace mxfp4_sm120
