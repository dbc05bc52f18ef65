// SPDX-License-Identifier: Apache-2.0
// y = x . weight^T + bias with INT8 weights, above all for 33 tokens and more. In linear.cu each block reads all tokens
// from the L2 cache, and from some 32 on, that is more than its weights are. Here a block takes more rows and, to be as
// many blocks as the card runs at once, part of K, and its warps share what it reads by way of shared memory:
//
//                     K, split in 3                     gridDim.x shares of the rows, as in linear.cu
//               +---------+---------+---------+
//      rows     | block 0 | block 1 | block 2 |         each adds up its part of K; add_up adds the parts, in the order
//               +---------+---------+---------+         of K, a second kernel. If K isn't split, there is none.
//               | block 3 | ...
//
// A stage of the ring in shared memory is 64 k of the block's rows and tokens. 128 rows, 64 tokens:
//
//      weights   [half step of 32 k][row][32 bytes]                  8192 bytes
//      scales    [row][of the first and of the second half]           512
//      tokens    [half step][token][64 bytes]                        8192
//
// Products are m16n8k16 with 16 weight rows as A and 8 tokens as B, and the same order of k as in weights.cuh. With so
// many tokens it is cheaper to scale each weight, rounding it once more to BF16 (0.17 % beside INT8's 0.5 %), than each
// 32 k's sums.
//
// Same bits every run on a card; how K is split depends on the number of multiprocessors.
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

constexpr int TOKEN_HALF = 2 * HALF;  // bytes of a token in a half step
constexpr int CHUNKS = STEP / 16;     // copies of 16 bytes that a row takes in a stage

// A lane's part of 16 weight rows in a half step, A of its two products; `scales` of rows g and g + 8, low halves.
__device__ __forceinline__ void load_scaled(uint32_t (&a)[2][4], uint32_t at, const uint32_t (&scales)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint2 row = lds64(at + 8 * HALF * i + lane * 8);
    const uint32_t words[2] = {offset_by_128(row.x), offset_by_128(row.y)};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[j / 2][j % 2 * 2 + i] = mul_bf16x2_by_lo(whole_pair(words[j / 2], j % 2 * 2), scales[i]);
  }
}

// A block's tile: warps side by side along rows and tokens, each with so many m16 and n8 tiles.
template <int ROW_WARPS_, int TOKEN_WARPS_, int ROW_TILES_, int TOKEN_TILES_, int STAGES_, int BLOCKS_>
struct Tile {
  static constexpr int ROW_WARPS = ROW_WARPS_, TOKEN_WARPS = TOKEN_WARPS_, THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
  static constexpr int ROW_TILES = ROW_TILES_, TOKEN_TILES = TOKEN_TILES_, STAGES = STAGES_;
  static constexpr int BLOCKS = BLOCKS_;  // a multiprocessor, where its shared memory is large enough
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, TOKENS = 8 * TOKEN_TILES * TOKEN_WARPS;
  // Where a stage's parts begin.
  static constexpr int SCALES = ROWS * STEP, X = SCALES + 4 * ROWS;
  static constexpr int STAGE_BYTES = X + 2 * TOKENS * TOKEN_HALF, BYTES = STAGES * STAGE_BYTES;
  // Copies of 16 bytes: of a token in a stage, and a thread's.
  static constexpr int TOKEN_CHUNKS = 2 * TOKEN_HALF / 16;
  static constexpr int ROW_COPIES = ROWS * CHUNKS / THREADS, TOKEN_COPIES = TOKENS * TOKEN_CHUNKS / THREADS;
  static_assert(BYTES <= MAX_SHARED_BYTES && STAGE_BYTES % 16 == 0 && STAGES >= 3);
  static_assert(ROWS * CHUNKS % THREADS == 0 && TOKENS * TOKEN_CHUNKS % THREADS == 0 && ROWS <= THREADS);
};

// How a call is shared between blocks.
struct Split {
  int parts;       // of K
  int row_blocks;  // shares of the rows
  int64_t stride;  // floats of a token's partial sums
};

// Copies to the ring, a stage at a time: along the block's part of K, then the next pass of its rows. Past the last,
// zeros.
template <typename T>
struct Loader {
  const DenseArgs& args;
  const Rows& rows;
  int begin, end;           // the block's steps along K
  int first_token, tokens;  // and its tokens
  int row, step;            // of the next stage

  __device__ __forceinline__ Loader(const DenseArgs& args, const Rows& rows, int parts) : args(args), rows(rows) {
    const int part = blockIdx.y % parts, steps = args.K / STEP;
    begin = step = steps * part / parts;
    end = steps * (part + 1) / parts;
    first_token = blockIdx.y / parts * T::TOKENS;
    tokens = min(T::TOKENS, args.M - first_token);
    row = rows.begin;
  }
  __device__ __forceinline__ int exist() const { return min(rows.of_pass, rows.end - row); }
  __device__ __forceinline__ const uint8_t* weights_of(int r) const {
    return static_cast<const uint8_t*>(args.weight) + static_cast<int64_t>(row + r) * args.K + step * STEP;
  }
  __device__ __forceinline__ void load_weights(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < T::ROW_COPIES; ++i) {
      const int chunk = threadIdx.x + i * T::THREADS, r = chunk / CHUNKS, part = chunk % CHUNKS;
      cp_async16_if(r < exist(), stage + (part / 2 * T::ROWS + r) * HALF + part % 2 * 16, weights_of(r) + part * 16);
    }
    const int r = threadIdx.x;
    if (r < T::ROWS)
      cp_async4_if(r < exist(), stage + T::SCALES + r * 4,
                   args.scale + static_cast<int64_t>(row + r) * (args.K / HALF) + step * (STEP / HALF));
  }
  __device__ __forceinline__ void load_tokens(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < T::TOKEN_COPIES; ++i) {
      const int chunk = threadIdx.x + i * T::THREADS, t = chunk / T::TOKEN_CHUNKS, part = chunk % T::TOKEN_CHUNKS;
      constexpr int OF_HALF = T::TOKEN_CHUNKS / 2;
      cp_async16_if(t < tokens && row < rows.end,
                    stage + T::X + (part / OF_HALF * T::TOKENS + t) * TOKEN_HALF + part % OF_HALF * 16,
                    static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(first_token + t) * args.K +
                        step * STEP + part * 8);
    }
  }
  // What the next stages will copy.
  __device__ __forceinline__ void prefetch_weights() const {
    const int r = threadIdx.x, bytes = min(T::STAGES - 1, end - begin) * STEP;
    if (r < exist())
      for (int at = 0; at < bytes; at += 128)
        prefetch_to_l2(weights_of(r) + at);
  }
  __device__ __forceinline__ void advance() {
    if (++step == end) {
      step = begin;
      row += rows.of_pass;
    }
  }
};

template <typename T>
using Accumulators = float[T::ROW_TILES][T::TOKEN_TILES][4];

// acc += the stage's weights . tokens
template <typename T>
__device__ __forceinline__ void multiply(Accumulators<T>& acc, uint32_t stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = warp / T::TOKEN_WARPS * 16 * T::ROW_TILES;
  const int first_token = warp % T::TOKEN_WARPS * 8 * T::TOKEN_TILES;
  const uint32_t my_rows = stage + first_row * HALF;
  const uint32_t my_scales = stage + T::SCALES + (first_row + lane / 4) * 4;
  const uint32_t my_tokens = stage + T::X + first_token * TOKEN_HALF + lane * 16;
  // Where a warp's tile is large, half of it is work enough to hide latencies, and both halves spill on sm_120.
  constexpr int HALVES = T::ROW_TILES * T::TOKEN_TILES > 8 ? 1 : 2;
#pragma unroll HALVES
  for (int half = 0; half < 2; ++half) {
    uint32_t w[T::ROW_TILES][2][4];
#pragma unroll
    for (int m = 0; m < T::ROW_TILES; ++m) {
      uint32_t scales[2];  // of rows g and g + 8
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = lds32(my_scales + (16 * m + 8 * i) * 4);
        scales[i] = half == 0 ? pair : pair >> 16;
      }
      load_scaled(w[m], my_rows + (half * T::ROWS + 16 * m) * HALF, scales);
    }
#pragma unroll
    for (int n = 0; n < T::TOKEN_TILES; ++n) {
      const uint4 x = lds128(my_tokens + (half * T::TOKENS + 8 * n) * TOKEN_HALF);
#pragma unroll
      for (int m = 0; m < T::ROW_TILES; ++m) {
        mma_bf16(acc[m][n], w[m][0][0], w[m][0][1], w[m][0][2], w[m][0][3], x.x, x.y);
        mma_bf16(acc[m][n], w[m][1][0], w[m][1][1], w[m][1][2], w[m][1][3], x.z, x.w);
      }
    }
  }
}

// A pass's outputs, or where K is split, its partial sums: eight rows of a token side by side.
template <typename T>
__device__ __forceinline__ void store(const DenseArgs& args, const Split& split, const Loader<T>& loader, int first_row,
                                      int rows, const Accumulators<T>& acc) {
  const int thread = thread_index(), warp = thread / 32;  // anew: the main loop needs the registers
  const int my_row = warp / T::TOKEN_WARPS * 16 * T::ROW_TILES + thread % 32 / 4;
  const int my_token = warp % T::TOKEN_WARPS * 8 * T::TOKEN_TILES + thread % 4 * 2;
  const int part = blockIdx.y % split.parts, token = loader.first_token + my_token, row = first_row + my_row;
  // Of eight tokens at a time: this lane's two, and of those its two rows of each m16 tile.
  auto for_each = [&](auto* first, int64_t stride, auto&& put) {
#pragma unroll
    for (int n = 0; n < T::TOKEN_TILES; ++n, first += 8 * stride)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (my_token + 8 * n + j < loader.tokens)
#pragma unroll
          for (int m = 0; m < T::ROW_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int offset = 16 * m + 8 * half;
              if (my_row + offset < rows) put(first[j * stride + offset], offset, acc[m][n][2 * half + j] * OF_WHOLE);
            }
  };
  if (split.parts > 1)
    for_each(args.partial + (static_cast<int64_t>(part) * args.M + token) * split.stride + row, split.stride,
             [&](float& to, int, float sum) { to = sum; });
  else
    for_each(args.out + static_cast<int64_t>(token) * args.N + row, args.N, [&](uint16_t& to, int offset, float sum) {
      to = to_bf16(args.bias == nullptr ? sum : sum + unpack_bf16x2(args.bias[row + offset]).x);
    });
}

template <typename T>
__global__ void __launch_bounds__(T::THREADS, T::BLOCKS) tiled(const DenseArgs args, const Split split) {
  const uint32_t ring = smem_addr(dynamic_shared_memory());
  const Rows rows(args.N, T::ROWS);
  Loader<T> loader(args, rows, split.parts);
  // What no kernel writes is on its way before the previous one ends: copies of a stage, and what comes after it to L2,
  // since a thread that waits for a later copy has waited for all before it.
  loader.load_weights(ring);
  loader.prefetch_weights();
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll 1
  for (int s = 0; s < T::STAGES - 1; ++s) {
    if (s > 0) loader.load_weights(ring + s * T::STAGE_BYTES);
    loader.load_tokens(ring + s * T::STAGE_BYTES);
    cp_async_commit();
    loader.advance();
  }
  uint32_t stage = ring, emptied = ring + (T::STAGES - 1) * T::STAGE_BYTES;
#pragma unroll 1
  for (int row = rows.begin; row < rows.end; row += rows.of_pass) {
    Accumulators<T> acc = {};
#pragma unroll 1
    for (int step = loader.begin; step < loader.end; ++step) {
      // This thread's copies of the stage have landed and, after the barrier, everyone's; and nobody needs the stage
      // before it any more.
      cp_async_wait<T::STAGES - 2>();
      __syncthreads();
      loader.load_weights(emptied);
      loader.load_tokens(emptied);
      cp_async_commit();
      loader.advance();
      multiply<T>(acc, stage);
      emptied = stage;
      stage = stage + T::STAGE_BYTES == ring + T::BYTES ? ring : stage + T::STAGE_BYTES;
    }
    store<T>(args, split, loader, row, min(rows.of_pass, rows.end - row), acc);
  }
}

// The parts of K, in their order: four rows of a token a thread.
constexpr int ADD_THREADS = 256;

__global__ void __launch_bounds__(ADD_THREADS) add_up(const DenseArgs args, const Split split) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t fours = split.stride / 4, i = static_cast<int64_t>(blockIdx.x) * ADD_THREADS + threadIdx.x;
  if (i >= args.M * fours) return;
  const int token = static_cast<int>(i / fours), row = static_cast<int>(i % fours) * 4;
  const float* const mine = args.partial + token * split.stride + row;
  float4 sum = __ldcg(reinterpret_cast<const float4*>(mine));
#pragma unroll 4
  for (int part = 1; part < split.parts; ++part) {
    const float4 more = __ldcg(reinterpret_cast<const float4*>(mine + part * args.M * split.stride));
    sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
  }
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (row + j < args.N)
      args.out[static_cast<int64_t>(token) * args.N + row + j] =
          to_bf16(args.bias == nullptr ? sums[j] : sums[j] + unpack_bf16x2(args.bias[row + j]).x);
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// In how many parts K is split: with fewest bytes through the busiest block's place on the card, of weights, of tokens,
// which are read once a pass, and of partial sums, written and read.
constexpr int MOST_PARTS = 8;
constexpr int SYSTEMS_SHARED_BYTES = 1 << 10;  // that a block takes beside its own
constexpr int64_t SECOND_KERNEL = 24 << 10;  // what a multiprocessor of an H100 reads in the microsecond that it takes

template <typename T>
Split split_of(const DenseArgs& args, const Device& device) {
  const int groups = ceil_div(args.M, T::TOKENS), steps = args.K / STEP;
  Split best{};
  int64_t least = INT64_MAX;
  const int slots =
      device.multiprocessors * std::clamp(device.shared_bytes / (T::BYTES + SYSTEMS_SHARED_BYTES), 1, T::BLOCKS);
  for (int parts = 1; parts <= std::min(MOST_PARTS, steps); ++parts) {
    const int blocks = std::min(std::max(1, slots / (parts * groups)), ceil_div(args.N, 16));
    const int64_t waves = ceil_div(int64_t{blocks} * parts * groups, slots);
    const int64_t rows = ceil_div(args.N, blocks), passes = ceil_div(rows, T::ROWS), k = STEP * ceil_div(steps, parts);
    const int64_t sums = parts == 1 ? 0 : SECOND_KERNEL + rows * T::TOKENS * 8;
    const int64_t bytes = waves * (k * (rows + passes * T::TOKENS * 2) + sums);
    if (bytes < least) {
      least = bytes;
      best = {parts, blocks, ceil_div(args.N, 4) * int64_t{4}};
    }
  }
  return best;
}

template <typename T>
int64_t workspace_bytes(const DenseArgs& args, const Device& device) {
  const Split split = split_of<T>(args, device);
  return split.parts == 1 ? 0 : split.parts * args.M * split.stride * 4;
}

template <typename T>
const char* launch(const DenseArgs& args, const Device& device, void* stream) {
  const Split split = split_of<T>(args, device);
  const dim3 grid(split.row_blocks, split.parts * ceil_div(args.M, T::TOKENS));
  const auto on = static_cast<cudaStream_t>(stream);
  const LaunchOptions options{device.dependent_launch};
  const char* why = launch_kernel(tiled<T>, grid, T::THREADS, T::BYTES, on, options, args, split);
  if (why != nullptr || split.parts == 1) return why;
  return launch_kernel(add_up, dim3(ceil_div(args.M * split.stride / 4, ADD_THREADS)), ADD_THREADS, 0, on, options,
                       args, split);
}

template <typename T>
DenseConfiguration configuration() {
  return {"int8_" + std::to_string(T::ROWS) + "x" + std::to_string(T::TOKENS),
          true,
          T::TOKENS,
          {T::THREADS, T::BYTES},
          workspace_bytes<T>,
          launch<T>};
}

}  // namespace

std::vector<DenseConfiguration> tiled_configurations() {
  return {configuration<Tile<4, 1, 2, 8, 5, 2>>(), configuration<Tile<4, 2, 2, 8, 4, 1>>()};
}

}  // namespace dense
}  // namespace mxfp4_sm120
