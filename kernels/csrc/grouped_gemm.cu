// Grouped GEMM over experts, for more tokens than the decode kernel takes: gate-up (with SwiGLU) and down are two launches
// of one template.
//
// A persistent grid, one block per multiprocessor. An item is (expert, group of weight rows, tile of that expert's
// tokens), with the token tiles of one row group next to each other so that its weights are read from memory once. One
// producer warp fills a ring of shared-memory stages (weights by bulk copy, gathered token rows by cp.async) and runs
// ahead into the next item; the consumer warps decode packed weights straight into A operands, in registers, and never
// write a decoded weight anywhere.
#include "dispatch.h"
#include "layer.cuh"

namespace mxfp4_sm120 {
namespace {

struct Gemm {
  const uint8_t* weights;   // [experts, rows/32, K/32, TILE_BYTES]
  const uint16_t* bias;     // bf16 [experts, rows] or nullptr
  const uint16_t* in;       // bf16 [*, K]: token rows (gate-up) or activations in sorted order (down)
  void* out;                // gate-up: bf16 [slots, rows/2] in sorted order; down: fp32 [slots, rows] by slot
  const int* offsets;
  const int* order;
  const float* slot_weight;
  int experts, rows, K, top_k;
  bool swiglu_oai;
};

// WR 32-row tiles and NT n8 token tiles per warp; WM x WN warps; KT k-tiles per stage; STAGES deep; BLOCKS per multiprocessor.
template <int WR_, int WM_, int WN_, int NT_, int KT_, int STAGES_, int BLOCKS_ = 1>
struct Shape {
  static constexpr int WR = WR_, WM = WM_, WN = WN_, NT = NT_, KT = KT_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int ROW_TILES = WR * WM, TOKENS = 8 * NT * WN, WARPS = WM * WN, THREADS = 32 * WARPS;
  static constexpr int WEIGHT_BYTES = ROW_TILES * KT * TILE_BYTES, TOKEN_BYTES = KT * TOKENS * 64;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
  static constexpr int BYTES = STAGES * (STAGE_BYTES + 16) + (MAX_EXPERTS + 1) * 8;
  // 16-byte chunks of token rows in a stage, per thread; a thread keeps to SOURCES of the rows.
  static constexpr int CHUNKS = (KT * TOKENS * 4 + THREADS - 1) / THREADS;
  static constexpr int SOURCES = TOKENS * 4 > THREADS ? TOKENS * 4 / THREADS : 1;
  static_assert(THREADS % (TOKENS * 4) == 0 || TOKENS * 4 % THREADS == 0);
  static_assert(BYTES * BLOCKS + (BLOCKS - 1) * 1024 <= MAX_SHARED_BYTES);
};

// Walks a block's items in order.
struct Item {
  int expert = 0, row_group = 0, begin = 0, tokens = 0;
  // `tiles` [experts + 1]: token tiles before each expert. False past the last item.
  __device__ bool find(int item, int row_groups, int tile_tokens, int experts, const int* tiles, const int* offsets) {
    if (item >= tiles[experts] * row_groups) return false;
    while (item >= tiles[expert + 1] * row_groups) ++expert;
    const int here = tiles[expert + 1] - tiles[expert], n = item - tiles[expert] * row_groups;
    row_group = n / here;
    begin = offsets[expert] + (n - row_group * here) * tile_tokens;
    tokens = min(tile_tokens, offsets[expert + 1] - begin);
    return true;
  }
};

// Fills the ring, a stage at a time, for the items a block will meet: every thread copies its share of the token rows,
// one lane of each warp starts the bulk copies of some weight row tiles. There is no producer warp because a ninth warp
// would take a third of one scheduler's registers, and the accumulators need them.
template <typename S, bool GATE_UP>
struct Loader {
  const Gemm& p;
  const int* tiles;
  const int* offsets;
  uint32_t smem, full;
  int row_tiles, k_tiles, row_groups, warp, lane;
  Item item;
  int index, k = 0, stage = 0, row_tile_count = 0;
  bool alive = true;
  const uint8_t* weights = nullptr;
  const uint16_t* source[S::SOURCES];  // nullptr past the last token

  __device__ __forceinline__ void begin_item() {
    alive = item.find(index, row_groups, S::TOKENS, p.experts, tiles, offsets);
    index += gridDim.x;
    if (!alive) return;
    const int first = item.row_group * S::ROW_TILES;
    row_tile_count = min(S::ROW_TILES, row_tiles - first);
    weights = p.weights + (static_cast<int64_t>(item.expert) * row_tiles + first + warp) * k_tiles * TILE_BYTES;
#pragma unroll
    for (int i = 0; i < S::SOURCES; ++i) {
      const int t = (threadIdx.x / 4 + i * (S::THREADS / 4)) % S::TOKENS;
      source[i] = nullptr;
      if (t < item.tokens) {
        const int at = item.begin + t, row = GATE_UP ? p.order[at] / p.top_k : at;
        source[i] = p.in + static_cast<int64_t>(row) * p.K + threadIdx.x % 4 * 8;
      }
    }
  }

  __device__ __forceinline__ void load_stage() {
    if (!alive) return;
    const int kts = S::KT == 1 ? 1 : min(S::KT, k_tiles - k);
    const uint32_t base = smem + stage * S::STAGE_BYTES, bar = full + stage * 8;
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; r += S::WARPS) {
      const bool mine = r + warp < row_tile_count;
      const uint32_t dst = base + (r + warp) * S::KT * TILE_BYTES;
      const uint8_t* const src = weights + (static_cast<int64_t>(r) * k_tiles + k) * TILE_BYTES;
#if __CUDA_ARCH__ >= 900
      if (lane == 0) {
        if (mine) {
          mbar_expect(bar, kts * TILE_BYTES);
          bulk_copy(dst, src, kts * TILE_BYTES, bar);
        } else {
          mbar_arrive(bar);
        }
      }
#else
      if (mine)
        for (int b = lane * 16; b < kts * TILE_BYTES; b += 512) cp_async16(dst + b, src + b);
#endif
    }
#pragma unroll
    for (int i = 0; i < S::CHUNKS; ++i) {
      const int chunk = threadIdx.x + i * S::THREADS, t = chunk / (S::TOKENS * 4), token = chunk / 4 % S::TOKENS;
      const uint16_t* const from = source[i % S::SOURCES];
      // Whole n8 tiles without a token are never read; the rest of the last one is zeros.
      if (t < kts && (token & ~7) < item.tokens)
        cp_async16(base + S::WEIGHT_BYTES + chunk * 16, from == nullptr ? p.in : from + (k + t) * TILE, from != nullptr);
    }
    cp_async_arrive(bar);
    if (++stage == S::STAGES) stage = 0;
    k += S::KT;
    if (k >= k_tiles) {
      k = 0;
      begin_item();
    }
  }
};

// A block's place in the ring.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  int previous = -1;  // the stage before, whose refill is due
  uint32_t previous_parity = 0;
};

template <typename S, int NTA, typename L>
__device__ __forceinline__ void main_loop(float (&acc)[2 * S::WR][S::NT][4], L& loader, uint32_t smem, uint32_t full,
                                          uint32_t empty, int k_tiles, int wm, int wn, int lane, bool valid, Cursor& at) {
  const int g = lane >> 2, q = lane & 3;
  for (int k = 0; k < k_tiles; k += S::KT) {
    mbar_wait(full + at.stage * 8, at.parity);
    const uint32_t weights = smem + at.stage * S::STAGE_BYTES + wm * S::WR * S::KT * TILE_BYTES;
    const uint32_t tokens = smem + at.stage * S::STAGE_BYTES + S::WEIGHT_BYTES + (wn * 8 + g) * 64 + q * 16;
    if (valid) {
#pragma unroll
      for (int t = 0; t < S::KT; ++t) {
        if (S::KT > 1 && k + t >= k_tiles) break;
        uint4 b[NTA];
#pragma unroll
        for (int n = 0; n < NTA; ++n) b[n] = lds128(tokens + t * S::TOKENS * 64 + n * S::WN * 512);
#pragma unroll
        for (int r = 0; r < S::WR; ++r) {
          const PackedTile tile = load_tile(weights + (r * S::KT + t) * TILE_BYTES, lane);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const AFragments a = decode_half_tile(tile, m);
#pragma unroll
            for (int n = 0; n < NTA; ++n) mma_bf16(acc[2 * r + m][n], a.lo[0], a.hi[0], a.lo[1], a.hi[1], b[n].x, b[n].y);
#pragma unroll
            for (int n = 0; n < NTA; ++n) mma_bf16(acc[2 * r + m][n], a.lo[2], a.hi[2], a.lo[3], a.hi[3], b[n].z, b[n].w);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(empty + at.stage * 8);
    // Refill the stage before this one, not this one: the other warps have had a whole stage's time to leave it.
    if (loader.alive && at.previous >= 0) mbar_wait(empty + at.previous * 8, at.previous_parity);
    loader.load_stage();
    at.previous = at.stage;
    at.previous_parity = at.parity;
    if (++at.stage == S::STAGES) {
      at.stage = 0;
      at.parity ^= 1;
    }
  }
}

template <typename S, bool GATE_UP>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) grouped_gemm(const Gemm p) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  const uint32_t smem = smem_addr(smem_bytes), full = smem + S::STAGES * S::STAGE_BYTES, empty = full + S::STAGES * 8;
  int* const tiles = reinterpret_cast<int*>(smem_bytes + S::STAGES * (S::STAGE_BYTES + 16));
  int* const offsets = tiles + MAX_EXPERTS + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
  const int row_tiles = p.rows / TILE, k_tiles = p.K / TILE, row_groups = (row_tiles + S::ROW_TILES - 1) / S::ROW_TILES;

  if (threadIdx.x == 0) {
    for (int s = 0; s < S::STAGES; ++s) {
#if __CUDA_ARCH__ >= 900
      mbar_init(full + s * 8, S::THREADS + (S::ROW_TILES + S::WARPS - 1) / S::WARPS * S::WARPS);
#else
      mbar_init(full + s * 8, S::THREADS);
#endif
      mbar_init(empty + s * 8, S::WARPS);
    }
    mbar_init_fence();
  }
  wait_for_previous_kernel();
  for (int e = threadIdx.x; e <= p.experts; e += S::THREADS) offsets[e] = p.offsets[e];
  __syncthreads();
  if (warp == 0) {  // token tiles before each expert
    int before = 0;
    for (int e0 = 0; e0 < p.experts; e0 += 32) {
      const int e = e0 + lane;
      int n = e < p.experts ? (offsets[e + 1] - offsets[e] + S::TOKENS - 1) / S::TOKENS : 0;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const int up = __shfl_up_sync(~0u, n, d);
        if (lane >= d) n += up;
      }
      if (e < p.experts) tiles[e + 1] = before + n;
      before += __shfl_sync(~0u, n, 31);
    }
    if (lane == 0) tiles[0] = 0;
  }
  __syncthreads();

  Loader<S, GATE_UP> loader{p, tiles, offsets, smem, full, row_tiles, k_tiles, row_groups, warp, lane, {}, static_cast<int>(blockIdx.x)};
  loader.begin_item();
  for (int s = 0; s < S::STAGES - 1; ++s) loader.load_stage();
  Item item;
  Cursor at;
  const int wm = warp % S::WM, wn = warp / S::WM;
  for (int i = blockIdx.x; item.find(i, row_groups, S::TOKENS, p.experts, tiles, offsets); i += gridDim.x) {
    const int first = item.row_group * S::ROW_TILES + wm * S::WR;
    const int active = ((item.tokens + 7) / 8 + S::WN - 1) / S::WN;  // n8 tiles per warp that hold tokens
    float acc[2 * S::WR][S::NT][4] = {};
    const bool valid = first < row_tiles;
#define RUN(NTA) main_loop<S, NTA>(acc, loader, smem, full, empty, k_tiles, wm, wn, lane, valid, at)
    if constexpr (S::NT >= 8) {
      if (active <= S::NT / 4) RUN(S::NT / 4);
      else if (active <= S::NT / 2) RUN(S::NT / 2);
      else if (active <= S::NT * 3 / 4) RUN(S::NT * 3 / 4);
      else RUN(S::NT);
    } else if constexpr (S::NT >= 2) {
      if (active <= S::NT / 2) RUN(S::NT / 2);
      else RUN(S::NT);
    } else {
      RUN(S::NT);
    }
#undef RUN
#pragma unroll
    for (int r = 0; r < S::WR; ++r) {
      const int row = (first + r) * TILE + 4 * g;
      if (first + r >= row_tiles) continue;
      float4 bias{0.f, 0.f, 0.f, 0.f};
      if (p.bias != nullptr) {
        const uint2 v = *reinterpret_cast<const uint2*>(p.bias + static_cast<int64_t>(item.expert) * p.rows + row);
        const float2 lo = unpack_bf16x2(v.x), hi = unpack_bf16x2(v.y);
        bias = {lo.x, lo.y, hi.x, hi.y};
      }
#pragma unroll
      for (int n = 0; n < S::NT; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int t = (n * S::WN + wn) * 8 + 2 * q + c;
          if (t >= item.tokens) continue;
          const int at = item.begin + t;
          float4 v{acc[2 * r][n][c], acc[2 * r][n][2 + c], acc[2 * r + 1][n][c], acc[2 * r + 1][n][2 + c]};
          v.x = v.x * ACCUMULATOR_SCALE + bias.x;
          v.y = v.y * ACCUMULATOR_SCALE + bias.y;
          v.z = v.z * ACCUMULATOR_SCALE + bias.z;
          v.w = v.w * ACCUMULATOR_SCALE + bias.w;
          if constexpr (GATE_UP) {
            const uint32_t both = pack_bf16x2(activate(v.x, v.y, p.swiglu_oai), activate(v.z, v.w, p.swiglu_oai));
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + static_cast<int64_t>(at) * (p.rows / 2) + row / 2) = both;
          } else {
            const int slot = p.order[at];
            const float w = p.slot_weight[slot];
            v = {v.x * w, v.y * w, v.z * w, v.w * w};
            __stcs(reinterpret_cast<float4*>(static_cast<float*>(p.out) + static_cast<int64_t>(slot) * p.rows + row), v);
          }
        }
      }
    }
  }
  let_next_kernel_start();
}

template <typename S, bool GATE_UP>
const char* launch(const Gemm& p, int multiprocessors, cudaStream_t stream) {
  auto* kernel = grouped_gemm<S, GATE_UP>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES) != cudaSuccess)
    return "grouped_gemm: the device refuses its shared memory";
  return launch_dependent(kernel, multiprocessors * S::BLOCKS, S::THREADS, S::BYTES, stream, true, p);
}

//                     WR WM WN NT KT stages blocks
using Tokens16 = Shape<1, 8, 1, 2, 3, 6>;
using Tokens32 = Shape<1, 8, 1, 4, 3, 5>;
using Tokens64 = Shape<1, 8, 1, 8, 2, 5>;
using Tokens128 = Shape<2, 4, 2, 8, 1, 7>;
using Tokens256 = Shape<2, 2, 4, 8, 1, 5>;
using Tokens64x2 = Shape<2, 4, 1, 8, 1, 5, 2>;

template <typename S>
const char* both(const Gemm& gate_up, const Gemm& down, int multiprocessors, cudaStream_t stream) {
  if (const char* why = launch<S, true>(gate_up, multiprocessors, stream)) return why;
  return launch<S, false>(down, multiprocessors, stream);
}

}  // namespace

const char* grouped_layer_forward(const MoeArgs& args, const GroupedWorkspace& ws, int variant, int multiprocessors,
                                  cudaStream_t stream) {
  const Gemm gate_up{args.w13, static_cast<const uint16_t*>(args.w13_bias), static_cast<const uint16_t*>(args.x), ws.act, ws.offsets,
                     ws.order, ws.weight, args.local_experts, 2 * args.I, args.H, args.top_k, args.swiglu_oai};
  const Gemm down{args.w2, static_cast<const uint16_t*>(args.w2_bias), ws.act, ws.y, ws.offsets,
                  ws.order, ws.weight, args.local_experts, args.H, args.I, args.top_k, args.swiglu_oai};
  switch (variant) {
    case 0: return both<Tokens16>(gate_up, down, multiprocessors, stream);
    case 1: return both<Tokens32>(gate_up, down, multiprocessors, stream);
    case 2: return both<Tokens64>(gate_up, down, multiprocessors, stream);
    case 3: return both<Tokens128>(gate_up, down, multiprocessors, stream);
    case 4: return both<Tokens256>(gate_up, down, multiprocessors, stream);
    case 5: return both<Tokens64x2>(gate_up, down, multiprocessors, stream);
    default: return "grouped_layer: no such variant";
  }
}

}  // namespace mxfp4_sm120
