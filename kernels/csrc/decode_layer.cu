// A whole MoE layer in one launch, for few tokens: the time is the time to stream the chosen experts' weights once.
//
// A persistent grid, one block per multiprocessor. An item is 32 weight rows of one active expert, by at most 8 tokens:
// the columns of a product. A block works on some of gate-up, then on some of down. Its warps have four trades. The
// copier chooses items and copies their weights into a ring of stages, each a stretch of an item's K. The main warps
// share every stage, so each has the same slice of K of all items, and multiply. The reducer adds the slices up,
// applies bias and activation, and writes. Fetchers bring activations as soon as they are there. Main warps so hardly
// wait for anything but weights, and the ring runs ahead over the seam between the two GEMMs: down-projection weights
// are in flight while the last activations are still being made.
//
// Up to 8 tokens, all of them are columns of every active expert's product: a column whose token did not choose the
// expert costs nothing that matters here (the tensor cores idle) and is ignored afterwards. A warp's slice of the input
// stays in its registers for as long as it is the input: the whole of gate-up, and one expert's items of down. More
// tokens are gathered: an expert's own make its columns, in as many tiles of 8 as it takes, each of which reads the
// expert's weights anew.
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

constexpr int COLUMNS = 8;  // of a product: its n
// Floats between two columns of a reduction buffer: 32 rows and 4 more, so that a quarter warp's 16-byte stores hit all
// banks.
constexpr int RED_PITCH = TILE + 4;
// Items chosen before all warps are done with the first of them: the weights' ring holds two, and parts of one more.
constexpr int ITEMS_AHEAD = 4;

// A token's j-th choice has a place, token * MAX_TOP_K + j.
constexpr int token_of(int place) { return place / MAX_TOP_K; }

// A block's account of the routing: each token's choices, and the tiles of tokens to multiply experts with.
template <int TOKENS_>
struct Choices {
  static constexpr int TOKENS = TOKENS_, PLACES = TOKENS * MAX_TOP_K;
  int tiles;               // how many there are
  int16_t expert[PLACES];  // by place: local expert or -1
  float weight[PLACES];
};

// Every active expert has one tile, and every token is a column of it: the input of gate-up is the same for all.
struct AllTokens : Choices<COLUMNS> {
  static constexpr bool GATHERED = false;
  struct Scratch {
    uint32_t active[MAX_EXPERTS / 32];  // experts, a bit each
  };
  int16_t tile_expert[PLACES];     // ascending
  int8_t choice[PLACES][COLUMNS];  // [tile][token] -> which of the token's, or -1

  __device__ __forceinline__ int expert_of(int tile) const { return tile_expert[tile]; }
  __device__ __forceinline__ int columns_of(int, int tokens) const { return tokens; }
  // Of a column's choice, -1 where it has not chosen the tile's expert or doesn't exist.
  __device__ __forceinline__ int place(int tile, int column) const {
    const int j = choice[tile][column];
    return j < 0 ? -1 : column * MAX_TOP_K + j;
  }
  // The tokens that chose a tile's expert, a bit each.
  __device__ __forceinline__ uint32_t tokens_of(int tile) const {
    uint32_t chosen = 0;
#pragma unroll
    for (int t = 0; t < COLUMNS; ++t)
      chosen |= (choice[tile][t] >= 0) << t;
    return chosen;
  }

  __device__ __forceinline__ void clear(Scratch& scratch) {
    if (threadIdx.x < MAX_EXPERTS / 32) scratch.active[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < PLACES * COLUMNS / 4; i += blockDim.x)
      reinterpret_cast<uint32_t*>(choice)[i] = ~0u;
  }
  __device__ __forceinline__ static void add(Scratch& scratch, int expert, int) {
    atomicOr(&scratch.active[expert >> 5], 1u << (expert & 31));
  }
  // Once all choices have been added.
  __device__ __forceinline__ void build(const Scratch& scratch, const MoeArgs& args) {
    // An expert's place among the active ones: how many bits stand below its own.
    auto rank = [&](int e) {
      int n = __popc(scratch.active[e >> 5] & ((1u << (e & 31)) - 1));
      for (int i = 0; i < e >> 5; ++i)
        n += __popc(scratch.active[i]);
      return n;
    };
    for (int s = threadIdx.x; s < args.M * MAX_TOP_K; s += blockDim.x) {
      const int e = expert[s];
      if (e < 0) continue;
      const int tile = rank(e);
      tile_expert[tile] = static_cast<int16_t>(e);  // the same value from every token that chose it
      choice[tile][token_of(s)] = static_cast<int8_t>(s % MAX_TOP_K);
    }
    if (threadIdx.x == blockDim.x - 1) {
      int n = 0;
      for (int i = 0; i < (args.local_experts + 31) / 32; ++i)
        n += __popc(scratch.active[i]);
      tiles = n;
    }
  }
};

// An expert's own tokens are its tiles' columns, ascending.
struct OwnTokens : Choices<GATHERED_MAX_TOKENS> {
  static constexpr bool GATHERED = true;
  static constexpr int MAX_TILES = std::min(MAX_EXPERTS, PLACES) + PLACES / COLUMNS, WORDS = TOKENS / 32;
  struct Tile {
    int16_t expert, first, columns;  // the first of its places in `order`, and how many there are
  };
  Tile tile[MAX_TILES];
  int16_t order[PLACES];  // places, sorted by expert
  // What it takes to find that out.
  struct Scratch {
    uint32_t tokens[MAX_EXPERTS][WORDS];  // that chose an expert, a bit each
    int16_t first_place[MAX_EXPERTS], first_tile[MAX_EXPERTS];
  };

  __device__ __forceinline__ int expert_of(int t) const { return tile[t].expert; }
  __device__ __forceinline__ int columns_of(int t, int) const { return tile[t].columns; }
  __device__ __forceinline__ int place(int t, int column) const {
    return column < tile[t].columns ? order[tile[t].first + column] : -1;
  }

  __device__ __forceinline__ void clear(Scratch& scratch) {
    for (int i = threadIdx.x; i < MAX_EXPERTS * WORDS; i += blockDim.x)
      reinterpret_cast<uint32_t*>(scratch.tokens)[i] = 0;
  }
  __device__ __forceinline__ static void add(Scratch& scratch, int expert, int token) {
    atomicOr(&scratch.tokens[expert][token / 32], 1u << token % 32);
  }
  __device__ __forceinline__ void build(Scratch& scratch, const MoeArgs& args) {
    auto count_of = [&](int expert) {
      int n = 0;
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        n += __popc(scratch.tokens[expert][i]);
      return n;
    };
    if (threadIdx.x < 32) {
      int before = 0;  // tiles, and in the upper half places
      for (int e0 = 0; e0 < args.local_experts; e0 += 32) {
        const int e = e0 + threadIdx.x, n = e < args.local_experts ? count_of(e) : 0;
        const int mine = (n + COLUMNS - 1) / COLUMNS | n << 16, through = before + inclusive_scan(mine, threadIdx.x);
        if (e < args.local_experts) {
          scratch.first_tile[e] = static_cast<int16_t>((through - mine) & 0xffff);
          scratch.first_place[e] = static_cast<int16_t>((through - mine) >> 16);
        }
        before = __shfl_sync(~0u, through, 31);
      }
      if (threadIdx.x == 0) tiles = before & 0xffff;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < args.local_experts; e += blockDim.x) {
      const int n = count_of(e);
      for (int i = 0; i < n; i += COLUMNS)
        tile[scratch.first_tile[e] + i / COLUMNS] = {static_cast<int16_t>(e),
                                                     static_cast<int16_t>(scratch.first_place[e] + i),
                                                     static_cast<int16_t>(min(COLUMNS, n - i))};
    }
    for (int s = threadIdx.x; s < args.M * MAX_TOP_K; s += blockDim.x) {
      const int e = expert[s], t = token_of(s);
      if (e < 0) continue;
      int at = scratch.first_place[e];
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        at += __popc(scratch.tokens[e][i] & (t >= 32 * (i + 1) ? ~0u : t < 32 * i ? 0u : (1u << t % 32) - 1));
      order[at] = static_cast<int16_t>(s);
    }
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
// ring RING. ROWS of activations are fetched ahead, if any, by a warp each.
template <typename Routing_, int MAIN_, int EACH_, int STAGES_, int RING_, int ROWS_>
struct Shape {
  using Routing = Routing_;
  static constexpr int MAIN = MAIN_, EACH = EACH_, STAGES = STAGES_, RING = RING_, ROWS = ROWS_;
  static constexpr int REDUCER = MAIN, COPIER = MAIN + 1, FETCHER = MAIN + 2;
  static constexpr int THREADS = 32 * (FETCHER + ROWS);
  static constexpr int SUM_THREADS = 32 * (REDUCER + 1);  // those who make an item's sums and who adds them up
  static constexpr int STAGE_TILES = MAIN * EACH, STAGE_BYTES = STAGE_TILES * TILE_BYTES;
  static constexpr int MAX_K = STAGES * STAGE_TILES * TILE;
  // Shared memory: weights, activations, two buffers of sums (so that adding up and multiplying overlap), barriers, the
  // routing.
  static constexpr int ROW_BYTES = MAX_K * 2, SUM_FLOATS = MAIN * COLUMNS * RED_PITCH, SUM_BUFFERS = 2;
  static constexpr int ACTS = RING * STAGE_BYTES, SUMS = ACTS + ROWS * ROW_BYTES;
  static constexpr int BARS = SUMS + SUM_BUFFERS * SUM_FLOATS * 4;
  static constexpr int ITEMS = BARS + (RING + ROWS + SUM_BUFFERS + ITEMS_AHEAD) * 16, ROUTING = ITEMS + ITEMS_AHEAD * 4;
  static constexpr int BYTES = ROUTING + static_cast<int>(sizeof(Routing));
  static_assert(BYTES <= MAX_SHARED_BYTES && sizeof(typename Routing::Scratch) <= SUM_BUFFERS * SUM_FLOATS * 4);
};

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

template <typename Routing>
__device__ __forceinline__ void build_routing(const MoeArgs& args, Routing& rt, typename Routing::Scratch& scratch,
                                              int warp, int lane) {
  const int warps = blockDim.x / 32;
  for (int token = warps - 1 - warp; token < args.M; token += warps) {  // main warps last: they have inputs to load
    const Choice c = route_token(args, token, lane, /*merge=*/true);
    if (lane < MAX_TOP_K) {
      rt.expert[token * MAX_TOP_K + lane] = static_cast<int16_t>(c.expert);
      rt.weight[token * MAX_TOP_K + lane] = c.weight;
    }
    if (args.M == 1) prefetch_first_item(args, c.expert, lane);
    if (c.expert >= 0) rt.add(scratch, c.expert, token);
  }
  __syncthreads();
  rt.build(scratch, args);
  __syncthreads();
}

// What a block works on next: 32 weight rows by a tile of tokens.
struct Item {
  int word;
  __device__ __forceinline__ static Item of(bool down, int tile, int row_tile) {
    return {row_tile | tile << 16 | down << 28};
  }
  __device__ __forceinline__ static Item none() { return {-1}; }
  __device__ __forceinline__ bool exists() const { return word >= 0; }
  __device__ __forceinline__ int row_tile() const { return word & 0xffff; }
  __device__ __forceinline__ int tile() const { return word >> 16 & 0xfff; }
  __device__ __forceinline__ bool down() const { return word >> 28 & 1; }
  __device__ __forceinline__ int input() const { return word >> 16; }  // the same for items with the same input
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
  typename S::Routing& rt;
  Ring weights;
  Ring acts;  // a token's activations a stage
  Ring sums;  // full ones are handed over by named barriers instead, SUMS_FULL
  Items items;

  __device__ __forceinline__ Block(const MoeArgs& args, const DecodeWorkspace& ws, uint8_t* smem)
      : args(args),
        ws(ws),
        smem(smem),
        rt(*reinterpret_cast<typename S::Routing*>(smem + S::ROUTING)),
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
  __device__ __forceinline__ int slot_of(int place) const { return token_of(place) * args.top_k + place % MAX_TOP_K; }
  __device__ __forceinline__ uint16_t* act(int place) const {
    return exchange->act + static_cast<int64_t>(slot_of(place)) * args.I;
  }
  __device__ __forceinline__ uint32_t* y(int place) const {
    return ws.y + static_cast<int64_t>(slot_of(place)) * args.H;
  }
  __device__ __forceinline__ const uint8_t* x(int token) const {
    return static_cast<const uint8_t*>(args.x) + static_cast<int64_t>(token) * args.H * 2;
  }
  __device__ __forceinline__ float* sum_buffer() const {
    return reinterpret_cast<float*>(smem + S::SUMS) + sums.stage * S::SUM_FLOATS;
  }
};

// Eight activations as blocks exchange them, and whether all of them are there.
__device__ __forceinline__ uint4 complement(uint4 v) { return {~v.x, ~v.y, ~v.z, ~v.w}; }
__device__ __forceinline__ bool all_there(uint4 v) { return min(min(v.x, v.y), min(v.z, v.w)) != 0; }

// The B operands of a main warp: its slice of an item's input, 8 values of column g at each of its tiles.
template <typename S>
struct Slice {
  uint4 b[S::STAGES * S::EACH];
  int warp, g, q;

  __device__ __forceinline__ Slice(int warp, int lane) : warp(warp), g(lane >> 2), q(lane & 3) {}
  // Of a stage with so many tiles, this warp's.
  __device__ __forceinline__ int first_of(int tiles) const { return tiles * warp / S::MAIN; }
  __device__ __forceinline__ int count_of(int tiles) const {
    return tiles * (warp + 1) / S::MAIN - tiles * warp / S::MAIN;
  }
  // A column's row is a pointer or an address in shared memory, 0 for none: then all its bits are those of `none`.
  template <typename RowOfColumn, typename Read>
  __device__ __forceinline__ void load(int k_tiles, RowOfColumn row_of_column, Read read, uint32_t none = 0) {
    const auto row = row_of_column(g);
#pragma unroll
    for (int c = 0; c < S::STAGES; ++c) {
      const int tiles = max(0, min(S::STAGE_TILES, k_tiles - c * S::STAGE_TILES)), count = count_of(tiles);
      const int first = c * S::STAGE_TILES + first_of(tiles);
#pragma unroll
      for (int t = 0; t < S::EACH; ++t) {
        b[c * S::EACH + t] = uint4{none, none, none, none};
        if (row != 0 && t < count) b[c * S::EACH + t] = read(row + (first + t) * TILE * 2 + q * 16);
      }
    }
  }
  // Exchanged activations, as soon as all are there. Loaded together and then looked at: to look at one before the next
  // is loaded is to wait for it.
  template <typename RowOfColumn>
  __device__ __forceinline__ void load_exchanged(int k_tiles, RowOfColumn row_of_column) {
    bool missing;
    do {
      load(
          k_tiles, row_of_column, [](const uint8_t* at) { return load_relaxed(reinterpret_cast<const uint4*>(at)); },
          ~0u);
      missing = false;
#pragma unroll
      for (int i = 0; i < S::STAGES * S::EACH; ++i)
        missing |= !all_there(b[i]);
    } while (missing);
#pragma unroll
    for (int i = 0; i < S::STAGES * S::EACH; ++i)
      b[i] = complement(b[i]);
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
    const int count = block.rt.tiles * row_tiles;
    const Deal deal(count);
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      int n = deal.item(turn);
      if (turn >= deal.count) {
        if (lane == 0) n = gridDim.x * deal.count + atomicAdd(block.exchange->taken + down, 1);
        n = __shfl_sync(~0u, n, 0);
        if (n >= count) break;
      }
      const int tile = n / row_tiles, row_tile = n - tile * row_tiles;
      block.items.put(Item::of(down, tile, row_tile), lane);
      const uint8_t* src = (down ? args.w2 : args.w13) +
                           (static_cast<int64_t>(block.rt.expert_of(tile)) * row_tiles + row_tile) * item_bytes;
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
    if (!item.down() || item.tile() == input_of) continue;
    input_of = item.tile();
    const uint32_t chosen = rt.tokens_of(input_of);
    if (__popc(chosen) > S::ROWS) continue;
#pragma unroll 1
    for (uint32_t left = chosen; left != 0; left &= left - 1) {
      const int token = __ffs(left) - 1;
      if (acts.stage == fetcher) {
        acts.wait_empty();
        fetch_row<S::ROW_BYTES>(block.smem + S::ACTS + fetcher * S::ROW_BYTES, block.act(rt.place(input_of, token)),
                                args.I * 2, lane);
        mbar_arrive(acts.full());
      }
      acts.advance();
    }
  }
}

// A main warp's slice of an item's input.
template <typename S>
__device__ __forceinline__ void load_input(Block<S>& block, Slice<S>& input, Item item, int k_tiles, int lane) {
  const auto& rt = block.rt;
  const int tile = item.tile();
  if constexpr (S::ROWS > 0) {
    const uint32_t chosen = rt.tokens_of(tile);
    if (__popc(chosen) <= S::ROWS) {
      Ring& acts = block.acts;
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
      return;
    }
  }
  auto row_of = [&](int column) -> const uint8_t* {
    const int place = rt.place(tile, column);
    return place < 0     ? nullptr
           : item.down() ? reinterpret_cast<const uint8_t*>(block.act(place))
                         : block.x(token_of(place));
  };
  if (item.down())
    input.load_exchanged(k_tiles, row_of);
  else
    input.load(k_tiles, row_of, read_global);
  __syncwarp();
}

// A main warp's work: its slice of K of every item, and the sums of that for the reducer.
template <typename S>
__device__ __forceinline__ void multiply_items(Block<S> block, Slice<S>& input, int lane) {
  constexpr int EACH = S::EACH;
  const MoeArgs& args = block.args;
  Ring &weights = block.weights, &sums = block.sums;
  int input_of = -1;
#pragma unroll 1
  for (Item item = block.items.get(lane); item.exists(); item = block.items.get(lane)) {
    const int k_tiles = (item.down() ? args.I : args.H) / TILE, columns = block.rt.columns_of(item.tile(), args.M);
    if ((item.down() || S::Routing::GATHERED) && item.input() != input_of) {
      input_of = item.input();
      load_input(block, input, item, k_tiles, lane);
    }
    float acc[2][2][4] = {};  // [k16 step][m16 tile]: short chains instead of long ones
#pragma unroll
    for (int c = 0; c < S::STAGES; ++c) {
      const int tiles = k_tiles - c * S::STAGE_TILES;
      if (tiles <= 0) break;
      auto multiply = [&](uint32_t tile_at, int t) {
        const PackedTile tile = load_tile(tile_at, lane);
        const uint4 b = input.b[c * EACH + t];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const AFragments f = decode_half_tile(tile, m);
          mma_bf16(acc[0][m], f.lo[0], f.hi[0], f.lo[1], f.hi[1], b.x, b.y);
          mma_bf16(acc[1][m], f.lo[2], f.hi[2], f.lo[3], f.hi[3], b.z, b.w);
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
    float* const mine = block.sum_buffer() + input.warp * COLUMNS * RED_PITCH + 4 * input.g;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 2 * input.q + c;
      auto sum = [&](int m, int half) { return acc[0][m][2 * half + c] + acc[1][m][2 * half + c]; };
      if (column < columns)
        *reinterpret_cast<float4*>(mine + column * RED_PITCH) = {sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)};
    }
    barrier_arrive(SUMS_FULL + sums.stage, S::SUM_THREADS);
    sums.advance();
  }
}

// The reducer's work: add slices up, then bias and activation, or bias and the routing weight. A lane has four adjacent
// rows of one column, and so two outputs of gate-up or four of down; the warp four columns at a time.
template <typename S>
__device__ __forceinline__ void reduce_items(Block<S> block, int lane) {
  constexpr int LANES = TILE / 4, AT_ONCE = 32 / LANES;  // of a column; columns
  const MoeArgs& args = block.args;
  const auto& rt = block.rt;
  Ring& sums = block.sums;
  const int row = lane % LANES * 4;
  // Fetched before an item's sums are there: under the load of the weights a single value takes as long as an item.
  auto bias_of = [&](Item item) {
    const void* const bias = item.down() ? args.w2_bias : args.w13_bias;
    if (bias == nullptr) return uint2{0, 0};
    const int row_tiles = (item.down() ? args.H : 2 * args.I) / TILE;
    const int64_t first = (static_cast<int64_t>(rt.expert_of(item.tile())) * row_tiles + item.row_tile()) * TILE;
    return *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(bias) + first + row);
  };
  const Activation activation = activation_of(args.swiglu_oai);
#pragma unroll 1
  for (Item item = block.items.get(lane); item.exists(); item = block.items.get(lane)) {
    const int tile = item.tile(), columns = rt.columns_of(tile, args.M);
    const uint2 packed_bias = bias_of(item);
    barrier_wait(SUMS_FULL + sums.stage, S::SUM_THREADS);
    const float2 lo = unpack_bf16x2(packed_bias.x), hi = unpack_bf16x2(packed_bias.y);
    const uint32_t parts = smem_addr(block.sum_buffer()) + row * 4;
#pragma unroll 1
    for (int first = 0; first < columns; first += AT_ONCE) {
      const int column = first + lane / LANES, place = rt.place(tile, column);
      if (place < 0) continue;
      float v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < S::MAIN; ++w) {
        const uint4 part = lds128(parts + (w * COLUMNS + column) * RED_PITCH * 4);
        v[0] += __uint_as_float(part.x);
        v[1] += __uint_as_float(part.y);
        v[2] += __uint_as_float(part.z);
        v[3] += __uint_as_float(part.w);
      }
      v[0] = v[0] * ACCUMULATOR_SCALE + lo.x;
      v[1] = v[1] * ACCUMULATOR_SCALE + lo.y;
      v[2] = v[2] * ACCUMULATOR_SCALE + hi.x;
      v[3] = v[3] * ACCUMULATOR_SCALE + hi.y;
      if (item.down()) {
        const float weight = rt.weight[place];
        store_relaxed(reinterpret_cast<uint4*>(block.y(place) + item.row_tile() * TILE + row),
                      complement(uint4{__float_as_uint(v[0] * weight), __float_as_uint(v[1] * weight),
                                       __float_as_uint(v[2] * weight), __float_as_uint(v[3] * weight)}));
      } else {
        store_relaxed(reinterpret_cast<uint32_t*>(block.act(place) + (item.row_tile() * TILE + row) / 2),
                      ~pack_bf16x2(activate(v[0], v[1], activation), activate(v[2], v[3], activation)));
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
  auto& scratch = *reinterpret_cast<typename S::Routing::Scratch*>(smem + S::SUMS);  // long before there are sums
  rt.clear(scratch);
  __syncthreads();

  wait_for_previous_kernel();
  const bool odd = __ldcg(ws.calls) < 0;
  block.exchange = ws.exchange + odd;
  Slice<S> input(warp, lane);
  if (warp < S::MAIN && !S::Routing::GATHERED)
    input.load(args.H / TILE, [&](int token) { return token < args.M ? block.x(token) : nullptr; }, read_global);
  build_routing(args, rt, scratch, warp, lane);

  if (warp == S::COPIER)
    copy_weights(block, lane);
  else if (warp < S::MAIN)
    multiply_items(block, input, lane);
  else if (warp == S::REDUCER) {
    prepare_next_call(block, ws.exchange[!odd], lane);
    reduce_items(block, lane);
  } else if constexpr (S::ROWS > 0)
    fetch_activations(block, warp - S::FETCHER, lane);

  // ---- add each token's slots, as soon as they are there ----
  let_next_kernel_start();
  const int fours = args.M * args.H / 4, each = (fours + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each;
  for (int i = begin + threadIdx.x; i < min(fours, begin + each); i += S::THREADS) {
    const int token = i / (args.H / 4), first = (i - token * (args.H / 4)) * 4;
    uint4 v[MAX_TOP_K];
    auto has = [&](int j) { return rt.expert[token * MAX_TOP_K + j] >= 0; };
    auto y = [&](int j) { return reinterpret_cast<uint4*>(block.y(token * MAX_TOP_K + j) + first); };
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int j = 0; j < MAX_TOP_K; ++j) {
        v[j] = has(j) ? load_relaxed(y(j)) : uint4{~0u, ~0u, ~0u, ~0u};
        missing |= !all_there(v[j]);
      }
    } while (missing);
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

template <typename S>
const char* launch(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device, cudaStream_t stream) {
  // Cooperative, for blocks wait for each other's results: all of them must be resident.
  return launch_kernel(decode_layer<S>, device.multiprocessors, S::THREADS, S::BYTES, stream,
                       {device.dependent_launch, /*cooperative=*/true}, args, ws);
}

// GPT-OSS's 90 k-tiles are three stages of 10 warps x 3 tiles.
using Few = Shape<AllTokens, 10, 3, 3, 4, 2>;
using FewWide = Shape<AllTokens, 10, 3, 8, 4, 0>;
using Gathered = Shape<OwnTokens, 10, 3, 3, 4, 0>;
static_assert(COLUMNS * FewWide::MAX_K * MAX_TOP_K <= DECODE_MAX_VALUES);

int longest_k(const MoeArgs& args) { return std::max(args.H, args.I); }

}  // namespace

bool decode_layer_takes(const MoeArgs& args) { return args.M <= COLUMNS && longest_k(args) <= FewWide::MAX_K; }

Footprint decode_layer_footprint() {
  return {std::max(Few::THREADS, FewWide::THREADS), std::max(Few::BYTES, FewWide::BYTES)};
}

const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                 cudaStream_t stream) {
  if (longest_k(args) <= Few::MAX_K) return launch<Few>(args, ws, device, stream);
  return launch<FewWide>(args, ws, device, stream);
}

bool gathered_layer_takes(const MoeArgs& args) {
  return args.M <= GATHERED_MAX_TOKENS && longest_k(args) <= Gathered::MAX_K &&
         args.M * args.top_k * longest_k(args) <= DECODE_MAX_VALUES;
}

Footprint gathered_layer_footprint() { return {Gathered::THREADS, Gathered::BYTES}; }

const char* gathered_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                   cudaStream_t stream) {
  return launch<Gathered>(args, ws, device, stream);
}

}  // namespace mxfp4_sm120
