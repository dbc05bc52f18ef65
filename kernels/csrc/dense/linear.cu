// SPDX-License-Identifier: Apache-2.0
// y = x . weight^T + bias for up to 32 tokens at once: the time is the time to read the weights once.
//
// One block a multiprocessor, each with its even share of the weight rows, to the row: 5120 rows are 38 or 39 for each
// of 132. The block takes 24, 40 or 64 rows at once, over the whole of K, and its warps share K: so no block waits for
// another, and nothing goes through memory but weights, tokens and results. Each warp has a queue of its own in shared
// memory, which it fills some steps ahead of its products, across the end of a pass, too:
//
//      time ->
//      before the previous kernel ends   weights of steps 0 to AHEAD - 1
//      after it                          tokens of step 0 | tokens 1, products 0, weights AHEAD | ... | sums
//      meanwhile                         the next kernel fills its queues: a block takes half of a multiprocessor, so
//                                        that the memory is never idle while kernels follow each other
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

template <template <int> class Weights_, int TOKENS_, int ROW_TILES_, int AHEAD_>
struct Shape {
  static constexpr int TOKENS = TOKENS_, ROW_TILES = ROW_TILES_, ROWS = 8 * ROW_TILES;
  using Weights = Weights_<ROW_TILES>;
  static constexpr bool BOTH = TOKENS > 8;  // halves of a product's 16 tokens
  static constexpr int TOKEN_TILES = (TOKENS + 15) / 16;
  static constexpr int WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int BLOCKS = TOKENS * ROW_TILES <= 16 * 5 ? 2 : 1;  // for which registers are there
  // Steps in a warp's queue. Some 25 KB are under way in a busy H100's multiprocessor, the others wait for what a
  // kernel's begin and end take.
  static constexpr int AHEAD = AHEAD_, QUEUE_BYTES = AHEAD * Weights::STAGE_BYTES;
  // A warp's sums of eight tokens. The pitch is 8 or 24 modulo 32: a half warp's stores hit all banks.
  static constexpr int SUM_PITCH = ROWS % 16 == 8 ? ROWS : ROWS + 8, SUM_FLOATS = 8 * SUM_PITCH;
  static constexpr int BYTES = WARPS * (QUEUE_BYTES + SUM_FLOATS * 4);
  static_assert(BYTES <= MAX_SHARED_BYTES);
};

// Walks a warp's steps, for the weights: of a pass, every WARPS-th along K; then the next pass. Past the last one,
// zeros are loaded, which costs nothing.
template <typename S>
struct Loader {
  static constexpr int STRIDE = STEP * S::WARPS;  // of k, from a step to the next
  using Weights = typename S::Weights;
  const DenseArgs& args;
  const Rows& rows;
  int turns, left;        // of a pass, and of this one
  int row, k;             // of the step's first weights
  const uint8_t* weight;  // of this lane's row in the first row tile
  const uint16_t* scale;

  __device__ __forceinline__ Loader(const DenseArgs& args, const Rows& rows) : args(args), rows(rows) {
    const int g = threadIdx.x % 32 / 4;
    turns = left = (args.K + STRIDE - 1) / STRIDE;
    row = rows.begin;
    k = threadIdx.x / 32 * STEP;
    weight = static_cast<const uint8_t*>(args.weight) + (static_cast<int64_t>(row + g) * args.K + k) * Weights::BYTES;
    scale = scales_of(args.scale, args.N, k / STEP, row + g);
  }
  __device__ __forceinline__ void load(uint32_t stage) {
    const int exist = k < args.K ? min(rows.of_pass, rows.end - row) - static_cast<int>(threadIdx.x % 32 / 4) : 0;
    const int64_t rows_of_tile = 8 * args.K;
    const uint8_t* w = weight;
    const uint16_t* s = scale;
#pragma unroll
    for (int n = 0; n < S::ROW_TILES; ++n) {
      Weights::copy(stage, n, w, s, 8 * n < exist);
      w += rows_of_tile * Weights::BYTES;
      s += 8 * 2;
    }
    cp_async_commit();
    advance();
  }
  __device__ __forceinline__ void advance() {
    int by = STRIDE;
    if (--left == 0) {
      left = turns;
      by -= turns * STRIDE;
      row += rows.of_pass;
      weight += static_cast<int64_t>(rows.of_pass) * args.K * Weights::BYTES;
      scale += 2 * rows.of_pass;
    }
    k += by;
    weight += by * Weights::BYTES;
    scale += by / STEP * (int64_t{2} * args.N);
  }
};

// Walks the same steps, for the tokens, which are the same in each pass.
template <typename S>
struct TokenLoader {
  const DenseArgs& args;
  int turns, left, k, first;
  const uint16_t* x;  // this lane's eight k of token `first`

  __device__ __forceinline__ TokenLoader(const DenseArgs& args, int turns) : args(args), turns(turns), left(turns) {
    k = threadIdx.x / 32 * STEP;
    first = blockIdx.y * S::TOKENS + threadIdx.x % 32 / 4;
    x = static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(first) * args.K + k + threadIdx.x % 4 * 8;
  }
  // Of token tile m.
  __device__ __forceinline__ void load(HalfOfTokens<S::BOTH>& to, int half, int m) const {
    const int exist = k < args.K ? args.M - first : 0;
    const int64_t eight_tokens = 8 * args.K;
#pragma unroll
    for (int i = 0; i < (S::BOTH ? 2 : 1); ++i)
      to.of[i] = load_if(16 * m + 8 * i < exist, x + (2 * m + i) * eight_tokens + half * HALF);
  }
  __device__ __forceinline__ void advance() {
    int by = Loader<S>::STRIDE;
    if (--left == 0) {
      left = turns;
      by -= turns * Loader<S>::STRIDE;
    }
    k += by;
    x += by;
  }
};

// What the sums begin with: the first warp's with the bias.
template <typename S>
__device__ __forceinline__ void begin(float (&acc)[S::ROW_TILES][S::TOKEN_TILES][4], const uint16_t* bias, int rows) {
  const int q = threadIdx.x % 4;
  const bool mine = bias != nullptr && threadIdx.x < 32;
#pragma unroll
  for (int n = 0; n < S::ROW_TILES; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * n + 2 * q + i % 2;
      const float begin = i < 2
                              ? __uint_as_float(load_u16_if(mine && row < rows, bias + row) << 16) / S::Weights::OF_SUMS
                              : acc[n][0][i - 2];
#pragma unroll
      for (int m = 0; m < S::TOKEN_TILES; ++m)
        acc[n][m][i] = begin;
    }
}

// The pass's outputs, eight tokens at a time: each warp hands in its share of K, then a thread adds up an output's, in
// the order of the warps.
template <typename S>
__device__ __forceinline__ void store(const DenseArgs& args, float* sums, int first_row, int rows,
                                      const float (&acc)[S::ROW_TILES][S::TOKEN_TILES][4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  float* const mine = sums + warp * S::SUM_FLOATS;
#pragma unroll
  for (int eight = 0; eight < S::TOKENS / 8; ++eight) {
    const int first_token = blockIdx.y * S::TOKENS + 8 * eight, tokens = min(8, args.M - first_token);
    if (tokens <= 0) return;
    __syncthreads();  // what these replace has been read
#pragma unroll
    for (int n = 0; n < S::ROW_TILES; ++n)
      *reinterpret_cast<float2*>(mine + g * S::SUM_PITCH + 8 * n + 2 * q) = {acc[n][eight / 2][eight % 2 * 2],
                                                                             acc[n][eight / 2][eight % 2 * 2 + 1]};
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * S::ROWS; i += S::THREADS) {
      const int token = i / S::ROWS, row = i % S::ROWS;
      if (row >= rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < S::WARPS; ++w)
        sum += sums[w * S::SUM_FLOATS + token * S::SUM_PITCH + row];
      args.out[static_cast<int64_t>(first_token + token) * args.N + first_row + row] =
          to_bf16(sum * S::Weights::OF_SUMS);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) linear(const DenseArgs args) {
  using Weights = typename S::Weights;
  uint8_t* const shared = dynamic_shared_memory();
  const uint32_t queue = smem_addr(shared) + threadIdx.x / 32 * S::QUEUE_BYTES;
  float* const sums = reinterpret_cast<float*>(shared + S::WARPS * S::QUEUE_BYTES);
  const Rows rows(args.N, S::ROWS);
  Loader<S> loader(args, rows);
  for (int i = 0; i < S::AHEAD; ++i)  // which no kernel writes: on their way before the previous one ends
    loader.load(queue + i * S::Weights::STAGE_BYTES);
  let_next_kernel_start();
  wait_for_previous_kernel();
  TokenLoader<S> token_loader(args, loader.turns);
  HalfOfTokens<S::BOTH> x[2][S::TOKEN_TILES];  // a step of them: each half is loaded anew as soon as it is on its way
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int m = 0; m < S::TOKEN_TILES; ++m)
      token_loader.load(x[half][m], half, m);
  token_loader.advance();
  uint32_t stage = queue;
  const uint32_t zero = static_cast<uint32_t>(args.K) >> 31;
#pragma unroll 1
  for (int row = rows.begin; row < rows.end; row += rows.of_pass) {
    float acc[S::ROW_TILES][S::TOKEN_TILES][4];
    begin<S>(acc, args.bias == nullptr ? nullptr : args.bias + row, min(rows.of_pass, rows.end - row));
#pragma unroll 1
    for (int turn = 0; turn < loader.turns; ++turn) {
      cp_async_wait<S::AHEAD - 1>();
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const typename Weights::Half w(stage, half);
#pragma unroll
        for (int m = 0; m < S::TOKEN_TILES; ++m) {
          const TokenFragments<S::BOTH> tokens(x[half][m], zero);
          token_loader.load(x[half][m], half, m);
#pragma unroll
          for (int n = 0; n < S::ROW_TILES; ++n)
            w.multiply(acc[n][m], n, tokens);
        }
      }
      token_loader.advance();
      __syncwarp();
      loader.load(stage);
      stage = stage + Weights::STAGE_BYTES == queue + S::QUEUE_BYTES ? queue : stage + Weights::STAGE_BYTES;
    }
    store<S>(args, sums, row, min(rows.of_pass, rows.end - row), acc);
  }
}

template <typename S>
const char* launch(const DenseArgs& args, const Device& device, void* stream) {
  const dim3 grid(std::min(device.multiprocessors, (args.N + 7) / 8), (args.M + S::TOKENS - 1) / S::TOKENS);
  return launch_kernel(linear<S>, grid, S::THREADS, S::BYTES, static_cast<cudaStream_t>(stream),
                       {device.dependent_launch}, args);
}

template <template <int> class Weights, int TOKENS, int ROW_TILES, int AHEAD>
DenseConfiguration configuration() {
  using S = Shape<Weights, TOKENS, ROW_TILES, AHEAD>;
  return {(S::Weights::INT8 ? "int8_rows" : "bf16_rows") + std::to_string(S::ROWS) + "_tokens" + std::to_string(TOKENS),
          S::Weights::INT8,
          S::TOKENS,
          {S::THREADS, S::BYTES},
          [](const DenseArgs&, const Device&) -> int64_t { return 0; },
          launch<S>};
}

}  // namespace

std::vector<DenseConfiguration> streaming_configurations() {
  // Fewer rows at once where a block's share is small, as of attention's output; more where it takes many passes, each
  // of which reads the tokens anew, as of the vocabulary.
  return {configuration<Bf16, 16, 3, 3>(), configuration<Bf16, 16, 5, 2>(), configuration<Bf16, 32, 3, 3>(),
          configuration<Bf16, 32, 5, 2>(), configuration<Int8, 8, 5, 2>(),  configuration<Int8, 16, 3, 2>(),
          configuration<Int8, 16, 5, 2>(), configuration<Int8, 16, 8, 2>(), configuration<Int8, 32, 3, 3>(),
          configuration<Int8, 32, 5, 2>()};
}

}  // namespace dense
}  // namespace mxfp4_sm120
