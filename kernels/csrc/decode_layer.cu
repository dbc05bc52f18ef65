// A whole MoE layer in one launch, for few tokens: the time is the time to stream the chosen experts' weights once.
//
// A persistent grid, one block per multiprocessor. A group is up to 8 tokens of one expert, the 8 columns of a product;
// an item is 32 weight rows for one group. Each of a block's main warps owns the same slice of K of every item and
// streams it through a ring of its own; reducer warps, which take the items in turn, add the slices up, apply bias and
// activation, and write. Main warps so never wait for anything but their weights, unless a group changes.
//
// The items are dealt in four stages: gate-up of the first half of the groups, gate-up of the second, down of the first
// half, down of the second. In each stage a block owns a run of items. Between the making of activations, which are in
// many blocks' runs, and their use lies so half a GEMM, and the ring runs ahead over all seams. (One group alone has no
// second half, and its down items wait.) A warp's slice of the input, a group's tokens or their activations, stays in
// its registers for as long as the group does.
//
// Results meet in fp32 in the workspace; after a grid barrier every output is summed in slot order: same bits every
// run. A token is multiplied in a column of its own and summed over the same slices wherever it lies: its result
// depends on no other token.
#include <algorithm>

#include "dispatch.h"
#include "layer.cuh"
#include "routing.cuh"

namespace mxfp4_sm120 {
namespace {

constexpr int STAGES = 4;   // see above; the first two are gate-up
constexpr int COLUMNS = 8;  // of an m16n8k16 product
// Floats between two columns of a buffer of sums: 32 rows and 4 more, so that a quarter warp's 16-byte stores hit all
// banks.
constexpr int SUMS_PITCH = TILE + 4;

// A block's items of one stage: row tiles of a group, then of the next groups.
struct Run {
  int group, row, count;
};

struct RoutingTable {
  static constexpr int SLOTS = DECODE_MAX_TOKENS * MAX_TOP_K;
  uint32_t tokens_of[MAX_EXPERTS];  // bit t: token t chose this local expert
  int16_t choice[SLOTS];            // [token][j]: local expert or -1
  float weight[SLOTS];              // [token][j]
  // Groups, sorted by expert. There are no more of them than slots.
  uint8_t expert[SLOTS];
  uint8_t columns[SLOTS];
  uint8_t slot[SLOTS][COLUMNS];  // token * MAX_TOP_K + j
  Run runs[STAGES];
};
static_assert(DECODE_MAX_TOKENS <= 32 && RoutingTable::SLOTS <= 256);  // bits of tokens_of, values of slot

template <int WARPS, int RING, int CHUNK, int REDUCERS>
struct Layout {
  static constexpr int sums_floats = WARPS * COLUMNS * SUMS_PITCH;
  static constexpr int sums = WARPS * RING * CHUNK * TILE_BYTES;  // a buffer for each reducer
  static constexpr int bars = sums + REDUCERS * sums_floats * 4;  // one for each stage of each warp's ring
  static constexpr int routing = bars + WARPS * RING * 8;
  static constexpr int bytes = routing + static_cast<int>(sizeof(RoutingTable));
};

// Fills the table, whose tokens_of is zero, and returns the number of groups.
__device__ __forceinline__ int build_routing(const MoeArgs& args, RoutingTable& rt, int warp, int lane) {
  // For one token every warp fills the whole table with the same values, and waits for no other.
  const bool alone = args.M == 1;
  const int warps = blockDim.x / 32;
  auto sync = [&]() {
    if (alone)
      __syncwarp();
    else
      __syncthreads();
  };
  for (int token = alone ? 0 : warp; token < args.M; token += warps) {
    const Choice c = route_token(args, token, lane, /*merge=*/true);
    if (c.expert >= 0) atomicOr(&rt.tokens_of[c.expert], 1u << token);
    if (lane < MAX_TOP_K) {
      rt.choice[token * MAX_TOP_K + lane] = static_cast<int16_t>(c.expert);
      rt.weight[token * MAX_TOP_K + lane] = c.weight;
    }
  }
  sync();
  // Every warp counts the groups by itself; a thread looks for the group of one slot.
  const int slot = (alone ? 0 : warp) * 32 + lane, token = slot / MAX_TOP_K,
            expert = token < args.M ? rt.choice[slot] : -1;
  int groups = 0, group = 0;
  for (int first = 0; first < args.local_experts; first += 32) {
    const int tokens = first + lane < args.local_experts ? __popc(rt.tokens_of[first + lane]) : 0;
    int lower = groups;  // groups of lower experts than the lane's
    for (int t = 0; t < args.M; t += COLUMNS) {
      const uint32_t more = __ballot_sync(~0u, tokens > t);
      lower += __popc(more & ((1u << lane) - 1));
      groups += __popc(more);
    }
    lower = __shfl_sync(~0u, lower, expert & 31);
    if (expert >> 5 == first >> 5) group = lower;
  }
  if (expert >= 0) {
    const uint32_t tokens = rt.tokens_of[expert];
    const int place = __popc(tokens & ((1u << token) - 1)), part = place / COLUMNS;
    group += part;
    rt.expert[group] = static_cast<uint8_t>(expert);  // the same values from every slot of the group
    rt.columns[group] = static_cast<uint8_t>(min(COLUMNS, __popc(tokens) - part * COLUMNS));
    rt.slot[group][place % COLUMNS] = static_cast<uint8_t>(slot);
  }
  if (alone || warp == warps - 1) {  // one lane a stage
    const bool second_half = lane & 1, down = lane & 2;
    const int half = (groups + 1) / 2, tiles = (down ? args.H : 2 * args.I) / TILE,
              items = (second_half ? groups - half : half) * tiles, grid = gridDim.x, each = items / grid,
              longer = items - each * grid;
    // A stage's runs differ by one item at most; the longer ones go to the blocks behind those that had them last.
    int before = 0;
    for (int s = 0; s < STAGES - 1; ++s) {
      const int there = __shfl_sync(~0u, longer, s);
      if (s < lane) before += there;
    }
    int rank = static_cast<int>(blockIdx.x) - before % grid;
    if (rank < 0) rank += grid;
    const int item = rank * each + min(rank, longer), over = item / tiles;
    if (lane < STAGES) rt.runs[lane] = {(second_half ? half : 0) + over, item - over * tiles, each + (rank < longer)};
  }
  sync();
  return groups;
}

template <int WARPS, int CHUNKS, int RING, int CHUNK, int REDUCERS>
__global__ void __launch_bounds__((WARPS + REDUCERS) * 32, 1)
    decode_layer(const MoeArgs args, const DecodeWorkspace ws) {
  using L = Layout<WARPS, RING, CHUNK, REDUCERS>;
  // Named barriers between the main warps and one reducer (0 is __syncthreads).
  constexpr int SUMS_FULL = 1, SUMS_EMPTY = 1 + REDUCERS, SUMS_THREADS = (WARPS + 1) * 32;
  static_assert(L::bytes <= MAX_SHARED_BYTES && RoutingTable::SLOTS <= (WARPS + REDUCERS) * 32);
  extern __shared__ __align__(128) uint8_t smem[];
  RoutingTable& rt = *reinterpret_cast<RoutingTable*>(smem + L::routing);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;

  if (threadIdx.x < MAX_EXPERTS) rt.tokens_of[threadIdx.x] = 0;
  if (warp < WARPS && lane < RING) mbar_init(smem_addr(smem + L::bars) + (warp * RING + lane) * 8, 1);
  // A chunk's tiles behind a slice's end are multiplied too, by zeros: what lies there must be finite.
  for (int i = threadIdx.x; i < L::sums / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(smem)[i] = uint4{0, 0, 0, 0};
  mbar_init_fence();
  __syncthreads();
  wait_for_previous_kernel();
  const int groups = build_routing(args, rt, warp, lane);

  // Every warp walks the block's items by itself.
  struct Item {
    int stage, left, group, row;
    __device__ bool down() const { return stage >= STAGES / 2; }
  };
  const int gate_up_tiles = 2 * args.I / TILE, down_tiles = args.H / TILE;
  auto advance = [&](Item& item) {
    if (--item.left > 0) {
      if (++item.row == (item.down() ? down_tiles : gate_up_tiles)) {
        item.row = 0;
        ++item.group;
      }
    } else {
      while (++item.stage < STAGES && rt.runs[item.stage].count == 0) {
      }
      if (item.stage < STAGES) {
        const Run& run = rt.runs[item.stage];
        item = {item.stage, run.count, run.group, run.row};
      }
    }
  };
  auto row_tile = [&](const Item& item) {
    return static_cast<int64_t>(rt.expert[item.group]) * (item.down() ? down_tiles : gate_up_tiles) + item.row;
  };
  Item item{-1, 0, 0, 0};
  advance(item);

  if (warp < WARPS) {
    const uint32_t ring = smem_addr(smem) + warp * RING * CHUNK * TILE_BYTES,
                   bars = smem_addr(smem + L::bars) + warp * RING * 8;
    struct Slice {
      int k_tiles, first, end, chunks;  // of all K; this warp's; copies that they take
    };
    auto slice = [&](const Item& item) -> Slice {
      const int k_tiles = (item.down() ? args.I : args.H) / TILE, each = (k_tiles + WARPS - 1) / WARPS;
      return {k_tiles, warp * each, min(k_tiles, (warp + 1) * each), (each + CHUNK - 1) / CHUNK};
    };

    // ---- the ring: lane 0 walks the same chunks as the consumer below, RING ahead (sm_80: all lanes copy) ----
    Item next_item = item;
    int next_stage = 0, next_tiles = 0, next_chunks = 0;
    const uint8_t* next = nullptr;
    const uint64_t policy = evict_first();
    auto seek = [&]() {
      if (next_item.stage == STAGES) return;
      const Slice s = slice(next_item);
      next_tiles = s.end - s.first;
      next_chunks = s.chunks;
      next = (next_item.down() ? args.w2 : args.w13) + (row_tile(next_item) * s.k_tiles + s.first) * TILE_BYTES;
    };
    auto issue = [&]() {
      if (next_item.stage < STAGES) {
        const int bytes = min(CHUNK, next_tiles) * TILE_BYTES;
        const uint32_t dst = ring + next_stage * CHUNK * TILE_BYTES;
#if __CUDA_ARCH__ >= 900
        const uint32_t bar = bars + next_stage * 8;
        if (bytes > 0) {
          mbar_expect(bar, bytes);
          bulk_copy(dst, next, bytes, bar, policy);
        } else {
          mbar_arrive(bar);
        }
#else
        for (int i = lane * 16; i < bytes; i += 512)
          cp_async16(dst + i, next + i);
#endif
        next += CHUNK * TILE_BYTES;
        next_tiles -= CHUNK;
        if (--next_chunks == 0) {
          advance(next_item);
          seek();
        }
      }
      next_stage = next_stage + 1 == RING ? 0 : next_stage + 1;
#if __CUDA_ARCH__ < 900
      cp_async_commit();
#endif
    };
#if __CUDA_ARCH__ >= 900
    const bool copies = lane == 0;
#else
    const bool copies = true;
#endif
    if (copies) {
      seek();
#pragma unroll 1
      for (int s = 0; s < RING; ++s)
        issue();
    }

    // ---- the operand: of column g, 8 values at each of the slice's tiles ----
    uint4 b[CHUNKS][CHUNK];
    // The row of x, or behind those of x the row of act, that is column g.
    auto row_of = [&]() {
      // A column without a token repeats the last one; nobody reads its sums.
      const int slot = rt.slot[item.group][min(g, rt.columns[item.group] - 1)], token = slot / MAX_TOP_K;
      return item.down() ? args.M + token * args.top_k + slot % MAX_TOP_K : token;
    };
    auto fetch = [&](int row) {
      const uint16_t* const from =
          (item.down() ? ws.act + static_cast<int64_t>(row - args.M) * args.I
                       : static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(row) * args.H) +
          q * 8;
      const Slice s = slice(item);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int t = 0; t < CHUNK; ++t) {
          const int tile = s.first + c * CHUNK + t;
          b[c][t] = tile < s.end ? __ldcg(reinterpret_cast<const uint4*>(from + tile * TILE)) : uint4{0, 0, 0, 0};
        }
    };

    // Sums of the two k16 steps apart, in shorter chains, where registers suffice.
    constexpr int CHAINS = CHUNKS * CHUNK <= 9 ? 2 : 1;
    int stage = 0, parity = 0, buffer = 0, held = -1;  // held: row_of what b holds
    for (int i = 0; item.stage < STAGES; ++i) {
      const int row = row_of();
      if (__any_sync(~0u, row != held)) {
        if (item.down())  // until the group's activations are there
          while (!__all_sync(~0u, load_acquire(ws.ready + item.group) == gate_up_tiles)) {
          }
        fetch(row);
        held = row;
      }
      const int chunks = slice(item).chunks;
      float acc[CHAINS][2][4] = {};  // [k16 step][m16 tile]
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        if (c < chunks) {
#if __CUDA_ARCH__ >= 900
          mbar_wait(bars + stage * 8, parity);
#else
          cp_async_wait<RING - 1>();
          __syncwarp();
#endif
          const uint32_t chunk = ring + stage * CHUNK * TILE_BYTES;
#pragma unroll
          for (int t = 0; t < CHUNK; ++t) {
            const PackedTile tile = load_tile(chunk + t * TILE_BYTES, lane);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              const AFragments f = decode_half_tile(tile, m);
              mma_bf16(acc[0][m], f.lo[0], f.hi[0], f.lo[1], f.hi[1], b[c][t].x, b[c][t].y);
              mma_bf16(acc[CHAINS - 1][m], f.lo[2], f.hi[2], f.lo[3], f.hi[3], b[c][t].z, b[c][t].w);
            }
          }
          __syncwarp();
          if (copies) issue();
          if (++stage == RING) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
      if (i >= REDUCERS) barrier_wait(SUMS_EMPTY + buffer, SUMS_THREADS);
      float* const sums =
          reinterpret_cast<float*>(smem + L::sums) + buffer * L::sums_floats + warp * COLUMNS * SUMS_PITCH + 4 * g;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 2 * q + c;
        auto sum = [&](int m, int half) {
          const float v = acc[0][m][2 * half + c];
          return CHAINS == 1 ? v : v + acc[CHAINS - 1][m][2 * half + c];
        };
        if (column < rt.columns[item.group])
          *reinterpret_cast<float4*>(sums + column * SUMS_PITCH) = {sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)};
      }
      barrier_arrive(SUMS_FULL + buffer, SUMS_THREADS);
      buffer = buffer + 1 == REDUCERS ? 0 : buffer + 1;
      advance(item);
    }
  } else {
    // ---- reducers: each takes the items in turn, and has its own buffer ----
    const int reducer = warp - WARPS;
    const float* const sums = reinterpret_cast<const float*>(smem + L::sums) + reducer * L::sums_floats;
    int items = 0, finished = 0;  // of this block; of a group's gate-up, by this warp, since it last said so
    for (const Run& run : rt.runs)
      items += run.count;
    auto skip = [&](Item& item, int count) {
      for (int i = 0; i < count && item.stage < STAGES; ++i)
        advance(item);
    };
    skip(item, reducer);
    for (int i = reducer; i < items; i += REDUCERS) {
      const bool more = i + REDUCERS < items;
      const int columns = rt.columns[item.group];
      const int64_t bias_row = row_tile(item) * TILE;
      Item following = item;
      skip(following, REDUCERS);
      if (!item.down()) {
        const int j = lane % 16;
        float2 bias{0.f, 0.f};
        if (args.w13_bias != nullptr)
          bias = unpack_bf16x2(
              *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.w13_bias) + bias_row + 2 * j));
        barrier_wait(SUMS_FULL + reducer, SUMS_THREADS);
        for (int column = lane / 16; column < columns; column += 2) {
          float gate = 0.f, up = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            const float2 v = *reinterpret_cast<const float2*>(sums + (w * COLUMNS + column) * SUMS_PITCH + 2 * j);
            gate += v.x;
            up += v.y;
          }
          const float v = activate(gate * ACCUMULATOR_SCALE + bias.x, up * ACCUMULATOR_SCALE + bias.y, args.swiglu_oai);
          const int slot = rt.slot[item.group][column], row = slot / MAX_TOP_K * args.top_k + slot % MAX_TOP_K;
          ws.act[static_cast<int64_t>(row) * args.I + item.row * 16 + j] = __bfloat16_as_ushort(__float2bfloat16_rn(v));
        }
        if (more) barrier_arrive(SUMS_EMPTY + reducer, SUMS_THREADS);
        // One release for all of a group's items: it waits for memory's answer, which is slow while weights stream.
        ++finished;
        if (!more || following.down() || following.group != item.group) {
          __syncwarp();
          if (lane == 0) add_release(ws.ready + item.group, finished);
          finished = 0;
        }
      } else {
        const float bias = args.w2_bias == nullptr
                               ? 0.f
                               : __bfloat162float(static_cast<const __nv_bfloat16*>(args.w2_bias)[bias_row + lane]);
        barrier_wait(SUMS_FULL + reducer, SUMS_THREADS);
        for (int column = 0; column < columns; ++column) {
          float v = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w)
            v += sums[(w * COLUMNS + column) * SUMS_PITCH + lane];
          const int slot = rt.slot[item.group][column], row = slot / MAX_TOP_K * args.top_k + slot % MAX_TOP_K;
          __stcg(ws.y + static_cast<int64_t>(row) * args.H + item.row * TILE + lane,
                 (v * ACCUMULATOR_SCALE + bias) * rt.weight[slot]);
        }
        if (more) barrier_arrive(SUMS_EMPTY + reducer, SUMS_THREADS);
      }
      item = following;
    }
    __syncwarp();  // all lanes' results are written
    if (lane == 0) add_release(ws.done, 1);
  }

  // ---- when every block's results are in: add each token's slots, a warp 32 columns of one token ----
  let_next_kernel_start();
  const int blocks = gridDim.x;
  if (threadIdx.x == 0)
    while (load_acquire(ws.done) < blocks * REDUCERS) {
    }
  __syncthreads();
  // The last block past the barrier leaves the counters as it found them: zero. (Its last warp, which for one token has
  // nothing to add.)
  if (threadIdx.x == (WARPS + REDUCERS) * 32 - 1 && atomicAdd(ws.done + 1, 1) == blocks - 1) {
    for (int i = 0; i < groups; ++i)
      ws.ready[i] = 0;
    ws.done[0] = ws.done[1] = 0;
  }
  for (int tile = warp * blocks + blockIdx.x; tile < args.M * down_tiles; tile += (WARPS + REDUCERS) * blocks) {
    const int token = tile / down_tiles, h = (tile - token * down_tiles) * TILE + lane;
    float v[MAX_TOP_K], sum = 0.f;
#pragma unroll
    for (int j = 0; j < MAX_TOP_K; ++j)
      v[j] = rt.choice[token * MAX_TOP_K + j] >= 0
                 ? __ldcg(ws.y + static_cast<int64_t>(token * args.top_k + j) * args.H + h)
                 : 0.f;
#pragma unroll
    for (int j = 0; j < MAX_TOP_K; ++j)
      sum += v[j];
    static_cast<__nv_bfloat16*>(args.out)[static_cast<int64_t>(token) * args.H + h] = __float2bfloat16_rn(sum);
  }
}

template <int WARPS, int CHUNKS, int RING, int CHUNK, int REDUCERS>
const char* launch(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device, cudaStream_t stream) {
  // Cooperative, for blocks wait for each other's results: all of them must be resident.
  return launch_kernel(decode_layer<WARPS, CHUNKS, RING, CHUNK, REDUCERS>, device.multiprocessors,
                       (WARPS + REDUCERS) * 32, Layout<WARPS, RING, CHUNK, REDUCERS>::bytes, stream,
                       {device.dependent_launch, /*cooperative=*/true}, args, ws);
}

}  // namespace

// Warps x chunks x tiles of a chunk cover the longer of H and I.
constexpr int NARROW_TILES = 10 * 3 * 3, WIDE_TILES = 14 * 8 * 2;

static int k_tiles(const MoeArgs& args) { return (args.H > args.I ? args.H : args.I) / TILE; }

bool decode_layer_takes(const MoeArgs& args) { return args.M <= DECODE_MAX_TOKENS && k_tiles(args) <= WIDE_TILES; }

Footprint decode_layer_footprint() {
  return {(14 + 2) * 32, std::max({Layout<10, 4, 3, 2>::bytes, Layout<14, 3, 2, 2>::bytes})};
}

const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                 cudaStream_t stream) {
  if (k_tiles(args) <= NARROW_TILES) return launch<10, 3, 4, 3, 2>(args, ws, device, stream);
  return launch<14, 8, 3, 2, 2>(args, ws, device, stream);
}

}  // namespace mxfp4_sm120
