// Grouped GEMM over experts, for more tokens than the decode kernel takes: gate-up (with SwiGLU) and down are two
// launches of one template.
//
// A persistent grid. An item is (expert, group of weight rows, tile of that expert's tokens), with the token tiles of
// one row group next to each other so that its weights are read from memory once. Threads fill a ring of shared-memory
// stages with cp.async, ahead of the arithmetic and across items: packed weight tiles and gathered token rows. Warps
// decode weights straight into A operands, in registers, and never write a decoded weight anywhere.
//
// There is no producer warp: a ninth warp would take a third of one scheduler's registers, and the accumulators need
// them. So the copying code stands in every warp's way and is kept short: plain cp.async groups, one block barrier a
// stage.
#include "grouped_gemm.cuh"

namespace mxfp4_sm120 {
namespace {

// WR 32-row tiles and NT n8 token tiles per warp; WM x WN warps; KT k-tiles per stage; STAGES deep; BLOCKS per
// multiprocessor.
template <int WR_, int WM_, int WN_, int NT_, int KT_, int STAGES_, int BLOCKS_ = 1>
struct Shape {
  static constexpr int WR = WR_, WM = WM_, WN = WN_, NT = NT_, KT = KT_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int ROW_TILES = WR * WM, TOKENS = 8 * NT * WN, WARPS = WM * WN, THREADS = 32 * WARPS;
  static constexpr int WEIGHT_BYTES = ROW_TILES * KT * TILE_BYTES, TOKEN_BYTES = KT * TOKENS * 64;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
  static constexpr int BYTES = STAGES * STAGE_BYTES + (MAX_EXPERTS + 1) * 8;
  // 16-byte chunks of a stage, per thread. A thread keeps to SOURCES of the token rows: one where the chunks of a
  // k-tile divide the threads, else as many as it takes to cover a k-tile.
  static constexpr int ALL_WEIGHT_CHUNKS = WEIGHT_BYTES / 16,
                       WEIGHT_CHUNKS = (ALL_WEIGHT_CHUNKS + THREADS - 1) / THREADS;
  static constexpr int K_TILE_CHUNKS = TOKENS * 4;
  static constexpr bool EVEN = THREADS % K_TILE_CHUNKS == 0;
  static constexpr int SOURCES = EVEN ? 1 : (K_TILE_CHUNKS + THREADS - 1) / THREADS;
  static constexpr int TOKEN_CHUNKS = EVEN ? (KT * K_TILE_CHUNKS + THREADS - 1) / THREADS : KT * SOURCES;
  static_assert(STAGES >= 3);
  static_assert(BYTES * BLOCKS + (BLOCKS - 1) * 1024 <= MAX_SHARED_BYTES);
};

// Walks a block's items in order.
struct Item {
  int expert = 0, row_group = 0, begin = 0, tokens = 0;
  // `tiles` [experts + 1]: token tiles before each expert. False past the last item.
  __device__ bool find(int item, int row_groups, int tile_tokens, int experts, const int* tiles, const int* offsets) {
    if (item >= tiles[experts] * row_groups) return false;
    while (item >= tiles[expert + 1] * row_groups)
      ++expert;
    const int here = tiles[expert + 1] - tiles[expert], n = item - tiles[expert] * row_groups;
    row_group = n / here;
    begin = offsets[expert] + (n - row_group * here) * tile_tokens;
    tokens = min(tile_tokens, offsets[expert + 1] - begin);
    return true;
  }
};

// Fills the ring, a stage at a time, for the items a block will meet.
template <typename S, bool GATE_UP>
struct Loader {
  const Gemm& p;
  const int* tiles;
  const int* offsets;
  uint32_t smem;
  int row_tiles, k_tiles, row_groups, index;
  Item item;
  int k = 0, stage = 0;
  const uint8_t* weights = nullptr;          // of the current row group, at k
  uint32_t weight_offset[S::WEIGHT_CHUNKS];  // of this thread's chunks, from there
  uint32_t weight_rows = 0;                  // bit i: chunk i belongs to a row that exists
  const uint8_t* token_row[S::SOURCES];      // this thread's rows, at k
  int token_bytes[S::SOURCES];               // 16; 0: zeros, no such token; -1: nothing, its n8 tile is never read

  __device__ __forceinline__ Loader(const Gemm& p, const int* tiles, const int* offsets, uint32_t smem, int row_tiles,
                                    int k_tiles, int row_groups)
      : p(p),
        tiles(tiles),
        offsets(offsets),
        smem(smem),
        row_tiles(row_tiles),
        k_tiles(k_tiles),
        row_groups(row_groups),
        index(blockIdx.x) {
#pragma unroll
    for (int i = 0; i < S::WEIGHT_CHUNKS; ++i) {
      const int chunk = threadIdx.x + i * S::THREADS, row_tile = chunk / (S::KT * TILE_CHUNKS);
      weight_offset[i] = row_tile * k_tiles * TILE_BYTES + (chunk - row_tile * S::KT * TILE_CHUNKS) * 16;
    }
    begin_item();
  }

  __device__ __forceinline__ void begin_item() {
    const bool exists = item.find(index, row_groups, S::TOKENS, p.experts, tiles, offsets);
    index += gridDim.x;
    k = 0;
    weight_rows = 0;
#pragma unroll
    for (int i = 0; i < S::SOURCES; ++i)
      token_bytes[i] = -1;
    if (!exists) return;  // from here on nothing is copied
    const int first = item.row_group * S::ROW_TILES;
    weights = p.weights + (static_cast<int64_t>(item.expert) * row_tiles + first) * k_tiles * TILE_BYTES;
#pragma unroll
    for (int i = 0; i < S::WEIGHT_CHUNKS; ++i) {
      const int row_tile = (threadIdx.x + i * S::THREADS) / (S::KT * TILE_CHUNKS);
      weight_rows |= (row_tile < S::ROW_TILES && first + row_tile < row_tiles) << i;
    }
#pragma unroll
    for (int i = 0; i < S::SOURCES; ++i) {
      const int chunk = threadIdx.x + i * S::THREADS, t = S::EVEN ? chunk / 4 % S::TOKENS : chunk / 4;
      const bool live = t < item.tokens;
      const int row = !live ? 0 : GATE_UP ? p.order[item.begin + t] : item.begin + t;
      token_row[i] =
          reinterpret_cast<const uint8_t*>(p.in) + static_cast<int64_t>(row) * p.K * 2 + threadIdx.x % 4 * 16;
      token_bytes[i] = live ? 16 : (t & ~7) < item.tokens ? 0 : -1;
    }
  }

  // Starts the copies of one stage. No branches, so that products are scheduled in between.
  __device__ __forceinline__ void load_stage() {
    const uint32_t dst = smem + stage * S::STAGE_BYTES + threadIdx.x * 16;
    const int kts = S::KT == 1 ? 1 : min(S::KT, k_tiles - k);
#pragma unroll
    for (int i = 0; i < S::WEIGHT_CHUNKS; ++i)
      if ((weight_rows >> i & 1) && (kts == S::KT || (threadIdx.x + i * S::THREADS) / TILE_CHUNKS % S::KT < kts))
        cp_async16(dst + i * S::THREADS * 16, weights + weight_offset[i]);
#pragma unroll
    for (int i = 0; i < S::TOKEN_CHUNKS; ++i) {
      // In the stage: [k-tile t][token][4 chunks].
      const int source = S::EVEN ? 0 : i % S::SOURCES;
      const int t = S::EVEN ? (threadIdx.x + i * S::THREADS) / S::K_TILE_CHUNKS : i / S::SOURCES;
      const int chunk = S::EVEN ? i * S::THREADS : t * S::K_TILE_CHUNKS + source * S::THREADS;
      if (t < kts && token_bytes[source] >= 0)
        cp_async16(dst + S::WEIGHT_BYTES + chunk * 16, token_row[source] + t * 64, token_bytes[source]);
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void advance() {
    weights += S::KT * TILE_BYTES;
#pragma unroll
    for (int i = 0; i < S::SOURCES; ++i)
      token_row[i] += S::KT * 64;
    k += S::KT;
    if (++stage == S::STAGES) stage = 0;
    if (k >= k_tiles) begin_item();
  }
};

// acc += weights x tokens over one item, whose first stage has landed; the next item's first stage has when it returns.
// Software-pipelined: while the tensor cores work on one half tile, the next one is decoded and the next k-tile's
// operands are fetched, so that a warp always has products to issue.
template <typename S, int NTA, typename L>
__device__ __forceinline__ void main_loop(float (&acc)[2 * S::WR][S::NT][4], L& loader, uint32_t smem, int k_tiles,
                                          int wm, int wn, int lane, int& stage) {
  constexpr int HALVES = 2 * S::WR;  // m16 tiles of a warp
  const uint32_t my_weights = smem + wm * S::WR * S::KT * TILE_BYTES;
  const uint32_t my_tokens = smem + S::WEIGHT_BYTES + (wn * 8 + (lane >> 2)) * 64 + (lane & 3) * 16;
  PackedTile tile[S::WR];
  uint4 b[NTA];
  auto load_weights = [&](int stage, int t) {
#pragma unroll
    for (int r = 0; r < S::WR; ++r)
      tile[r] = load_tile(my_weights + stage * S::STAGE_BYTES + (r * S::KT + t) * TILE_BYTES, lane);
  };
  auto load_tokens = [&](int stage, int t, int n) {
    b[n] = lds128(my_tokens + stage * S::STAGE_BYTES + t * S::TOKENS * 64 + n * S::WN * 512);
  };
  load_weights(stage, 0);
#pragma unroll
  for (int n = 0; n < NTA; ++n)
    load_tokens(stage, 0, n);
  AFragments a = decode_half_tile(tile[0], 0);
  for (int k = 0; k < k_tiles; k += S::KT) {
    const int next_stage = stage + 1 == S::STAGES ? 0 : stage + 1;
#pragma unroll
    for (int t = 0; t < S::KT; ++t) {
      if (S::KT > 1 && k + t >= k_tiles) break;
      // The next k-tile lies in this stage or the next; past the item's end it is fetched and not used.
      const bool leaving = t + 1 == S::KT || k + t + 1 >= k_tiles;
      const int from = leaving ? next_stage : stage, u = leaving ? 0 : t + 1;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        AFragments next;
        if (h + 1 < HALVES) {
          next = decode_half_tile(tile[(h + 1) / 2], (h + 1) % 2);
        } else {
          if (leaving) {
            cp_async_wait<S::STAGES -
                          3>();  // the next stage has landed, for this thread's copies and, after the barrier, for all
            __syncthreads();     // and every warp holds all of this stage in registers: refill it
            loader.load_stage();
          }
          load_weights(from, u);
        }
#pragma unroll
        for (int n = 0; n < NTA; ++n)
          mma_bf16(acc[h][n], a.lo[0], a.hi[0], a.lo[1], a.hi[1], b[n].x, b[n].y);
#pragma unroll
        for (int n = 0; n < NTA; ++n) {
          mma_bf16(acc[h][n], a.lo[2], a.hi[2], a.lo[3], a.hi[3], b[n].z, b[n].w);
          if (h + 1 == HALVES) load_tokens(from, u, n);
        }
        if (h + 1 == HALVES) next = decode_half_tile(tile[0], 0);
        a = next;
      }
    }
    loader.advance();
    stage = next_stage;
  }
}

template <typename S, bool GATE_UP>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) grouped_gemm(const Gemm p) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  const uint32_t smem = smem_addr(smem_bytes);
  int* const tiles = reinterpret_cast<int*>(smem_bytes + S::STAGES * S::STAGE_BYTES);
  int* const offsets = tiles + MAX_EXPERTS + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
  const int row_tiles = p.rows / TILE, k_tiles = p.K / TILE, row_groups = (row_tiles + S::ROW_TILES - 1) / S::ROW_TILES;

  wait_for_previous_kernel();
  for (int e = threadIdx.x; e <= p.experts; e += S::THREADS)
    offsets[e] = p.offsets[e];
  __syncthreads();
  if (warp == 0)
    count_tiles(tiles, offsets, p.experts, [](int tokens) { return (tokens + S::TOKENS - 1) / S::TOKENS; });
  __syncthreads();

  Loader<S, GATE_UP> loader(p, tiles, offsets, smem, row_tiles, k_tiles, row_groups);
  for (int s = 0; s < S::STAGES - 1; ++s) {
    loader.load_stage();
    loader.advance();
  }
  cp_async_wait<S::STAGES - 2>();
  __syncthreads();
  Item item;
  int stage = 0;
  const int wm = warp % S::WM, wn = warp / S::WM;
  for (int i = blockIdx.x; item.find(i, row_groups, S::TOKENS, p.experts, tiles, offsets); i += gridDim.x) {
    const int first = item.row_group * S::ROW_TILES + wm * S::WR;
    const int active = ((item.tokens + 7) / 8 + S::WN - 1) / S::WN;  // n8 tiles per warp that hold tokens
    float acc[2 * S::WR][S::NT][4] = {};
#define RUN(NTA) main_loop<S, NTA>(acc, loader, smem, k_tiles, wm, wn, lane, stage)
    if constexpr (S::NT >= 8) {
      if (active <= S::NT / 4)
        RUN(S::NT / 4);
      else if (active <= S::NT / 2)
        RUN(S::NT / 2);
      else if (active <= S::NT * 3 / 4)
        RUN(S::NT * 3 / 4);
      else
        RUN(S::NT);
    } else if constexpr (S::NT >= 2) {
      if (active <= S::NT / 2)
        RUN(S::NT / 2);
      else
        RUN(S::NT);
    } else {
      RUN(S::NT);
    }
#undef RUN
#pragma unroll
    for (int r = 0; r < S::WR; ++r) {
      if (first + r >= row_tiles) continue;
      const int row = (first + r) * TILE + 4 * g;
      const float4 bias = bias_of(p, item.expert, row);
#pragma unroll
      for (int n = 0; n < S::NT; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int t = (n * S::WN + wn) * 8 + 2 * q + c;
          if (t < item.tokens) store_rows<GATE_UP>(p, item.begin + t, row, acc[2 * r][n], acc[2 * r + 1][n], c, bias);
        }
      }
    }
  }
  let_next_kernel_start();
}

template <typename S, bool GATE_UP>
const char* launch(const Gemm& p, const Device& device, cudaStream_t stream) {
  return launch_kernel(grouped_gemm<S, GATE_UP>, device.multiprocessors * S::BLOCKS, S::THREADS, S::BYTES, stream,
                       {device.dependent_launch}, p);
}

// Two blocks share a multiprocessor: one's barrier, start or epilogue is covered by the other's products. Few tokens:
// 192 rows (6 x 32), which divides GPT-OSS's 2880 and 5760. Many: 64 x 64 per warp, the most that the registers hold.
//                    WR WM WN NT KT stages blocks
using Tokens8 = Shape<1, 6, 1, 1, 3, 4, 2>;
using Tokens16 = Shape<1, 6, 1, 2, 2, 5, 2>;
using Tokens32 = Shape<1, 6, 1, 4, 2, 4, 2>;
using Tokens64 = Shape<2, 4, 1, 8, 1, 5, 2>;

template <typename S>
const char* both(const Gemm& gate_up, const Gemm& down, const Device& device, cudaStream_t stream) {
  if (const char* why = launch<S, true>(gate_up, device, stream)) return why;
  return launch<S, false>(down, device, stream);
}

}  // namespace

Footprint grouped_layer_footprint(int variant) {
  switch (variant) {
    case 0:
      return {Tokens8::THREADS, Tokens8::BYTES};
    case 1:
      return {Tokens16::THREADS, Tokens16::BYTES};
    case 2:
      return {Tokens32::THREADS, Tokens32::BYTES};
    case 3:
      return {Tokens64::THREADS, Tokens64::BYTES};
    case 4:
      return wide_gemm_footprint();
    default:
      return {0, 0};
  }
}

const char* grouped_layer_forward(const MoeArgs& args, const GroupedWorkspace& ws, int variant, const Device& device,
                                  cudaStream_t stream) {
  const Gemm gate_up{args.w13,
                     static_cast<const uint16_t*>(args.w13_bias),
                     static_cast<const uint16_t*>(args.x),
                     ws.act,
                     ws.offsets,
                     ws.order,
                     args.local_experts,
                     2 * args.I,
                     args.H,
                     args.swiglu_oai};
  const Gemm down{args.w2,
                  static_cast<const uint16_t*>(args.w2_bias),
                  ws.act,
                  ws.y,
                  ws.offsets,
                  ws.order,
                  args.local_experts,
                  args.H,
                  args.I,
                  args.swiglu_oai};
  switch (variant) {
    case 0:
      return both<Tokens8>(gate_up, down, device, stream);
    case 1:
      return both<Tokens16>(gate_up, down, device, stream);
    case 2:
      return both<Tokens32>(gate_up, down, device, stream);
    case 3:
      return both<Tokens64>(gate_up, down, device, stream);
    case 4:
      return wide_gemm_forward(gate_up, down, device, stream);
    default:
      return "grouped_layer: no such variant";
  }
}

}  // namespace mxfp4_sm120
