// SPDX-License-Identifier: Apache-2.0
// y = x . weight^T + bias, above all for 17 tokens and more. In linear.cu each block reads all tokens from the L2
// cache, and from some 32 on, that is more than its weights are. Here a block takes more rows and, to be as many blocks
// as there are multiprocessors, part of K, and its warps share what it reads by way of shared memory:
//
//                     K, split in 3                     gridDim.x shares of the rows, as in linear.cu
//               +---------+---------+---------+
//      rows     | block 0 | block 1 | block 2 |         each adds up its part of K; add_up adds the parts, in the order
//               +---------+---------+---------+         of K, a second kernel. If K isn't split, there is none.
//               | block 3 | ...
//
// A stage of the ring in shared memory is 64 k of the block's rows and tokens. 128 rows, 64 tokens, INT8:
//
//      weights   [half step of 32 k][row][32 bytes]                  8192 bytes
//      scales    [row][of the first and of the second half]           512
//      tokens    [half step][token][64 bytes]                        8192
//
// Products are m16n8k16 with 16 weight rows as A and 8 tokens as B. Which k a product's k means is free, as long as
// both sides agree: lane 4g + q takes the eight adjacent k from 8q on of a half step, of rows g and g + 8 and of token
// g, by one load each, the first four of them for the half step's first product. So all k of two products have the same
// INT8 scale: the products are of whole numbers, exact in BF16, and the FP32 sum of 32 of them is scaled, not each
// weight.
//
// Same bits every run on a card; how K is split depends on the number of multiprocessors.
#include <algorithm>
#include <string>

#include "../common/launch.h"
#include "../common/pack.cuh"
#include "rows.cuh"
#include "table.h"

namespace mxfp4_sm120 {
namespace dense {
namespace {

constexpr int STEP = 64, HALF = 32;   // k of a stage, and of a scale
constexpr int TOKEN_HALF = 2 * HALF;  // bytes of a token in a half step

// A lane's part of 16 weight rows in a half step: A of its two products.
struct Fragments {
  uint32_t a[2][4];
};

struct Bf16Rows {
  static constexpr bool INT8 = false;
  static constexpr int BYTES = 2;  // of a weight
  __device__ __forceinline__ static Fragments load(uint32_t at, int lane) {
    const uint4 upper = lds128(at + lane * 16), lower = lds128(at + 8 * HALF * BYTES + lane * 16);  // rows g and g + 8
    return {{{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}}};
  }
};

// Two of a word's int8 numbers as bf16, as in weights.cuh, unscaled: 128 + the low seven bits, less 128 or 256.
__device__ __forceinline__ uint32_t whole_pair(uint32_t word, int first_byte) {
  const uint32_t bytes = __byte_perm(word, 0x43434343u, first_byte == 0 ? 0x4140 : 0x4342);
  return fma_bf16x2(bytes & 0xff7fff7fu, 0x3f803f80u, (bytes & 0xff80ff80u) ^ 0x80008000u);
}

struct Int8Rows {
  static constexpr bool INT8 = true;
  static constexpr int BYTES = 1;
  __device__ __forceinline__ static Fragments load(uint32_t at, int lane) {
    const uint2 upper = lds64(at + lane * 8), lower = lds64(at + 8 * HALF * BYTES + lane * 8);
    return {{{whole_pair(upper.x, 0), whole_pair(lower.x, 0), whole_pair(upper.x, 2), whole_pair(lower.x, 2)},
             {whole_pair(upper.y, 0), whole_pair(lower.y, 0), whole_pair(upper.y, 2), whole_pair(lower.y, 2)}}};
  }
};

// A block's tile: warps side by side along rows and tokens, each with so many m16 and n8 tiles.
template <typename Weights_, int ROW_WARPS_, int TOKEN_WARPS_, int ROW_TILES_, int TOKEN_TILES_, int STAGES_>
struct Tile {
  using Weights = Weights_;
  static constexpr int ROW_WARPS = ROW_WARPS_, TOKEN_WARPS = TOKEN_WARPS_, THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
  static constexpr int ROW_TILES = ROW_TILES_, TOKEN_TILES = TOKEN_TILES_, STAGES = STAGES_;
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, TOKENS = 8 * TOKEN_TILES * TOKEN_WARPS;
  static constexpr int ROW_HALF = HALF * Weights::BYTES;  // bytes of a row in a half step
  // Where a stage's parts begin.
  static constexpr int SCALES = 2 * ROWS * ROW_HALF, X = SCALES + (Weights::INT8 ? 4 * ROWS : 0);
  static constexpr int STAGE_BYTES = X + 2 * TOKENS * TOKEN_HALF, BYTES = STAGES * STAGE_BYTES;
  // Copies of 16 bytes: of a row and of a token in a stage, and a thread's.
  static constexpr int ROW_CHUNKS = 2 * ROW_HALF / 16, TOKEN_CHUNKS = 2 * TOKEN_HALF / 16;
  static constexpr int ROW_COPIES = ROWS * ROW_CHUNKS / THREADS;
  static constexpr int TOKEN_COPIES = (TOKENS * TOKEN_CHUNKS + THREADS - 1) / THREADS;
  static_assert(BYTES <= MAX_SHARED_BYTES && STAGE_BYTES % 16 == 0 && STAGES >= 3);
  static_assert(ROWS * ROW_CHUNKS % THREADS == 0 && ROWS <= THREADS);
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
  using Weights = typename T::Weights;
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
    return static_cast<const uint8_t*>(args.weight) +
           (static_cast<int64_t>(row + r) * args.K + step * STEP) * Weights::BYTES;
  }
  __device__ __forceinline__ void load_weights(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < T::ROW_COPIES; ++i) {
      const int chunk = threadIdx.x + i * T::THREADS, r = chunk / T::ROW_CHUNKS, part = chunk % T::ROW_CHUNKS;
      constexpr int OF_HALF = T::ROW_CHUNKS / 2;
      cp_async16_if(r < exist(), stage + (part / OF_HALF * T::ROWS + r) * T::ROW_HALF + part % OF_HALF * 16,
                    weights_of(r) + part * 16);
    }
    if constexpr (Weights::INT8) {
      const int r = threadIdx.x;
      if (r < T::ROWS)
        cp_async4_if(r < exist(), stage + T::SCALES + r * 4,
                     args.scale + static_cast<int64_t>(row + r) * (args.K / HALF) + step * (STEP / HALF));
    }
  }
  __device__ __forceinline__ void load_tokens(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < T::TOKEN_COPIES; ++i) {
      const int chunk = threadIdx.x + i * T::THREADS, t = chunk / T::TOKEN_CHUNKS, part = chunk % T::TOKEN_CHUNKS;
      constexpr int OF_HALF = T::TOKEN_CHUNKS / 2;
      if (t >= T::TOKENS) continue;  // of 16 tokens, where half of the threads copy
      cp_async16_if(t < tokens && row < rows.end,
                    stage + T::X + (part / OF_HALF * T::TOKENS + t) * TOKEN_HALF + part % OF_HALF * 16,
                    static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(first_token + t) * args.K +
                        step * STEP + part * 8);
    }
  }
  // What the next stages will copy.
  __device__ __forceinline__ void prefetch_weights() const {
    const int r = threadIdx.x, bytes = min(T::STAGES - 1, end - begin) * STEP * Weights::BYTES;
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
  const uint32_t my_rows = stage + first_row * T::ROW_HALF;
  const uint32_t my_scales = stage + T::SCALES + (first_row + lane / 4) * 4;
  const uint32_t my_tokens = stage + T::X + first_token * TOKEN_HALF + lane * 16;
  // Where a warp's tile is large, half of it is work enough to hide latencies, and both halves spill on sm_120.
  constexpr int HALVES = T::ROW_TILES * T::TOKEN_TILES > 8 ? 1 : 2;
#pragma unroll HALVES
  for (int half = 0; half < 2; ++half) {
    Fragments w[T::ROW_TILES];
    float scale[T::ROW_TILES][2];  // of rows g and g + 8
#pragma unroll
    for (int m = 0; m < T::ROW_TILES; ++m) {
      w[m] = T::Weights::load(my_rows + (half * T::ROWS + 16 * m) * T::ROW_HALF, lane);
      if constexpr (T::Weights::INT8)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t pair = lds32(my_scales + (16 * m + 8 * i) * 4);
          scale[m][i] = __uint_as_float(pair << (16 - 16 * half) & 0xffff0000u);
        }
    }
#pragma unroll
    for (int n = 0; n < T::TOKEN_TILES; ++n) {
      const uint4 x = lds128(my_tokens + (half * T::TOKENS + 8 * n) * TOKEN_HALF);
#pragma unroll
      for (int m = 0; m < T::ROW_TILES; ++m) {
        const auto& a = w[m].a;
        float (&sum)[4] = acc[m][n];
        if constexpr (T::Weights::INT8) {
          float of_scale[4];
          mma_bf16_of_zero(of_scale, a[0][0], a[0][1], a[0][2], a[0][3], x.x, x.y);
          mma_bf16(of_scale, a[1][0], a[1][1], a[1][2], a[1][3], x.z, x.w);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sum[i] += scale[m][i / 2] * of_scale[i];
        } else {
          mma_bf16(sum, a[0][0], a[0][1], a[0][2], a[0][3], x.x, x.y);
          mma_bf16(sum, a[1][0], a[1][1], a[1][2], a[1][3], x.z, x.w);
        }
      }
    }
  }
}

__device__ __forceinline__ uint16_t to_bf16(float v) { return static_cast<uint16_t>(pack_bf16x2(v, 0.f)); }

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
              if (my_row + offset < rows) put(first[j * stride + offset], offset, acc[m][n][2 * half + j]);
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
__global__ void __launch_bounds__(T::THREADS, 1) tiled(const DenseArgs args, const Split split) {
  const uint32_t ring = smem_addr(dynamic_shared_memory());
  const Rows rows(args.N, T::ROWS);
  Loader<T> loader(args, rows, split.parts);
  // What no kernel writes is on its way before the previous one ends: copies of a stage, and what comes after it to L2,
  // since a thread that waits for a later copy has waited for all before it.
  loader.load_weights(ring);
  loader.prefetch_weights();
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
    if (row + rows.of_pass >= rows.end) let_next_kernel_start();
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

// In how many parts K is split: with fewest bytes through the busiest multiprocessor, of weights, of tokens, which are
// read once a pass, and of partial sums, written and read.
constexpr int MOST_PARTS = 8;
constexpr int64_t SECOND_KERNEL = 24 << 10;  // what a multiprocessor of an H100 reads in the microsecond that it takes

template <typename T>
Split split_of(const DenseArgs& args, const Device& device) {
  const int groups = ceil_div(args.M, T::TOKENS), steps = args.K / STEP;
  Split best{};
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= std::min(MOST_PARTS, steps); ++parts) {
    const int blocks = std::min(std::max(1, device.multiprocessors / (parts * groups)), ceil_div(args.N, 16));
    const int64_t waves = ceil_div(int64_t{blocks} * parts * groups, device.multiprocessors);
    const int64_t rows = ceil_div(args.N, blocks), passes = ceil_div(rows, T::ROWS), k = STEP * ceil_div(steps, parts);
    const int64_t sums = parts == 1 ? 0 : SECOND_KERNEL + rows * T::TOKENS * 8;
    const int64_t bytes = waves * (k * (rows * T::Weights::BYTES + passes * T::TOKENS * 2) + sums);
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
  return {(T::Weights::INT8 ? "int8_" : "bf16_") + std::to_string(T::ROWS) + "x" + std::to_string(T::TOKENS),
          T::Weights::INT8,
          T::TOKENS,
          STEP,
          {T::THREADS, T::BYTES},
          workspace_bytes<T>,
          launch<T>};
}

}  // namespace

// Stages: as many as fit. Wider tiles of rows read the tokens less often: for lm_head, whose K needn't be split.
std::vector<DenseConfiguration> tiled_configurations() {
  return {configuration<Tile<Bf16Rows, 4, 2, 2, 1, 5>>(), configuration<Tile<Bf16Rows, 4, 2, 2, 2, 4>>(),
          configuration<Tile<Bf16Rows, 4, 2, 2, 4, 4>>(), configuration<Tile<Bf16Rows, 4, 2, 2, 8, 3>>(),
          configuration<Tile<Int8Rows, 4, 2, 2, 1, 9>>(), configuration<Tile<Int8Rows, 4, 2, 2, 2, 7>>(),
          configuration<Tile<Int8Rows, 4, 2, 2, 4, 6>>(), configuration<Tile<Int8Rows, 8, 1, 2, 8, 3>>(),
          configuration<Tile<Int8Rows, 4, 2, 2, 8, 4>>()};
}

}  // namespace dense
}  // namespace mxfp4_sm120
