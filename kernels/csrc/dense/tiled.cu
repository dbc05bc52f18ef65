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
// A stage of the ring in shared memory is 64 k of the block's 128 rows and 64 tokens, each row and token in one piece:
// a copy's lanes that read a line of global memory write to one place, which takes a turn of shared memory's.
//
//      weights   [row][64 bytes]                               8192 bytes
//      scales    [row][of the first and of the second half]     512
//      tokens    [token][128 bytes]                            8192
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

// A block's tile: each warp has so many m16 tiles of rows, and n8 tiles of all tokens.
constexpr int WARPS = 4, ROW_TILES = 2, TOKEN_TILES = 8, THREADS = 32 * WARPS;
constexpr int ROWS = 16 * ROW_TILES * WARPS, TOKENS = 8 * TOKEN_TILES;
constexpr int BLOCKS = 2;  // a multiprocessor, where its shared memory is large enough
// In a stage: a row's bytes and a token's, and where scales and tokens begin.
constexpr int ROW_BYTES = STEP, TOKEN_BYTES = 2 * STEP, SCALES = ROWS * ROW_BYTES, X = SCALES + 4 * ROWS;
constexpr int STAGES = 5, STAGE_BYTES = X + TOKENS * TOKEN_BYTES, BYTES = STAGES * STAGE_BYTES;
static_assert(BYTES <= MAX_SHARED_BYTES);
// Copies of 16 bytes: of a row, of a token; and how many of them all threads copy at once.
constexpr int CHUNKS = ROW_BYTES / 16, TOKEN_CHUNKS = TOKEN_BYTES / 16;
constexpr int ROWS_AT_ONCE = THREADS / CHUNKS, TOKENS_AT_ONCE = THREADS / TOKEN_CHUNKS;
static_assert(ROWS == THREADS);  // each of which copies a row's scales

// Where a half of a token begins in a stage: they change places in every other token, as a row's in `half_of_row`.
__device__ __forceinline__ uint32_t half_of_token(int token, int half) {
  return token * TOKEN_BYTES + (half ^ token % 2) * (TOKEN_BYTES / 2);
}

// How a call is shared between blocks.
struct Split {
  int parts;       // of K
  int row_blocks;  // shares of the rows
  int64_t stride;  // floats of a token's partial sums
};

// A block's share of the call.
struct Share {
  Rows rows;
  int begin, steps;  // along K
  int first_token, tokens;

  __device__ __forceinline__ Share(const DenseArgs& args, int parts) : rows(args.N, ROWS) {
    const int part = blockIdx.y % parts, all = args.K / STEP;
    begin = all * part / parts;
    steps = all * (part + 1) / parts - begin;
    first_token = blockIdx.y / parts * TOKENS;
    tokens = min(TOKENS, args.M - first_token);
  }
  __device__ __forceinline__ int rows_from(int row) const { return min(rows.of_pass, rows.end - row); }
};

// Walks the block's steps, for the weights: along its part of K, then the next pass of its rows. Past the last, zeros.
struct Loader {
  const DenseArgs& args;
  const Share& share;
  int row, exist;         // the pass's first row, and how many there are from this thread's first one on
  int left;               // steps of this pass
  uint32_t to;            // in a stage
  const uint8_t* weight;  // 16 bytes of this thread's first row
  const uint16_t* scale;  // of this thread's own row

  __device__ __forceinline__ Loader(const DenseArgs& args, const Share& share) : args(args), share(share) {
    const int mine = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    row = share.rows.begin;
    exist = share.rows_from(row) - mine;
    left = share.steps;
    to = half_of_row(mine, chunk / 2) + chunk % 2 * 16;
    weight = static_cast<const uint8_t*>(args.weight) + static_cast<int64_t>(row + mine) * args.K + share.begin * STEP +
             chunk * 16;
    scale = scales_of(args.scale, args.N, share.begin, row + threadIdx.x);
  }
  __device__ __forceinline__ void load(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE)
      cp_async16_if(i < exist, stage + to + i * ROW_BYTES, weight + i * args.K);
    const int mine = threadIdx.x;
    cp_async4_if(mine - mine / CHUNKS < exist, stage + SCALES + mine * 4, scale);
  }
  // What the next stages will copy.
  __device__ __forceinline__ void prefetch() const {
    const int bytes = min(STAGES - 1, share.steps) * STEP;
#pragma unroll
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE)
      for (int at = threadIdx.x % CHUNKS * 128; at < bytes && i < exist; at += CHUNKS * 128)
        prefetch_to_l2(weight + i * args.K + at);
  }
  __device__ __forceinline__ void advance() {
    weight += STEP;
    scale += 2 * args.N;
    if (--left > 0) return;
    const int64_t by = static_cast<int64_t>(share.rows.of_pass) * args.K - share.steps * STEP;
    left = share.steps;
    row += share.rows.of_pass;
    exist = share.rows_from(row) - static_cast<int>(threadIdx.x) / CHUNKS;
    weight += by;
    scale += 2 * share.rows.of_pass - int64_t{2} * share.steps * args.N;
  }
};

// Walks the same steps, for the tokens, which are the same in each pass.
struct TokenLoader {
  const DenseArgs& args;
  const Share& share;
  int exist;         // from this thread's first token on
  int left, passes;  // steps of this pass; and with it
  uint32_t to;
  const uint16_t* x;  // 16 bytes of this thread's first token

  __device__ __forceinline__ TokenLoader(const DenseArgs& args, const Share& share) : args(args), share(share) {
    const int mine = threadIdx.x / TOKEN_CHUNKS, chunk = threadIdx.x % TOKEN_CHUNKS;
    passes = share.rows.passes;
    exist = passes > 0 ? share.tokens - mine : 0;
    left = share.steps;
    to = X + half_of_token(mine, chunk / 4) + chunk % 4 * 16;
    x = static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(share.first_token + mine) * args.K +
        share.begin * STEP + chunk * 8;
  }
  __device__ __forceinline__ void load(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < TOKENS; i += TOKENS_AT_ONCE)
      cp_async16_if(i < exist, stage + to + i * TOKEN_BYTES, x + i * args.K);
  }
  __device__ __forceinline__ void advance() {
    x += STEP;
    if (--left > 0) return;
    left = share.steps;
    x -= share.steps * STEP;
    if (--passes == 0) exist = 0;
  }
};

// A loader goes on just before it loads: while copies that have begun still read its registers, it would wait.
__device__ __forceinline__ void load_next(Loader& weights, TokenLoader& tokens, uint32_t stage) {
  weights.advance();
  weights.load(stage);
  tokens.advance();
  tokens.load(stage);
  cp_async_commit();
}

using Accumulators = float[ROW_TILES][TOKEN_TILES][4];

// A lane's part of 16 weight rows in a half step, A of its two products; `scales` of rows g and g + 8, low halves.
__device__ __forceinline__ void load_scaled(uint32_t (&a)[2][4], uint32_t at, const uint32_t (&scales)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint2 row = lds64(at + 8 * i * ROW_BYTES);
    const uint32_t words[2] = {offset_by_128(row.x), offset_by_128(row.y)};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[j / 2][j % 2 * 2 + i] = mul_bf16x2_by_lo(whole_pair(words[j / 2], j % 2 * 2), scales[i]);
  }
}

// acc += the stage's weights . tokens
__device__ __forceinline__ void multiply(Accumulators& acc, uint32_t stage) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, first_row = threadIdx.x / 32 * 16 * ROW_TILES;
  const uint32_t rows = stage + first_row * ROW_BYTES + q * 8, tokens = stage + X + q * 16;
  const uint32_t scales_of_rows = stage + SCALES + (first_row + g) * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 x[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n)
      x[n] = lds128(tokens + half_of_token(g, half) + 8 * n * TOKEN_BYTES);
    uint32_t w[ROW_TILES][2][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      uint32_t scales[2];  // of rows g and g + 8
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = lds32(scales_of_rows + (16 * m + 8 * i) * 4);
        scales[i] = half == 0 ? pair : pair >> 16;
      }
      load_scaled(w[m], rows + half_of_row(g, half) + 16 * m * ROW_BYTES, scales);
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        mma_bf16(acc[m][n], w[m][0][0], w[m][0][1], w[m][0][2], w[m][0][3], x[n].x, x[n].y);
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        mma_bf16(acc[m][n], w[m][1][0], w[m][1][1], w[m][1][2], w[m][1][3], x[n].z, x[n].w);
  }
}

// A pass's outputs, or where K is split, its partial sums: eight rows of a token side by side.
__device__ __forceinline__ void store(const DenseArgs& args, const Split& split, const Share& share, int first_row,
                                      const Accumulators& acc) {
  const int thread = thread_index();  // anew: the main loop needs the registers
  const int my_row = thread / 32 * 16 * ROW_TILES + thread % 32 / 4, my_token = thread % 4 * 2;
  const int rows = share.rows_from(first_row), row = first_row + my_row, token = share.first_token + my_token;
  // Of eight tokens at a time: this lane's two, and of those its two rows of each m16 tile.
  auto for_each = [&](auto* first, int64_t stride, auto&& put) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n, first += 8 * stride)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (my_token + 8 * n + j < share.tokens)
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int offset = 16 * m + 8 * half;
              if (my_row + offset < rows) put(first[j * stride + offset], offset, acc[m][n][2 * half + j] * OF_WHOLE);
            }
  };
  const int part = blockIdx.y % split.parts;
  if (split.parts > 1)
    for_each(args.partial + (static_cast<int64_t>(part) * args.M + token) * split.stride + row, split.stride,
             [&](float& to, int, float sum) { to = sum; });
  else
    for_each(args.out + static_cast<int64_t>(token) * args.N + row, args.N, [&](uint16_t& to, int offset, float sum) {
      to = to_bf16(args.bias == nullptr ? sum : sum + unpack_bf16x2(args.bias[row + offset]).x);
    });
}

__global__ void __launch_bounds__(THREADS, BLOCKS) tiled(const DenseArgs args, const Split split) {
  const uint32_t ring = smem_addr(dynamic_shared_memory());
  const Share share(args, split.parts);
  Loader weights(args, share);
  TokenLoader tokens(args, share);
  // What no kernel writes is on its way before the previous one ends: copies of a stage, and what comes after it to L2,
  // since a thread that waits for a later copy has waited for all before it.
  weights.load(ring);
  weights.prefetch();
  let_next_kernel_start();
  wait_for_previous_kernel();
  tokens.load(ring);
  cp_async_commit();
#pragma unroll 1
  for (int s = 1; s < STAGES - 1; ++s)
    load_next(weights, tokens, ring + s * STAGE_BYTES);
  uint32_t stage = ring, emptied = ring + (STAGES - 1) * STAGE_BYTES;
#pragma unroll 1
  for (int row = share.rows.begin; row < share.rows.end; row += share.rows.of_pass) {
    Accumulators acc = {};
#pragma unroll 1
    for (int step = 0; step < share.steps; ++step) {
      // This thread's copies of the stage have landed and, after the barrier, everyone's; and nobody needs the stage
      // before it any more.
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load_next(weights, tokens, emptied);
      multiply(acc, stage);
      emptied = stage;
      stage = stage + STAGE_BYTES == ring + BYTES ? ring : stage + STAGE_BYTES;
    }
    store(args, split, share, row, acc);
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

Split split_of(const DenseArgs& args, const Device& device) {
  const int groups = ceil_div(args.M, TOKENS), steps = args.K / STEP;
  Split best{};
  int64_t least = INT64_MAX;
  const int slots =
      device.multiprocessors * std::clamp(device.shared_bytes / (BYTES + SYSTEMS_SHARED_BYTES), 1, BLOCKS);
  for (int parts = 1; parts <= std::min(MOST_PARTS, steps); ++parts) {
    const int blocks = std::min(std::max(1, slots / (parts * groups)), ceil_div(args.N, 16));
    const int64_t waves = ceil_div(int64_t{blocks} * parts * groups, slots);
    const int64_t rows = ceil_div(args.N, blocks), passes = ceil_div(rows, ROWS), k = STEP * ceil_div(steps, parts);
    const int64_t sums = parts == 1 ? 0 : SECOND_KERNEL + rows * TOKENS * 8;
    const int64_t bytes = waves * (k * (rows + passes * TOKENS * 2) + sums);
    if (bytes < least) {
      least = bytes;
      best = {parts, blocks, ceil_div(args.N, 4) * int64_t{4}};
    }
  }
  return best;
}

int64_t workspace_bytes(const DenseArgs& args, const Device& device) {
  const Split split = split_of(args, device);
  return split.parts == 1 ? 0 : split.parts * args.M * split.stride * 4;
}

const char* launch(const DenseArgs& args, const Device& device, void* stream) {
  const Split split = split_of(args, device);
  const dim3 grid(split.row_blocks, split.parts * ceil_div(args.M, TOKENS));
  const auto on = static_cast<cudaStream_t>(stream);
  const LaunchOptions options{device.dependent_launch};
  const char* why = launch_kernel(tiled, grid, THREADS, BYTES, on, options, args, split);
  if (why != nullptr || split.parts == 1) return why;
  return launch_kernel(add_up, dim3(ceil_div(args.M * split.stride / 4, ADD_THREADS)), ADD_THREADS, 0, on, options,
                       args, split);
}

}  // namespace

std::vector<DenseConfiguration> tiled_configurations() {
  return {{"int8_" + std::to_string(ROWS) + "x" + std::to_string(TOKENS),
           true,
           TOKENS,
           {THREADS, BYTES},
           workspace_bytes,
           launch}};
}

}  // namespace dense
}  // namespace mxfp4_sm120
