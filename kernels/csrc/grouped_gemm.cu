// Grouped GEMMs over experts, for more tokens than the decode kernel takes: gate-up (with SwiGLU) and down, one launch.
//
// A persistent grid. An item is a token tile of one expert by a group of weight rows, of gate-up or of down. Gate-up's
// items come first; down's wait until gate-up has finished their token tile, which it has long done as a rule, so that
// only the end of all has blocks without work. Threads fill a ring of shared-memory stages with cp.async, ahead of the
// arithmetic and across items: packed weight tiles and gathered token rows. Warps decode weights straight into A
// operands, in registers, and never write a decoded weight anywhere.
//
// On an H100 a product (m16n8k16) takes 6 cycles of its scheduler, and every other instruction, whatever it does, adds
// about 0.5 to 0.7, as if they shared the register file's ports. So other instructions are what to save. A warp has 32
// rows and all of the block's tokens, which decodes a weight once for as many products as there are tokens; the warps
// of a block share the tokens. With 144 tokens a k-tile costs a warp 72 products and 103 other instructions: 52 to
// decode, 20 to read shared memory, the rest copies, addresses, barrier and loop. There is no producer warp: it would
// take registers that the accumulators need.
#include <algorithm>
#include <climits>
#include <tuple>

#include "dispatch.h"
#include "layer.cuh"

namespace mxfp4_sm120 {
namespace {

struct Gemm {
  const uint8_t* weights;  // [experts, rows/32, K/32, TILE_BYTES]
  const uint16_t* bias;    // bf16 [experts, rows] or nullptr
  const uint16_t* in;      // bf16 [*, K]: the tokens (gate-up) or activations in sorted order (down)
  void* out;               // gate-up: bf16 [slots, rows/2]; down: [slots, rows] packed by four; both in sorted order
  int rows, K;
};
struct Layer {
  Gemm gemms[2];       // gate-up, down
  const int* offsets;  // [experts + 1] where each expert's slots begin
  const int* order;    // [slots] the tokens, in sorted order
  int* taken;          // items that blocks have taken, beyond those dealt; zero at the start
  int* finished;       // warps that have finished gate-up of a token tile; zero at the start
  int experts;
  Activation activation;
};

// Where a thread's outputs go. Column c (0 or 1) of two m16 tiles' accumulators is four adjacent rows of one slot.
template <bool GATE_UP>
struct Output {
  uint8_t* first;  // in the first slot
  int stride;      // bytes from a slot to the next
  float4 bias;
  static constexpr float SCALE = GATE_UP ? 1.f : PACKED_SCALE;

  __device__ __forceinline__ Output(const Gemm& p, int expert, int slot, int row)
      : stride(GATE_UP ? p.rows : 2 * p.rows), bias{0.f, 0.f, 0.f, 0.f} {
    first = static_cast<uint8_t*>(p.out) + static_cast<int64_t>(slot) * stride + (GATE_UP ? row : 2 * row);
    if (p.bias == nullptr) return;
    const uint2 v = *reinterpret_cast<const uint2*>(p.bias + static_cast<int64_t>(expert) * p.rows + row);
    const float2 lo = unpack_bf16x2(v.x), hi = unpack_bf16x2(v.y);
    bias = {lo.x * SCALE, lo.y * SCALE, hi.x * SCALE, hi.y * SCALE};
  }

  // Without a branch around what is not to be stored: the compiler overlaps one slot's arithmetic with the next one's.
  __device__ __forceinline__ void store(const Activation& activation, bool exists, int slot, const float (&lo)[4],
                                        const float (&hi)[4], int c) const {
    constexpr float scale = ACCUMULATOR_SCALE * SCALE;
    const float v[4] = {lo[c] * scale + bias.x, lo[2 + c] * scale + bias.y, hi[c] * scale + bias.z,
                        hi[2 + c] * scale + bias.w};
    uint8_t* const at = first + static_cast<int64_t>(slot) * stride;
    if constexpr (GATE_UP)
      store_if(exists, at, pack_bf16x2(activate(v[0], v[1], activation), activate(v[2], v[3], activation)));
    else
      store_if(exists, at, pack_four(v));
  }
};

// WARPS one above the other, 32 rows each, by TOKENS tokens; STAGES of one k-tile; BLOCKS per multiprocessor.
template <int WARPS_, int TOKENS_, int STAGES_, int BLOCKS_>
struct Shape {
  static constexpr int WARPS = WARPS_, TOKENS = TOKENS_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int THREADS = 32 * WARPS, TOKEN_TILES = TOKENS / 8;
  static constexpr int WEIGHT_BYTES = WARPS * TILE_BYTES, STAGE_BYTES = WEIGHT_BYTES + TOKENS * 64;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
  static constexpr int SOURCES = (TOKENS * 4 + THREADS - 1) / THREADS;  // token rows a thread copies 16 bytes of
  // There is a main loop for each even number of n8 tiles up to this, and for each number above.
  static constexpr int EVEN_UP_TO = TOKEN_TILES / 2;
};

template <typename S>
__device__ __forceinline__ int row_groups(const Gemm& p) {
  return (p.rows / TILE + S::WARPS - 1) / S::WARPS;
}

// How many warps share a row tile of the last row group, which has `left` of them (0: as many as the others).
template <typename S>
__device__ __forceinline__ int sharers(int left) {
  return left == 0 || left > S::WARPS / 2 ? 1 : left > S::WARPS / 4 ? 2 : 4;
}

// An expert's tokens make full tiles and a rest.
template <typename S>
struct Tiles {
  static constexpr int TOKENS = S::TOKENS, THREADS = S::THREADS;
  int offsets[MAX_EXPERTS + 1];  // where each expert's tokens begin
  int full[MAX_EXPERTS + 1];     // full tiles before each expert
  int rests[MAX_EXPERTS];        // experts with a rest, the longest first
  int rest_count;
  int long_rests;  // no shorter than a warp's share of a full tile in down's last row group

  __device__ int gate_up_items(const Layer& p) const {
    return (full[p.experts] + rest_count) * row_groups<S>(p.gemms[0]);
  }
  __device__ int rest_of(int e) const { return (offsets[e + 1] - offsets[e]) % TOKENS; }

  __device__ void prepare(const Layer& p) {
    const int experts = p.experts;
    for (int e = threadIdx.x; e <= experts; e += THREADS)
      offsets[e] = __ldcg(p.offsets + e);
    if (threadIdx.x == 0) rest_count = long_rests = 0;
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      int before = 0;
      for (int e0 = 0; e0 < experts; e0 += 32) {
        const int e = e0 + lane;
        const int n = inclusive_scan(e < experts ? (offsets[e + 1] - offsets[e]) / TOKENS : 0, lane);
        if (e < experts) full[e + 1] = before + n;
        before += __shfl_sync(~0u, n, 31);
      }
      if (lane == 0) full[0] = 0;
    }
    for (int e = threadIdx.x; e < experts; e += THREADS) {
      const int mine = rest_of(e);
      if (mine == 0) continue;
      atomicAdd(&rest_count, 1);
      if (mine * sharers<S>(p.gemms[1].rows / TILE % S::WARPS) >= TOKENS) atomicAdd(&long_rests, 1);
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

// An expert's token tile by a group of WARPS row tiles.
struct Item {
  short down, expert, row_group, tokens;  // down: 0 or 1
  int begin, tile;                        // of its first token; which of all token tiles
};

constexpr int TURNS = 16;  // that a block remembers

// What a block keeps behind the ring. (In front, with the ring at an odd multiple of 16 bytes, layers took a quarter to
// nearly a half longer.)
template <typename S>
struct Shared {
  int taken[TURNS];   // the item of a turn, by number
  Item items[TURNS];  // and in full, once the loader has begun it
  Tiles<S> tiles;
};
template <typename S>
constexpr int BYTES = S::RING_BYTES + sizeof(Shared<S>);

// An item by its number; past the last its expert is -1. Gate-up's first, all of a full tile or a rest (an expert's
// full tiles together: they read the same weights) one after the other, for down's to be ready as they come. Of down's
// those that take longer come first, for the end to be even: the full tiles' whole row groups; long rests' whole row
// groups; the last row group, if it has fewer row tiles, of full tiles and of rests; the other rests' whole row groups.
// For whole warps.
template <typename S>
__device__ __forceinline__ Item item_of(int n, const Layer& p, const Tiles<S>& tiles) {
  constexpr int WARPS = S::WARPS, TOKENS = S::TOKENS;
  const int full = tiles.full[p.experts], rests = tiles.rest_count, gate_up_items = tiles.gate_up_items(p);
  const bool down = n >= gate_up_items;
  if (down) n -= gate_up_items;
  // Gate-up: all row groups of a tile one after the other.
  const int row_tiles = p.gemms[down].rows / TILE, part = down && row_tiles % WARPS != 0;
  const int whole = row_groups<S>(p.gemms[down]) - part;
  const int long_rests = down ? tiles.long_rests : rests;
  const int longer = (full + long_rests) * whole, parts = (full + rests) * part;
  const bool in_part = n >= longer && n < longer + parts;
  if (in_part)
    n -= longer;
  else if (n >= longer)
    n -= parts;
  const int groups = in_part ? 1 : whole;
  Item item{static_cast<short>(down), -1, static_cast<short>(whole), 0, 0, 0};
  if (n < full * groups) {
    int expert = 0;  // as many as end before
    for (int e0 = 0; e0 < p.experts; e0 += 32) {
      const int e = e0 + threadIdx.x % 32;
      expert += __popc(__ballot_sync(~0u, e < p.experts && tiles.full[e + 1] * groups <= n));
    }
    const int before = tiles.full[expert], here = tiles.full[expert + 1] - before;
    n -= before * groups;
    item.tile = before + n % here;
    if (!in_part) item.row_group = n / here;
    item.expert = expert;
    item.begin = tiles.offsets[expert] + n % here * TOKENS;
    item.tokens = TOKENS;
  } else if ((n -= full * groups) < rests * groups) {
    if (!in_part) item.row_group = n % whole;
    item.tile = full + n / groups;
    item.expert = tiles.rests[n / groups];
    item.tokens = tiles.rest_of(item.expert);
    item.begin = tiles.offsets[item.expert + 1] - item.tokens;
  }
  return item;
}

// The n8 tiles of the main loop for so many with tokens.
template <typename S>
__host__ __device__ constexpr int loop_size(int token_tiles) {
  return token_tiles > S::EVEN_UP_TO ? token_tiles : token_tiles + token_tiles % 2;
}

// A warp's part of an item. The last row group may have few row tiles (GPT-OSS's 90 and 180 are 11 x 8 + 2 and 22 x 8 +
// 4); then several warps share one, each with a part of the tokens. Parts may overlap, and two warps then compute the
// same: a main loop may have more n8 tiles than there are, and reads none beyond the stage's.
template <typename S>
struct Part {
  int row_tile, token_tile, token_tiles;  // the row tile, and the first and the number of n8 tiles
  __device__ Part(const Item& item, int row_tiles, int warp) {
    constexpr int WARPS = S::WARPS;
    const int first = item.row_group * WARPS;
    const int parts = sharers<S>(row_tiles - first);
    row_tile = first + warp % (WARPS / parts);
    const int share = ((item.tokens + 7) / 8 + parts - 1) / parts;
    token_tiles = loop_size<S>(share);
    token_tile = min(warp / (WARPS / parts) * share, S::TOKEN_TILES - token_tiles);
  }
};

// Fills the ring, a stage at a time, for the items a block will meet.
template <typename S>
struct Loader {
  static constexpr int SOURCES = S::SOURCES, THREADS = S::THREADS;
  const Layer& p;
  Shared<S>& shared;
  int turn = 0;         // the next item to begin
  int left = 0;         // k-tiles of the item that are still to be copied
  uint32_t copies = 0;  // which this thread makes of a k-tile: bit i for its i-th of weights, 8 + i of tokens
  const uint8_t* weights = nullptr;  // this lane's first chunk of its warp's row tile, at the next k-tile
  const uint8_t* tokens = nullptr;   // this thread's chunk of row 0, at the next k-tile
  uint32_t row[SOURCES];             // this thread's rows, in 16-byte units from row 0

  __device__ __forceinline__ Loader(const Layer& p, Shared<S>& shared) : p(p), shared(shared) {}

  __device__ __forceinline__ Item next() const { return item_of<S>(shared.taken[turn % TURNS], p, shared.tiles); }

  // Has gate-up finished the item's token tile?
  __device__ __forceinline__ bool is_ready(const Item& item) const {
    return load_acquire(p.finished + item.tile) == row_groups<S>(p.gemms[0]) * S::WARPS;
  }

  // The next item, if there is one and its tokens are there: whoever works on an item must not wait for others.
  __device__ __forceinline__ void begin_if_ready() {
    const Item item = next();
    if (item.expert >= 0 && (!item.down || __syncthreads_and(is_ready(item)))) return begin(item);
    if (item.expert < 0) let_next_kernel_start();  // the block is near its end
    left = INT_MAX;
    copies = 0;
  }
  __device__ __forceinline__ void begin_when_ready(const Item& item) {
    while (item.down && !is_ready(item)) {
    }
    begin(item);
  }

  // Where a row tile or a token doesn't exist, the last one is copied in its place and what comes of it not stored.
  __device__ __forceinline__ void begin(const Item& item) {
    const Gemm& gemm = p.gemms[item.down];
    const int row_tiles = gemm.rows / TILE, thread = thread_index();
    if (thread == 0) shared.items[turn % TURNS] = item;  // long before anyone reads it
    ++turn;
    left = gemm.K / TILE;
    tokens = reinterpret_cast<const uint8_t*>(gemm.in) + thread % 4 * 16;
    copies = thread % 32 < TILE_CHUNKS - 32 ? 3 : 1;
    const int row_tile = min(Part<S>(item, row_tiles, thread / 32).row_tile, row_tiles - 1);
    weights = gemm.weights + (static_cast<int64_t>(item.expert) * row_tiles + row_tile) * left * TILE_BYTES +
              thread % 32 * 16;
#pragma unroll
    for (int i = 0; i < SOURCES; ++i) {
      const int t = (thread + i * THREADS) / 4, at = item.begin + min(t, item.tokens - 1);
      row[i] = static_cast<uint32_t>(item.down ? at : p.order[at]) * (gemm.K / 8);
      if (t < S::TOKENS && (t & ~7) < item.tokens) copies |= 256 << i;
    }
  }

  // Starts the copies of the k-tile `ahead` of the next into a stage: a warp its row tile, [token][4 chunks] all
  // together. No branches, so that products are scheduled in between.
  __device__ __forceinline__ void load_stage(uint32_t weight_dst, uint32_t token_dst, int ahead) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (copies & 1 << i) cp_async16(weight_dst + i * 512, weights + ahead * TILE_BYTES + i * 512);
#pragma unroll
    for (int i = 0; i < SOURCES; ++i)
      if (copies & 256 << i)
        cp_async16(token_dst + i * THREADS * 16, tokens + static_cast<uint64_t>(row[i]) * 16 + ahead * 64);
    cp_async_commit();
  }

  __device__ __forceinline__ void advance(int k_tiles) {
    weights += k_tiles * TILE_BYTES;
    tokens += k_tiles * 64;
  }
};

// acc += weights x tokens over one item, whose first stage has landed; the next item's has when it returns.
// Software-pipelined: while the tensor cores work on a k-tile, its lower half is decoded, the next one's tokens take
// the place of its own, and the next one's upper half is decoded, so that a warp always has products to issue. NTA: n8
// tiles that hold tokens, at most.
template <int NTA, typename S, typename L>
__device__ __forceinline__ void main_loop(S, float (&acc)[2][S::TOKEN_TILES][4], L& loader, uint32_t smem,
                                          int token_tile, int k_tiles, uint32_t& stage) {
  constexpr int WEIGHT_BYTES = S::WEIGHT_BYTES, STAGE_BYTES = S::STAGE_BYTES, STAGES = S::STAGES;
  // n8 tiles whose tokens are in registers: all or, where the accumulators leave no room for so many, half.
  constexpr int HELD = NTA <= 7 ? NTA : (NTA + 1) / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t my_tile = smem + warp * TILE_BYTES + lane * 16;
  const uint32_t my_scales = smem + warp * TILE_BYTES + TILE_CODES + (lane >> 2) * 4;
  const uint32_t my_tokens = smem + WEIGHT_BYTES + token_tile * 512 + lane * 16;
  const uint32_t copied_tokens = smem + WEIGHT_BYTES + threadIdx.x * 16;
  auto after = [](uint32_t stage) { return stage + STAGE_BYTES == S::RING_BYTES ? 0 : stage + STAGE_BYTES; };
  auto tile_of = [&](uint32_t stage) { return PackedTile{lds128(my_tile + stage), lds32(my_scales + stage)}; };
  auto tokens_of = [&](uint32_t stage, int n) { return lds128(my_tokens + stage + n * 512); };

  uint4 b[HELD];
#pragma unroll
  for (int n = 0; n < HELD; ++n)
    b[n] = tokens_of(stage, n);
  PackedTile tile = tile_of(stage);
  AFragments upper = decode_half_tile(tile, 0);

  auto step = [&](int ahead) {
    const uint32_t next = after(stage);
    const AFragments lower = decode_half_tile(tile, 1);
#pragma unroll
    for (int n0 = 0; n0 < NTA; n0 += HELD) {
      if (n0 + HELD >= NTA) {
        // This thread's copies of the next stage have landed and, after the barrier, everyone's; and every warp
        // holds what it still needs of this stage in registers: refill it.
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        loader.load_stage(my_tile + stage, copied_tokens + stage, ahead);
        tile = tile_of(next);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const AFragments& a = s % 2 == 0 ? upper : lower;
        const int k16 = s / 2;
#pragma unroll
        for (int i = 0; i < HELD && n0 + i < NTA; ++i)
          mma_bf16(acc[s % 2][n0 + i], a.lo[2 * k16], a.hi[2 * k16], a.lo[2 * k16 + 1], a.hi[2 * k16 + 1],
                   k16 == 0 ? b[i].x : b[i].z, k16 == 0 ? b[i].y : b[i].w);
      }
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        if (n0 + HELD >= NTA)
          b[i] = tokens_of(next, i);
        else if (n0 + HELD + i < NTA)
          b[i] = tokens_of(stage, n0 + HELD + i);
    }
    upper = decode_half_tile(tile, 0);
    stage = next;
  };
  for (int k = k_tiles; k > 0;) {  // as many steps as the loader has left in its item, then its next item
    int run = min(k, loader.left);
    const int more = k - loader.left;  // one register for what remains of the item, or of the loader's
    for (;;) {
      step(0);
      if (run == 1) {
        loader.advance(1);
        break;
      }
      step(1);
      loader.advance(2);
      if ((run -= 2) == 0) break;
    }
    k = max(more, 0);
    loader.left = max(-more, 0);
    if (loader.left == 0) loader.begin_if_ready();
  }
}

// The main loop for so many n8 tiles.
template <typename S, int NTA = loop_size<S>(1), typename... Args>
__device__ __forceinline__ void run(int token_tiles, Args&... args) {
  if constexpr (NTA < S::TOKEN_TILES)
    if (token_tiles > NTA) return run<S, loop_size<S>(NTA + 1)>(token_tiles, args...);
  main_loop<NTA>(S{}, args...);
}

// A warp's outputs of an item.
template <bool GATE_UP, typename S>
__device__ __forceinline__ void store(S, const Layer& p, const Item& item, const Part<S>& part,
                                      const float (&acc)[2][S::TOKEN_TILES][4]) {
  const Gemm& gemm = p.gemms[!GATE_UP];
  const int lane = threadIdx.x % 32, row = part.row_tile * TILE + 4 * (lane >> 2);
  if (row >= gemm.rows) return;
  const int token = part.token_tile * 8 + 2 * (lane & 3);
  const int end = min(int{item.tokens}, (part.token_tile + part.token_tiles) * 8) - token;
  const Output<GATE_UP> output(gemm, item.expert, item.begin + token, row);
#pragma unroll
  for (int n = 0; n < S::TOKEN_TILES; ++n) {
    if (n % 4 == 0 && n >= part.token_tiles) break;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      output.store(p.activation, 8 * n + c < end, 8 * n + c, acc[0][n], acc[1][n], c);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) grouped_gemms(const __grid_constant__ Layer p) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  const uint32_t smem = smem_addr(smem_bytes);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(smem_bytes + S::RING_BYTES);
  constexpr int STAGES = S::STAGES, STAGE_BYTES = S::STAGE_BYTES, TOKEN_TILES = S::TOKEN_TILES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  wait_for_previous_kernel();
  shared.tiles.prepare(p);
  // Blocks take items as they come free, from a counter, so many turns before they come: the ring runs ahead. The first
  // ones are dealt: of the second turn in reverse, for the longer ones not to come together, unless down's are among
  // them, which then find a block that has been through gate-up.
  auto ahead = [&] { return 2 + STAGES / (min(p.gemms[0].K, p.gemms[1].K) / TILE); };
  if (threadIdx.x < ahead()) {
    const int turn = threadIdx.x, blocks = gridDim.x;
    const bool reverse = turn % 2 == 1 && shared.tiles.gate_up_items(p) >= 2 * blocks;
    shared.taken[turn] = turn * blocks + (reverse ? blocks - 1 - blockIdx.x : blockIdx.x);
  }
  __syncthreads();
  Loader<S> loader(p, shared);
  uint32_t stage = 0;
  for (int turn = 0;; ++turn) {
    if (turn == loader.turn) {  // the first, or one that wasn't ready yet when its tokens were to be fetched
      const Item item = loader.next();
      if (item.expert < 0) break;
      __syncthreads();
      loader.begin_when_ready(item);
      for (int s = 0; s < STAGES; ++s) {
        loader.load_stage(smem + s * STAGE_BYTES + warp * TILE_BYTES + lane * 16,
                          smem + s * STAGE_BYTES + S::WEIGHT_BYTES + threadIdx.x * 16, 0);
        loader.advance(1);
        if (--loader.left == 0) loader.begin_if_ready();
      }
      cp_async_wait<STAGES - 1>();
      __syncthreads();
      stage = 0;
    }
    const Item& item = shared.items[turn % TURNS];
    float acc[2][TOKEN_TILES][4] = {};
    {
      const Part<S> part(item, p.gemms[item.down].rows / TILE, warp);
      int token_tile = part.token_tile, k_tiles = p.gemms[item.down].K / TILE;
      run<S>(part.token_tiles, acc, loader, smem, token_tile, k_tiles, stage);
    }
    int taken = 0;
    if (threadIdx.x == 0) taken = atomicAdd(p.taken, 1);
    const Part<S> part(item, p.gemms[item.down].rows / TILE, warp);  // again, for not to keep it in registers
    if (item.down) {
      store<false>(S{}, p, item, part, acc);
    } else {
      store<true>(S{}, p, item, part, acc);
      __syncwarp();
      if (lane == 0) add_release(p.finished + item.tile, 1);
    }
    if (threadIdx.x == 0) shared.taken[(turn + ahead()) % TURNS] = ahead() * gridDim.x + taken;
  }
}

template <typename S>
const char* launch(const Layer& p, const Device& device, cudaStream_t stream) {
  static_assert(BYTES<S> * S::BLOCKS + (S::BLOCKS - 1) * 1024 <= MAX_SHARED_BYTES && 2 + S::STAGES < TURNS);
  // Asks for so much shared memory that the next kernel's blocks, which may start early, can't squeeze in beside and
  // land unevenly (a block's first KB is the system's).
  const int bytes = std::max(BYTES<S>, std::min(MAX_SHARED_BYTES, device.shared_bytes / S::BLOCKS - 1024));
  return launch_kernel(grouped_gemms<S>, device.multiprocessors * S::BLOCKS, S::THREADS, bytes, stream,
                       {device.dependent_launch, /*cooperative=*/true}, p);
}

// The variants, in the dispatch table's order: by tokens in a tile.
using Shapes = std::tuple<Shape<4, 24, 8, 3>, Shape<4, 40, 6, 3>, Shape<4, 48, 5, 3>, Shape<4, 64, 4, 3>,
                          Shape<4, 80, 4, 3>, Shape<8, 112, 7, 1>, Shape<8, 144, 6, 1>>;

template <int VARIANT = 0, typename Do>
auto with_shape(int variant, Do&& act) {
  if constexpr (VARIANT + 1 < std::tuple_size_v<Shapes>)
    if (variant > VARIANT) return with_shape<VARIANT + 1>(variant, act);
  return act(std::tuple_element_t<VARIANT, Shapes>{});
}

}  // namespace

Footprint grouped_layer_footprint(int variant) {
  return with_shape(variant, [](auto shape) { return Footprint{shape.THREADS, BYTES<decltype(shape)>}; });
}

const char* grouped_layer_forward(const MoeArgs& args, const GroupedWorkspace& ws, int variant, const Device& device,
                                  cudaStream_t stream) {
  const Layer layer{{{args.w13, static_cast<const uint16_t*>(args.w13_bias), static_cast<const uint16_t*>(args.x),
                      ws.act, 2 * args.I, args.H},
                     {args.w2, static_cast<const uint16_t*>(args.w2_bias), ws.act, ws.y, args.H, args.I}},
                    ws.offsets,
                    ws.order,
                    ws.taken,
                    ws.finished,
                    args.local_experts,
                    activation_of(args.swiglu_oai)};
  return with_shape(variant, [&](auto shape) { return launch<decltype(shape)>(layer, device, stream); });
}

}  // namespace mxfp4_sm120
