// A whole MoE layer in one launch, for up to 16 tokens: the time is the time to stream the chosen experts' weights
// once.
//
// A persistent grid, one block per multiprocessor. An item is 32 weight rows of one active expert; a block works on
// some of gate-up, then on some of down. Its warps have four trades. The copier chooses items and copies their weights
// into a ring of stages, each a stretch of an item's K. The main warps share every stage, so each has the same slice of
// K of all items, and multiply. The reducer adds the slices up, applies bias and activation, and writes. Fetchers bring
// activations as soon as they are there. Main warps so hardly wait for anything but weights, and the ring runs ahead
// over the seam between the two GEMMs: down-projection weights are in flight while the last activations are still being
// made.
//
// All tokens are columns of every active expert's product (8 or 16 of them): a column whose token did not choose the
// expert costs nothing that matters here (the tensor cores idle) and is ignored afterwards. A warp's slice of the input
// stays in its registers for as long as it is the input: the whole of gate-up, and one expert's items of down.
//
// Blocks hand each other activations, and results in fp32, through the workspace. Each value says by itself whether it
// is there (DecodeExchange), so nobody needs a fence, a counter or a barrier of the grid to know. Every output is
// summed in slot order: same bits every run.
#include <algorithm>
#include <climits>

#include "dispatch.h"
#include "layer.cuh"
#include "routing.cuh"

namespace mxfp4_sm120 {
namespace {

// Floats between two tokens of a reduction buffer: 32 rows and 4 more, so that a quarter warp's 16-byte stores hit all
// banks.
constexpr int RED_PITCH = TILE + 4;
// Items chosen before all warps are done with the first of them: the weights' ring holds two, and parts of one more.
constexpr int ITEMS_AHEAD = 4;

template <int TOKENS>
struct RoutingTable {
  static constexpr int SLOTS = TOKENS * MAX_TOP_K;
  uint32_t active_mask[MAX_EXPERTS / 32];
  int count;                      // active experts
  int expert[SLOTS];              // their local ids, ascending
  int8_t slot[SLOTS][TOKENS];     // [active expert][token] -> the token's slot j, or -1
  int choice[TOKENS][MAX_TOP_K];  // local expert or -1
  float weight[TOKENS][MAX_TOP_K];

  // The tokens that chose an active expert, a bit each.
  __device__ __forceinline__ uint32_t tokens_of(int active) const {
    uint32_t chosen = 0;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      chosen |= (slot[active][t] >= 0) << t;
    return chosen;
  }
};

// A ring's stages pass from those who fill them to those who empty them and back: two mbarriers each.
struct Ring {
  uint32_t bars;
  int size, stage = 0, parity = 0;
  __device__ __forceinline__ void init(int fillers, int users) const {
    for (int s = 0; s < size; ++s) {
      if (fillers > 0) mbar_init(bars + s * 16, fillers);
      mbar_init(bars + s * 16 + 8, users);
    }
  }
  __device__ __forceinline__ uint32_t full() const { return bars + stage * 16; }
  __device__ __forceinline__ uint32_t empty() const { return bars + stage * 16 + 8; }
  __device__ __forceinline__ void wait_full() const { mbar_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { mbar_wait(empty(), parity ^ 1); }  // at once in the first round
  __device__ __forceinline__ void advance() {
    if (++stage == size) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// MAIN warps multiply. A stage of the weights' ring holds EACH tiles for each of them; an item has STAGES at most, the
// ring RING. NT column tiles of 8 tokens. ROWS of activations are fetched ahead, if any, by a warp each.
template <int MAIN_, int EACH_, int STAGES_, int RING_, int NT_, int ROWS_>
struct Shape {
  static constexpr int MAIN = MAIN_, EACH = EACH_, STAGES = STAGES_, RING = RING_, NT = NT_;
  static constexpr int ROWS = ROWS_, TOKENS = 8 * NT;
  static constexpr int REDUCER = MAIN, COPIER = MAIN + 1, FETCHER = MAIN + 2;
  static constexpr int THREADS = 32 * (FETCHER + ROWS);
  static constexpr int SUM_THREADS = 32 * (REDUCER + 1);  // those who make an item's sums and who adds them up
  static constexpr int STAGE_TILES = MAIN * EACH, STAGE_BYTES = STAGE_TILES * TILE_BYTES;
  static constexpr int MAX_K = STAGES * STAGE_TILES * TILE;
  // Shared memory: weights, activations, two buffers of sums (so that adding up and multiplying overlap), barriers, the
  // routing.
  static constexpr int ROW_BYTES = MAX_K * 2, SUM_FLOATS = MAIN * TOKENS * RED_PITCH, SUM_BUFFERS = 2;
  static constexpr int ACTS = RING * STAGE_BYTES, SUMS = ACTS + ROWS * ROW_BYTES;
  static constexpr int BARS = SUMS + SUM_BUFFERS * SUM_FLOATS * 4;
  static constexpr int ITEMS = BARS + (RING + ROWS + SUM_BUFFERS + ITEMS_AHEAD) * 16, ROUTING = ITEMS + ITEMS_AHEAD * 4;
  static constexpr int BYTES = ROUTING + static_cast<int>(sizeof(RoutingTable<TOKENS>));
  static_assert(BYTES <= MAX_SHARED_BYTES);
};

template <int TOKENS>
__device__ __forceinline__ void clear_routing(RoutingTable<TOKENS>& rt) {
  if (threadIdx.x < MAX_EXPERTS / 32) rt.active_mask[threadIdx.x] = 0;
  for (int i = threadIdx.x; i < rt.SLOTS * TOKENS / 4; i += blockDim.x)
    reinterpret_cast<uint32_t*>(rt.slot)[i] = ~0u;
}

// Most of a GEMM's items are dealt, to each block `count` in two runs. The others are for whoever comes first.
struct Deal {
  int count, first_run;
  __device__ __forceinline__ explicit Deal(int items) {
    const int each = items / gridDim.x;
    count = max(0, each - 1);
    first_run = count / 2;
  }
  __device__ __forceinline__ int item(int turn) const {
    const int block = blockIdx.x, blocks = gridDim.x;
    return turn < first_run ? block * first_run + turn
                            : blocks * first_run + block * (count - first_run) + turn - first_run;
  }
};

// Of one token, whose j-th expert lane j has: the weights of this block's first item, into L2, while the others hear of
// the routing.
__device__ __forceinline__ void prefetch_first_item(const MoeArgs& args, int expert, int lane) {
  int active = 0, place = 0;
#pragma unroll
  for (int j = 0; j < MAX_TOP_K; ++j) {
    const int other = __shfl_sync(~0u, expert, j);
    active += other >= 0;
    place += other >= 0 && other < expert;
  }
  const int row_tiles = 2 * args.I / TILE, item_bytes = args.H / TILE * TILE_BYTES;
  const Deal deal(active * row_tiles);
  const int n = deal.item(0);
  const uint32_t has = __ballot_sync(~0u, expert >= 0 && place == n / row_tiles);
  if (deal.count == 0 || has == 0) return;
  expert = __shfl_sync(~0u, expert, __ffs(has) - 1);
  const uint8_t* src = args.w13 + (static_cast<int64_t>(expert) * row_tiles + n % row_tiles) * item_bytes;
  for (int at = lane * 128; at < item_bytes; at += 32 * 128)
    prefetch_to_l2(src + at);
}

template <int TOKENS>
__device__ __forceinline__ void build_routing(const MoeArgs& args, RoutingTable<TOKENS>& rt, int warp, int lane) {
  const int warps = blockDim.x / 32, words = (args.local_experts + 31) / 32;
  for (int token = warps - 1 - warp; token < args.M; token += warps) {  // main warps last: they have inputs to load
    const Choice c = route_token(args, token, lane, /*merge=*/true);
    if (lane < MAX_TOP_K) {
      rt.choice[token][lane] = c.expert;
      rt.weight[token][lane] = c.weight;
    }
    if (args.M == 1) prefetch_first_item(args, c.expert, lane);
    if (c.expert >= 0) atomicOr(&rt.active_mask[c.expert >> 5], 1u << (c.expert & 31));
  }
  __syncthreads();
  // An expert's place among the active ones: how many bits stand below its own.
  auto rank = [&](int e) {
    int n = __popc(rt.active_mask[e >> 5] & ((1u << (e & 31)) - 1));
    for (int i = 0; i < e >> 5; ++i)
      n += __popc(rt.active_mask[i]);
    return n;
  };
  for (int s = threadIdx.x; s < args.M * MAX_TOP_K; s += blockDim.x) {
    const int token = s / MAX_TOP_K, e = rt.choice[token][s % MAX_TOP_K];
    if (e < 0) continue;
    const int a = rank(e);
    rt.expert[a] = e;  // the same value from every token that chose it
    rt.slot[a][token] = static_cast<int8_t>(s % MAX_TOP_K);
  }
  if (threadIdx.x == blockDim.x - 1) {
    int n = 0;
    for (int i = 0; i < words; ++i)
      n += __popc(rt.active_mask[i]);
    rt.count = n;
  }
  __syncthreads();
}

// What a block works on next: 32 rows of one active expert.
struct Item {
  int word;
  __device__ __forceinline__ static Item of(bool down, int active, int row_tile) {
    return {row_tile | active << 16 | down << 28};
  }
  __device__ __forceinline__ static Item none() { return {-1}; }
  __device__ __forceinline__ bool exists() const { return word >= 0; }
  __device__ __forceinline__ int row_tile() const { return word & 0xffff; }
  __device__ __forceinline__ int active() const { return word >> 16 & 0xfff; }  // place among the active experts
  __device__ __forceinline__ bool down() const { return word >> 28 & 1; }
};

// The items that the copier has chosen, for the other warps.
struct Items {
  Ring ring;
  volatile int* words;
  __device__ __forceinline__ void put(Item item, int lane) {
    ring.wait_empty();
    if (lane == 0) {
      words[ring.stage] = item.word;
      mbar_arrive(ring.full());
    }
    ring.advance();
  }
  __device__ __forceinline__ Item get(int lane) {
    ring.wait_full();
    const Item item{words[ring.stage]};
    __syncwarp();
    if (lane == 0) mbar_arrive(ring.empty());
    ring.advance();
    return item;
  }
};

// On newer cards one lane copies for the warp, in bulk.
#if __CUDA_ARCH__ >= 900
constexpr int COPYING_LANES = 1;
#else
constexpr int COPYING_LANES = 32;
#endif

__device__ __forceinline__ void copy_to_stage(const Ring& ring, uint32_t dst, const void* src, int bytes, int lane) {
  if (lane >= COPYING_LANES) return;
#if __CUDA_ARCH__ >= 900
  mbar_expect(ring.full(), bytes);
  bulk_copy(dst, src, bytes, ring.full());
#else
  for (int i = lane * 16; i < bytes; i += 512)
    cp_async16(dst + i, static_cast<const uint8_t*>(src) + i);
  mbar_arrive_after_copies(ring.full());
#endif
}

// Named barriers by which main warps hand sums to the reducer, one for each buffer (0 is __syncthreads).
constexpr int SUMS_FULL = 1;

// What a block's warps work with; each warp has its own copy, and so its own places in the rings.
template <typename S>
struct Block {
  const MoeArgs& args;
  const DecodeWorkspace& ws;
  DecodeExchange* exchange = nullptr;  // this call's
  uint8_t* smem;
  RoutingTable<S::TOKENS>& rt;
  Ring weights;
  Ring acts;  // a token's activations a stage
  Ring sums;  // full ones are handed over by named barriers instead, SUMS_FULL
  Items items;

  __device__ __forceinline__ Block(const MoeArgs& args, const DecodeWorkspace& ws, uint8_t* smem)
      : args(args),
        ws(ws),
        smem(smem),
        rt(*reinterpret_cast<RoutingTable<S::TOKENS>*>(smem + S::ROUTING)),
        weights{smem_addr(smem + S::BARS), S::RING},
        acts{weights.bars + S::RING * 16, S::ROWS},
        sums{acts.bars + S::ROWS * 16, S::SUM_BUFFERS},
        items{{sums.bars + S::SUM_BUFFERS * 16, ITEMS_AHEAD}, reinterpret_cast<int*>(smem + S::ITEMS)} {}
  __device__ __forceinline__ void init() const {
    weights.init(COPYING_LANES, S::MAIN);
    acts.init(32, S::MAIN);
    sums.init(0, 1);
    items.ring.init(1, S::MAIN + 1 + S::ROWS);
    mbar_init_fence();
  }
  __device__ __forceinline__ uint16_t* act(int token, int slot) const {
    return exchange->act + static_cast<int64_t>(token * args.top_k + slot) * args.I;
  }
  __device__ __forceinline__ uint32_t* y(int token, int slot) const {
    return ws.y + static_cast<int64_t>(token * args.top_k + slot) * args.H;
  }
  __device__ __forceinline__ float* sum_buffer() const {
    return reinterpret_cast<float*>(smem + S::SUMS) + sums.stage * S::SUM_FLOATS;
  }
};

// Eight activations as blocks exchange them, and whether all of them are there.
__device__ __forceinline__ uint4 complement(uint4 v) { return {~v.x, ~v.y, ~v.z, ~v.w}; }
__device__ __forceinline__ bool all_there(uint4 v) { return min(min(v.x, v.y), min(v.z, v.w)) != 0; }

// The B operands of a main warp: its slice of an item's input, 8 values of token g (and g + 8) at each of its tiles.
template <typename S>
struct Slice {
  uint4 b[S::STAGES * S::EACH][S::NT];
  int warp, g, q;

  __device__ __forceinline__ Slice(int warp, int lane) : warp(warp), g(lane >> 2), q(lane & 3) {}
  // Of a stage with so many tiles, this warp's.
  __device__ __forceinline__ int first_of(int tiles) const { return tiles * warp / S::MAIN; }
  __device__ __forceinline__ int count_of(int tiles) const {
    return tiles * (warp + 1) / S::MAIN - tiles * warp / S::MAIN;
  }
  // A token's row is a pointer or an address in shared memory, 0 for none: then all its bits are those of `none`.
  template <typename RowOfToken, typename Read>
  __device__ __forceinline__ void load(int k_tiles, RowOfToken row_of_token, Read read, uint32_t none = 0) {
#pragma unroll
    for (int n = 0; n < S::NT; ++n) {
      const auto row = row_of_token(8 * n + g);
#pragma unroll
      for (int c = 0; c < S::STAGES; ++c) {
        const int tiles = max(0, min(S::STAGE_TILES, k_tiles - c * S::STAGE_TILES)), count = count_of(tiles);
        const int first = c * S::STAGE_TILES + first_of(tiles);
#pragma unroll
        for (int t = 0; t < S::EACH; ++t) {
          b[c * S::EACH + t][n] = uint4{none, none, none, none};
          if (row != 0 && t < count) b[c * S::EACH + t][n] = read(row + (first + t) * TILE * 2 + q * 16);
        }
      }
    }
  }
  // Exchanged activations, as soon as all are there. Loaded together and then looked at: to look at one before the next
  // is loaded is to wait for it.
  template <typename RowOfToken>
  __device__ __forceinline__ void load_exchanged(int k_tiles, RowOfToken row_of_token) {
    bool missing;
    do {
      load(
          k_tiles, row_of_token, [](const uint8_t* at) { return load_relaxed(reinterpret_cast<const uint4*>(at)); },
          ~0u);
      missing = false;
#pragma unroll
      for (int i = 0; i < S::STAGES * S::EACH; ++i)
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
          missing |= !all_there(b[i][n]);
    } while (missing);
#pragma unroll
    for (int i = 0; i < S::STAGES * S::EACH; ++i)
#pragma unroll
      for (int n = 0; n < S::NT; ++n)
        b[i][n] = complement(b[i][n]);
  }
};

__device__ __forceinline__ uint4 read_global(const uint8_t* at) { return __ldcg(reinterpret_cast<const uint4*>(at)); }

// The copier's work: choose the block's items, and copy their weights, a stage after another. The last items of a GEMM
// are for whoever comes first, since multiprocessors don't get weights equally fast. So the first experts' activations
// are finished when down begins with these.
template <typename S>
__device__ __forceinline__ void copy_weights(Block<S> block, int lane) {
  const MoeArgs& args = block.args;
  Ring& ring = block.weights;
#pragma unroll 1
  for (int down = 0; down < 2; ++down) {
    const int row_tiles = (down ? args.H : 2 * args.I) / TILE,
              item_bytes = (down ? args.I : args.H) / TILE * TILE_BYTES;
    const int count = block.rt.count * row_tiles;
    const Deal deal(count);
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      int n = deal.item(turn);
      if (turn >= deal.count) {
        if (lane == 0) n = gridDim.x * deal.count + atomicAdd(block.exchange->taken + down, 1);
        n = __shfl_sync(~0u, n, 0);
        if (n >= count) break;
      }
      const int active = n / row_tiles, row_tile = n - active * row_tiles;
      block.items.put(Item::of(down, active, row_tile), lane);
      const uint8_t* src = (down ? args.w2 : args.w13) +
                           (static_cast<int64_t>(block.rt.expert[active]) * row_tiles + row_tile) * item_bytes;
#pragma unroll 1
      for (int left = item_bytes; left > 0; left -= S::STAGE_BYTES) {
        const int bytes = min(left, S::STAGE_BYTES);
        ring.wait_empty();
        copy_to_stage(ring, smem_addr(block.smem) + ring.stage * S::STAGE_BYTES, src, bytes, lane);
        src += bytes;
        ring.advance();
      }
    }
  }
  block.items.put(Item::none(), lane);
}

// A row of exchanged activations into shared memory, each 16 bytes as soon as they are there.
template <int MAX_BYTES>
__device__ __forceinline__ void fetch_row(uint8_t* dst, const uint16_t* row, int bytes, int lane) {
  constexpr int PIECES = (MAX_BYTES + 511) / 512;
  const uint4* const src = reinterpret_cast<const uint4*>(row) + lane;
  const int pieces = max(0, (bytes / 16 - lane + 31) / 32);
  uint4 v[PIECES];
  uint32_t left = (1u << pieces) - 1;
#pragma unroll 1
  do {
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
      if (left >> p & 1) v[p] = load_relaxed(src + 32 * p);
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
      if ((left >> p & 1) && all_there(v[p])) {
        left &= ~(1u << p);
        reinterpret_cast<uint4*>(dst)[32 * p + lane] = complement(v[p]);
      }
  } while (left != 0);
}

// A fetcher's work: activations of the experts to come, every so many-th row. An expert that many tokens chose is left
// to the main warps.
template <typename S>
__device__ __forceinline__ void fetch_activations(Block<S> block, int fetcher, int lane) {
  const MoeArgs& args = block.args;
  const auto& rt = block.rt;
  Ring& acts = block.acts;
  int input_of = -1;
#pragma unroll 1
  for (Item item = block.items.get(lane); item.exists(); item = block.items.get(lane)) {
    if (!item.down() || item.active() == input_of) continue;
    input_of = item.active();
    const uint32_t chosen = rt.tokens_of(input_of);
    if (__popc(chosen) > S::ROWS) continue;
#pragma unroll 1
    for (uint32_t left = chosen; left != 0; left &= left - 1) {
      const int token = __ffs(left) - 1;
      if (acts.stage == fetcher) {
        acts.wait_empty();
        fetch_row<S::ROW_BYTES>(block.smem + S::ACTS + fetcher * S::ROW_BYTES,
                                block.act(token, rt.slot[input_of][token]), args.I * 2, lane);
        mbar_arrive(acts.full());
      }
      acts.advance();
    }
  }
}

// A main warp's work: its slice of K of every item, and the sums of that for the reducer.
template <typename S>
__device__ __forceinline__ void multiply_items(Block<S> block, Slice<S>& input, int lane) {
  constexpr int EACH = S::EACH, NT = S::NT;
  const MoeArgs& args = block.args;
  const auto& rt = block.rt;
  Ring &weights = block.weights, &acts = block.acts, &sums = block.sums;
  int input_of = -1;
#pragma unroll 1
  for (Item item = block.items.get(lane); item.exists(); item = block.items.get(lane)) {
    const int k_tiles = (item.down() ? args.I : args.H) / TILE;
    if (item.down() && item.active() != input_of) {  // this warp's slice of its activations
      input_of = item.active();
      const uint32_t chosen = rt.tokens_of(input_of);
      if (S::ROWS > 0 && __popc(chosen) <= S::ROWS) {
        uint32_t mine = 0;
        Ring fetched = acts;
        for (uint32_t left = chosen; left != 0; left &= left - 1) {
          acts.wait_full();
          if (__ffs(left) - 1 == input.g) mine = smem_addr(block.smem) + S::ACTS + acts.stage * S::ROW_BYTES;
          acts.advance();
        }
        input.load(k_tiles, [&](int) { return mine; }, lds128);
        __syncwarp();
        for (int n = __popc(chosen); n > 0; --n) {
          if (lane == 0) mbar_arrive(fetched.empty());
          fetched.advance();
        }
      } else {
        input.load_exchanged(k_tiles, [&](int token) {
          const int slot = token < args.M ? rt.slot[input_of][token] : -1;
          return slot < 0 ? nullptr : reinterpret_cast<const uint8_t*>(block.act(token, slot));
        });
        __syncwarp();
      }
    }
    float acc[2][2][NT][4] = {};  // [k16 step][m16 tile]: short chains instead of long ones
#pragma unroll
    for (int c = 0; c < S::STAGES; ++c) {
      const int tiles = k_tiles - c * S::STAGE_TILES;
      if (tiles <= 0) break;
      auto multiply = [&](uint32_t tile_at, int t) {
        const PackedTile tile = load_tile(tile_at, lane);
        const int i = c * EACH + t;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const AFragments f = decode_half_tile(tile, m);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma_bf16(acc[0][m][n], f.lo[0], f.hi[0], f.lo[1], f.hi[1], input.b[i][n].x, input.b[i][n].y);
            mma_bf16(acc[1][m][n], f.lo[2], f.hi[2], f.lo[3], f.hi[3], input.b[i][n].z, input.b[i][n].w);
          }
        }
      };
      const uint32_t stage = smem_addr(block.smem) + weights.stage * S::STAGE_BYTES;
      weights.wait_full();
      if (tiles >= S::STAGE_TILES) {  // no branch between its tiles: they overlap
#pragma unroll
        for (int t = 0; t < EACH; ++t)
          multiply(stage + (input.warp * EACH + t) * TILE_BYTES, t);
      } else {
        const int first = input.first_of(tiles), count = input.count_of(tiles);
#pragma unroll
        for (int t = 0; t < EACH; ++t)
          if (t < count) multiply(stage + (first + t) * TILE_BYTES, t);
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(weights.empty());
      weights.advance();
    }
    sums.wait_empty();
    float* const mine = block.sum_buffer() + input.warp * S::TOKENS * RED_PITCH + 4 * input.g;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * n + 2 * input.q + c;
        auto sum = [&](int m, int half) { return acc[0][m][n][2 * half + c] + acc[1][m][n][2 * half + c]; };
        if (token < args.M)
          *reinterpret_cast<float4*>(mine + token * RED_PITCH) = {sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)};
      }
    barrier_arrive(SUMS_FULL + sums.stage, S::SUM_THREADS);
    sums.advance();
  }
}

// The reducer's work: add slices up, then bias and activation, or bias and the routing weight.
template <typename S>
__device__ __forceinline__ void reduce_items(Block<S> block, int lane) {
  const MoeArgs& args = block.args;
  const auto& rt = block.rt;
  Ring& sums = block.sums;
  // This lane's bias of an item: gate's and up's of one output, or one row's. Fetched before its sums are there:
  // under the load of the weights a single value takes as long as an item.
  auto bias_of = [&](Item item) -> uint32_t {
    const void* const bias = item.down() ? args.w2_bias : args.w13_bias;
    if (bias == nullptr) return 0;
    const int row_tiles = (item.down() ? args.H : 2 * args.I) / TILE;
    const int64_t row = (static_cast<int64_t>(rt.expert[item.active()]) * row_tiles + item.row_tile()) * TILE;
    if (item.down()) return static_cast<const uint16_t*>(bias)[row + lane];
    return static_cast<const uint32_t*>(bias)[row / 2 + lane % 16];
  };
#pragma unroll 1
  for (Item item = block.items.get(lane); item.exists(); item = block.items.get(lane)) {
    const int a = item.active(), row_tile = item.row_tile();
    const uint32_t packed_bias = bias_of(item);
    barrier_wait(SUMS_FULL + sums.stage, S::SUM_THREADS);
    const float2 bias = unpack_bf16x2(packed_bias);
    const float* const parts = block.sum_buffer();
    if (!item.down()) {
      const int j = lane % 16;
      for (int first = 0; first < args.M; first += 2) {  // half a warp each
        const int token = first + lane / 16, slot = token < args.M ? rt.slot[a][token] : -1;
        if (__ballot_sync(~0u, slot >= 0) == 0) continue;
        float value = 0.f;
        if (slot >= 0) {
          float gate = 0.f, up = 0.f;
#pragma unroll
          for (int w = 0; w < S::MAIN; ++w) {
            const float2 v = *reinterpret_cast<const float2*>(parts + (w * S::TOKENS + token) * RED_PITCH + 2 * j);
            gate += v.x;
            up += v.y;
          }
          value = activate(gate * ACCUMULATOR_SCALE + bias.x, up * ACCUMULATOR_SCALE + bias.y,
                           activation_of(args.swiglu_oai));
        }
        const uint32_t pair = pack_bf16x2(value, __shfl_xor_sync(~0u, value, 1));
        if (slot >= 0 && j % 2 == 0)
          store_relaxed(reinterpret_cast<uint32_t*>(block.act(token, slot) + row_tile * 16 + j), ~pair);
      }
    } else {
      for (int token = 0; token < args.M; ++token) {
        const int slot = rt.slot[a][token];
        if (slot < 0) continue;
        float v = 0.f;
#pragma unroll
        for (int w = 0; w < S::MAIN; ++w)
          v += parts[(w * S::TOKENS + token) * RED_PITCH + lane];
        store_relaxed(block.y(token, slot) + row_tile * TILE + lane,
                      ~__float_as_uint((v * ACCUMULATOR_SCALE + bias.x) * rt.weight[token][slot]));
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(sums.empty());
    sums.advance();
  }
}

// Count this call, once all of the block have read the count, and empty the next call's exchange. The reducer does it,
// which has nothing else to do yet.
template <typename S>
__device__ __forceinline__ void prepare_next_call(const Block<S>& block, DecodeExchange& next, int lane) {
  const int used = next.act_used;
  if (lane == 0) {
    // Together blocks flip the highest bit and leave the others as they were.
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

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) decode_layer(const MoeArgs args, const DecodeWorkspace ws) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Block<S> block(args, ws, smem);
  auto& rt = block.rt;
  if (threadIdx.x == 0) block.init();
  clear_routing(rt);
  __syncthreads();

  wait_for_previous_kernel();
  const bool odd = __ldcg(ws.calls) < 0;
  block.exchange = ws.exchange + odd;
  Slice<S> input(warp, lane);
  if (warp < S::MAIN)
    input.load(
        args.H / TILE,
        [&](int token) {
          return token < args.M ? static_cast<const uint8_t*>(args.x) + static_cast<int64_t>(token) * args.H * 2
                                : nullptr;
        },
        read_global);
  build_routing(args, rt, warp, lane);

  if (warp == S::COPIER)
    copy_weights(block, lane);
  else if (S::ROWS > 0 && warp >= S::FETCHER)
    fetch_activations(block, warp - S::FETCHER, lane);
  else if (warp < S::MAIN)
    multiply_items(block, input, lane);
  else {
    prepare_next_call(block, ws.exchange[!odd], lane);
    reduce_items(block, lane);
  }

  // ---- add each token's slots, as soon as they are there ----
  let_next_kernel_start();
  const int outputs = args.M * args.H, each = (outputs + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each;
  for (int i = begin + threadIdx.x; i < min(outputs, begin + each); i += S::THREADS) {
    const int token = i / args.H, h = i - token * args.H;
    uint32_t v[MAX_TOP_K];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int j = 0; j < MAX_TOP_K; ++j) {
        v[j] = rt.choice[token][j] >= 0 ? load_relaxed(block.y(token, j) + h) : ~0u;
        missing |= v[j] == 0;
      }
    } while (missing);
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < MAX_TOP_K; ++j) {
      sum += __uint_as_float(~v[j]);
      if (rt.choice[token][j] >= 0) block.y(token, j)[h] = 0;
    }
    static_cast<__nv_bfloat16*>(args.out)[i] = __float2bfloat16_rn(sum);
  }
}

template <typename S>
const char* launch(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device, cudaStream_t stream) {
  // Cooperative, for blocks wait for each other's results: all of them must be resident.
  return launch_kernel(decode_layer<S>, device.multiprocessors, S::THREADS, S::BYTES, stream,
                       {device.dependent_launch, /*cooperative=*/true}, args, ws);
}

// GPT-OSS's 90 k-tiles are three stages of 10 warps x 3 tiles. A wide input leaves registers for 8 tokens only.
using Tokens8 = Shape<10, 3, 3, 4, 1, 2>;
using Tokens16 = Shape<10, 3, 3, 3, 2, 0>;
using Wide = Shape<10, 3, 8, 4, 1, 0>;
static_assert(std::max(Wide::TOKENS* Wide::MAX_K, Tokens16::TOKENS* Tokens16::MAX_K) * MAX_TOP_K <= DECODE_MAX_VALUES);

int longest_k(const MoeArgs& args) { return std::max(args.H, args.I); }

}  // namespace

bool decode_layer_takes(const MoeArgs& args) {
  return args.M <= 8 ? longest_k(args) <= Wide::MAX_K
                     : args.M <= DECODE_MAX_TOKENS && longest_k(args) <= Tokens16::MAX_K;
}

Footprint decode_layer_footprint() {
  return {std::max({Tokens8::THREADS, Tokens16::THREADS, Wide::THREADS}),
          std::max({Tokens8::BYTES, Tokens16::BYTES, Wide::BYTES})};
}

const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                 cudaStream_t stream) {
  if (args.M > 8) return launch<Tokens16>(args, ws, device, stream);
  if (longest_k(args) <= Tokens8::MAX_K) return launch<Tokens8>(args, ws, device, stream);
  return launch<Wide>(args, ws, device, stream);
}

}  // namespace mxfp4_sm120
