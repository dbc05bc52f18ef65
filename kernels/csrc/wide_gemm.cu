// Grouped GEMM over experts that have many tokens each: what grouped_gemm.cu does, shaped for arithmetic.
//
// On an H100 a product (m16n8k16) takes 6 cycles of its scheduler, and every other instruction, whatever it does, adds
// about 0.5 to 0.7, as if they shared the register file's ports. So other instructions are what to save. A warp
// multiplies 32 rows by 128 tokens, which decodes a weight once for 16 products (64 x 64 would decode it for 8), eight
// warps share the tokens, and a k-tile costs a warp 64 products and 101 other instructions: 52 to decode, 18 to read
// shared memory, the rest copies, addresses, barrier and loop.
#include "grouped_gemm.cuh"

namespace mxfp4_sm120 {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;  // one above the other, 32 rows each
constexpr int TOKENS = 128, TOKEN_TILES = TOKENS / 8;
constexpr int STAGES = 6;  // of one k-tile
constexpr int WEIGHT_BYTES = WARPS * TILE_BYTES, STAGE_BYTES = WEIGHT_BYTES + TOKENS * 64;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int SOURCES = TOKENS * 4 / THREADS;  // token rows of which a thread copies 16 bytes a stage

// An expert's tokens make full tiles and a rest.
struct Tiles {
  int offsets[MAX_EXPERTS + 1];  // where each expert's tokens begin
  int full[MAX_EXPERTS + 1];     // full tiles before each expert
  int rests[MAX_EXPERTS];        // experts with a rest, the longest first
  int rest_count;

  __device__ int rest_of(int e) const { return (offsets[e + 1] - offsets[e]) % TOKENS; }

  __device__ void prepare(const int* from, int experts) {
    for (int e = threadIdx.x; e <= experts; e += THREADS)
      offsets[e] = from[e];
    if (threadIdx.x == 0) rest_count = 0;
    __syncthreads();
    if (threadIdx.x < 32) count_tiles(full, offsets, experts, [](int tokens) { return tokens / TOKENS; });
    for (int e = threadIdx.x; e < experts; e += THREADS) {
      const int mine = rest_of(e);
      if (mine == 0) continue;
      atomicAdd(&rest_count, 1);
      int rank = 0;
      for (int other = 0; other < experts; ++other) {
        const int theirs = rest_of(other);
        rank += theirs > mine || (theirs == mine && other < e);
      }
      rests[rank] = e;
    }
    __syncthreads();
  }
};
constexpr int BYTES = RING_BYTES + sizeof(Tiles);
static_assert(BYTES <= MAX_SHARED_BYTES);

// An expert's token tile by a group of WARPS row tiles.
struct Item {
  int expert, row_group, begin, tokens;
};

// The item of a block's turn; past the last item its expert is -1. In order: the full tiles' whole row groups, a row
// group's tiles together; their last row group, if it has fewer row tiles; the same of the rests. Blocks take turns,
// every other time in reverse, so that no block always gets the longer items. For whole warps.
__device__ __forceinline__ Item item_of_turn(int turn, const Gemm& p, const Tiles& tiles) {
  const int row_tiles = p.rows / TILE, whole = row_tiles / WARPS, part = row_tiles % WARPS != 0;
  const int full = tiles.full[p.experts];
  int n = turn * gridDim.x + (turn % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const bool in_full = n < full * (whole + part);
  if (!in_full) n -= full * (whole + part);
  const int list = in_full ? full : tiles.rest_count;
  const bool in_whole = n < list * whole;
  if (!in_whole) n -= list * whole;
  const int groups = in_whole ? whole : part;
  Item item{-1, whole, 0, 0};
  if (in_full) {
    int expert = 0;  // as many as end before
    for (int e0 = 0; e0 < p.experts; e0 += 32) {
      const int e = e0 + threadIdx.x % 32;
      expert += __popc(__ballot_sync(~0u, e < p.experts && tiles.full[e + 1] * groups <= n));
    }
    const int before = tiles.full[expert], here = tiles.full[expert + 1] - before;
    n -= before * groups;
    if (in_whole) item.row_group = n / here;
    item.expert = expert;
    item.begin = tiles.offsets[expert] + n % here * TOKENS;
    item.tokens = TOKENS;
  } else if (n < list * groups) {
    if (in_whole) item.row_group = n % whole;
    item.expert = tiles.rests[n / groups];
    item.tokens = tiles.rest_of(item.expert);
    item.begin = tiles.offsets[item.expert + 1] - item.tokens;
  }
  return item;
}

// A warp's part of an item. The last row group may have few row tiles (GPT-OSS's 90 and 180 are 11 x 8 + 2 and 22 x 8 +
// 4); then several warps share one, each with a part of the tokens.
struct Part {
  int row_tile, token_tile, token_tiles;  // the row tile, and the first and the number of n8 tiles
  __device__ Part(const Item& item, int row_tiles, int warp) {
    const int first = item.row_group * WARPS, left = row_tiles - first;
    const int parts = left > WARPS / 2 ? 1 : left > WARPS / 4 ? 2 : 4;
    row_tile = first + warp % (WARPS / parts);
    token_tiles = ((item.tokens + 7) / 8 + parts - 1) / parts;
    token_tile = warp / (WARPS / parts) * token_tiles;
  }
};

// Fills the ring, a stage at a time, for the items a block will meet.
template <bool GATE_UP>
struct Loader {
  const Gemm& p;
  const Tiles& tiles;
  int row_tiles, k_tiles, turn = 0;
  int left = 0;                      // k-tiles of the item that are still to be copied
  int weight_chunks = 0;             // of a row tile: all or, past the last item, none
  int sources = 0;                   // of this thread's rows, those whose n8 tile holds tokens
  const uint8_t* weights = nullptr;  // this lane's first chunk of its warp's row tile, at the next k-tile
  const uint8_t* tokens = nullptr;   // this thread's chunk of row 0, at the next k-tile
  uint32_t row[SOURCES];             // this thread's rows, in 16-byte units from row 0

  __device__ __forceinline__ Loader(const Gemm& p, const Tiles& tiles)
      : p(p), tiles(tiles), row_tiles(p.rows / TILE), k_tiles(p.K / TILE) {
    begin_item();
  }

  // Where a row tile or a token doesn't exist, the last one is copied in its place and what comes of it not stored.
  __device__ __forceinline__ void begin_item() {
    const Item item = item_of_turn(turn++, p, tiles);
    left = k_tiles;
    sources = 0;
    weight_chunks = 0;
    if (item.expert < 0) return;
    weight_chunks = TILE_CHUNKS;
    const int row_tile = min(Part(item, row_tiles, threadIdx.x / 32).row_tile, row_tiles - 1);
    weights = p.weights + (static_cast<int64_t>(item.expert) * row_tiles + row_tile) * k_tiles * TILE_BYTES +
              threadIdx.x % 32 * 16;
    tokens = reinterpret_cast<const uint8_t*>(p.in) + threadIdx.x % 4 * 16;
#pragma unroll
    for (int i = 0; i < SOURCES; ++i) {
      const int t = (threadIdx.x + i * THREADS) / 4, at = item.begin + min(t, item.tokens - 1);
      row[i] = static_cast<uint32_t>(GATE_UP ? p.order[at] : at) * (p.K / 8);
      sources += (t & ~7) < item.tokens;
    }
  }

  // Starts the copies of the k-tile `ahead` of the next into a stage: a warp its row tile, [token][4 chunks] all
  // together. No branches, so that products are scheduled in between.
  __device__ __forceinline__ void load_stage(uint32_t weight_dst, uint32_t token_dst, int ahead) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < (TILE_CHUNKS + 31) / 32; ++i)
      if (lane + i * 32 < weight_chunks) cp_async16(weight_dst + i * 512, weights + ahead * TILE_BYTES + i * 512);
#pragma unroll
    for (int i = 0; i < SOURCES; ++i)
      if (i < sources)
        cp_async16(token_dst + i * THREADS * 16, tokens + static_cast<uint64_t>(row[i]) * 16 + ahead * 64);
    cp_async_commit();
  }

  __device__ __forceinline__ void advance(int k_tiles) {
    weights += k_tiles * TILE_BYTES;
    tokens += k_tiles * 64;
  }
};

// acc += weights x tokens over one item, whose first two stages have landed; the next item's have when it returns.
// Software-pipelined: while the tensor cores work on one k-tile, the next one is decoded, its tokens are fetched and
// the codes of the one after, so that a warp always has products to issue. NTA: n8 tiles that hold tokens, at most.
template <int NTA, typename L>
__device__ __forceinline__ void main_loop(float (&acc)[2][TOKEN_TILES][4], L& loader, uint32_t smem, int token_tile,
                                          uint32_t& stage) {
  // n8 tiles whose tokens are in registers: all, or half, where the accumulators leave no room for more; the other half
  // then follows while the first is multiplied.
  constexpr int HELD = NTA < TOKEN_TILES ? NTA : NTA / 2;
  constexpr int GROUP = HELD < 8 ? HELD : 8;  // n8 tiles that take turns, to cover a product's latency
  constexpr int MIDDLE = NTA / 2 / GROUP * GROUP;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t my_tile = smem + warp * TILE_BYTES + lane * 16;
  const uint32_t my_scales = smem + warp * TILE_BYTES + TILE_CODES + (lane >> 2) * 4;
  const uint32_t my_tokens = smem + WEIGHT_BYTES + token_tile * 512 + lane * 16;
  const uint32_t copied_tokens = smem + WEIGHT_BYTES + threadIdx.x * 16;
  auto after = [](uint32_t stage) { return stage + STAGE_BYTES == RING_BYTES ? 0 : stage + STAGE_BYTES; };
  auto tile_of = [&](uint32_t stage) { return PackedTile{lds128(my_tile + stage), lds32(my_scales + stage)}; };
  auto tokens_of = [&](uint32_t stage, int n) { return lds128(my_tokens + stage + n * 512); };

  uint32_t next = after(stage);
  uint4 b[HELD];
  AFragments a0[2], a1[2];  // a tile's two halves, of this k-tile and the next in turn
  PackedTile tile = tile_of(stage);
#pragma unroll
  for (int n = 0; n < HELD; ++n)
    b[n] = tokens_of(stage, n);
  a0[0] = decode_half_tile(tile, 0);
  a0[1] = decode_half_tile(tile, 1);
  tile = tile_of(next);

  auto step = [&](const AFragments(&now)[2], AFragments(&then)[2], int ahead) {
    const uint32_t second = after(next);
#pragma unroll
    for (int g = 0; g < NTA; g += GROUP) {
      if (g == NTA - HELD) {
        // This thread's copies of the next two stages have landed and, after the barrier, everyone's; and every warp
        // holds what it still needs of this stage in registers: refill it.
        cp_async_wait<STAGES - 3>();
        __syncthreads();
        loader.load_stage(my_tile + stage, copied_tokens + stage, ahead);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const AFragments& a = now[s % 2];
        const int k16 = s / 2;
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
          const int n = g + i;
          if (n < NTA)
            mma_bf16(acc[s % 2][n], a.lo[2 * k16], a.hi[2 * k16], a.lo[2 * k16 + 1], a.hi[2 * k16 + 1],
                     k16 == 0 ? b[n % HELD].x : b[n % HELD].z, k16 == 0 ? b[n % HELD].y : b[n % HELD].w);
        }
      }
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        const int n = g + i;
        if (n < NTA) b[n % HELD] = n + HELD < NTA ? tokens_of(stage, n + HELD) : tokens_of(next, (n + HELD) % NTA);
      }
      if (g == 0) then[0] = decode_half_tile(tile, 0);
      if (g == MIDDLE) {
        then[1] = decode_half_tile(tile, 1);
        tile = tile_of(second);
      }
    }
    stage = next;
    next = second;
  };
  for (int k = loader.k_tiles; k > 0;) {  // as many steps as the loader has left in its item, then its next item
    int run = min(k, loader.left);
    k -= run;
    loader.left -= run;
    for (;;) {
      step(a0, a1, 0);
      if (run == 1) {
        a0[0] = a1[0];
        a0[1] = a1[1];
        loader.advance(1);
        break;
      }
      step(a1, a0, 1);
      loader.advance(2);
      if ((run -= 2) == 0) break;
    }
    if (loader.left == 0) loader.begin_item();
  }
}

// The main loop for the fewest n8 tiles that hold all `token_tiles`.
template <int NTA = 2, typename... Args>
__device__ __forceinline__ void run(int token_tiles, Args&... args) {
  if constexpr (NTA < TOKEN_TILES)
    if (token_tiles > NTA) return run<NTA + 2>(token_tiles, args...);
  main_loop<NTA>(args...);
}

template <bool GATE_UP>
__global__ void __launch_bounds__(THREADS, 1) wide_grouped_gemm(const Gemm p) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  const uint32_t smem = smem_addr(smem_bytes);
  Tiles& tiles = *reinterpret_cast<Tiles*>(smem_bytes + RING_BYTES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;

  wait_for_previous_kernel();
  tiles.prepare(p.offsets, p.experts);
  Loader<GATE_UP> loader(p, tiles);
  for (int s = 0; s < STAGES; ++s) {
    loader.load_stage(smem + s * STAGE_BYTES + warp * TILE_BYTES + lane * 16,
                      smem + s * STAGE_BYTES + WEIGHT_BYTES + threadIdx.x * 16, 0);
    loader.advance(1);
    if (--loader.left == 0) loader.begin_item();
  }
  cp_async_wait<STAGES - 2>();
  __syncthreads();
  uint32_t stage = 0;
  for (int turn = 0;; ++turn) {
    const Item item = item_of_turn(turn, p, tiles);
    if (item.expert < 0) break;
    const Part part(item, p.rows / TILE, warp);
    float acc[2][TOKEN_TILES][4] = {};
    int token_tile = part.token_tile;
    run(part.token_tiles, acc, loader, smem, token_tile, stage);
    const int row = part.row_tile * TILE + 4 * g;
    if (row >= p.rows) continue;
    const float4 bias = bias_of(p, item.expert, row);
    const int first = token_tile * 8 + 2 * q;
    const int end = min(item.tokens, (token_tile + part.token_tiles) * 8) - first;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (8 * n + c < end) store_rows<GATE_UP>(p, item.begin + first + 8 * n + c, row, acc[0][n], acc[1][n], c, bias);
    }
  }
  let_next_kernel_start();
}

}  // namespace

Footprint wide_gemm_footprint() { return {THREADS, BYTES}; }

const char* wide_gemm_forward(const Gemm& gate_up, const Gemm& down, const Device& device, cudaStream_t stream) {
  const LaunchOptions options{device.dependent_launch};
  const int grid = device.multiprocessors;
  if (const char* why = launch_kernel(wide_grouped_gemm<true>, grid, THREADS, BYTES, stream, options, gate_up))
    return why;
  return launch_kernel(wide_grouped_gemm<false>, grid, THREADS, BYTES, stream, options, down);
}

}  // namespace mxfp4_sm120
