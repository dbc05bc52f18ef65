// A whole MoE layer in one launch, for up to 16 tokens: the time is the time to stream the chosen experts' weights
// once.
//
// A persistent grid, one block per multiprocessor. An item is 32 weight rows of one active expert; a block owns a run
// of gate-up items, then a run of down items. Each of its main warps owns the same slice of K of every item and streams
// it through a ring of its own; a few reducer warps add the slices up, apply bias and activation, and write. Main warps
// so never wait for anything but their weights, and the ring runs ahead over the seam between the two GEMMs:
// down-projection weights are in flight while the last activations are still being made.
//
// All tokens are columns of every active expert's product (8 or 16 of them): a column whose token did not choose the
// expert costs nothing that matters here (the tensor cores idle) and is ignored afterwards. A warp's slice of the input
// stays in its registers for as long as the expert's input does: the whole gate-up phase, and one expert of the down
// phase.
//
// Results meet in fp32 in the workspace; after a grid barrier every output is summed in slot order: same bits every
// run.
#include <algorithm>

#include "dispatch.h"
#include "layer.cuh"
#include "routing.cuh"

namespace mxfp4_sm120 {
namespace {

// Floats between two tokens of a reduction buffer: 32 rows and 4 more, so that a quarter warp's 16-byte stores hit all
// banks.
constexpr int RED_PITCH = TILE + 4;

template <int TOKENS>
struct RoutingTable {
  static constexpr int SLOTS = TOKENS * MAX_TOP_K;
  uint32_t active_mask[MAX_EXPERTS / 32];
  int count;                      // active experts
  int expert[SLOTS];              // their local ids, ascending
  int8_t slot[SLOTS][TOKENS];     // [active expert][token] -> the token's slot j, or -1
  int choice[TOKENS][MAX_TOP_K];  // local expert or -1
  float weight[TOKENS][MAX_TOP_K];
};

template <int WARPS, int RING, int CHUNK, int TOKENS>
struct Layout {
  static constexpr int red_floats = WARPS * TOKENS * RED_PITCH;
  static constexpr int red = WARPS * RING * CHUNK * TILE_BYTES;  // two buffers, so that sums and products overlap
  static constexpr int bars = red + 2 * red_floats * 4;          // one for each stage of each warp's ring
  static constexpr int routing = bars + WARPS * RING * 8;
  static constexpr int bytes = routing + static_cast<int>(sizeof(RoutingTable<TOKENS>));
};

template <int TOKENS>
__device__ __forceinline__ void build_routing(const MoeArgs& args, RoutingTable<TOKENS>& rt, int warp, int lane) {
  const int tid = warp * 32 + lane, words = (args.local_experts + 31) / 32;
  if (tid < MAX_EXPERTS / 32) rt.active_mask[tid] = 0;
  for (int i = tid; i < rt.SLOTS * TOKENS / 4; i += blockDim.x)
    reinterpret_cast<uint32_t*>(rt.slot)[i] = ~0u;
  __syncthreads();
  for (int token = warp; token < args.M; token += blockDim.x / 32) {
    const Choice c = route_token(args, token, lane, /*merge=*/true);
    if (lane < MAX_TOP_K) {
      rt.choice[token][lane] = c.expert;
      rt.weight[token][lane] = c.weight;
    }
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
  for (int s = tid; s < args.M * MAX_TOP_K; s += blockDim.x) {
    const int token = s / MAX_TOP_K, e = rt.choice[token][s % MAX_TOP_K];
    if (e < 0) continue;
    const int a = rank(e);
    rt.expert[a] = e;  // the same value from every token that chose it
    rt.slot[a][token] = static_cast<int8_t>(s % MAX_TOP_K);
  }
  if (tid == blockDim.x - 1) {
    int n = 0;
    for (int i = 0; i < words; ++i)
      n += __popc(rt.active_mask[i]);
    rt.count = n;
  }
  __syncthreads();
}

// One GEMM: its matrix, and this block's run of items (expert-major: active expert, then row tile).
struct Phase {
  const uint8_t* weights;
  int row_tiles, k_tiles, first, count;
};

// Runs differ by one item at most; `rank` says who gets the longer ones.
__device__ __forceinline__ Phase share(const uint8_t* weights, int rows, int k, int experts, int rank) {
  const int items = experts * (rows / TILE), each = items / gridDim.x, longer = items - each * gridDim.x;
  return {weights, rows / TILE, k / TILE, rank * each + min(rank, longer), each + (rank < longer)};
}

template <int WARPS, int KPW, int RING, int CHUNK, int REDUCERS, int NT>
__global__ void __launch_bounds__((WARPS + REDUCERS) * 32, 1)
    decode_layer(const MoeArgs args, const DecodeWorkspace ws) {
  constexpr int TOKENS = 8 * NT;
  using L = Layout<WARPS, RING, CHUNK, TOKENS>;
  constexpr int CHUNKS = (KPW + CHUNK - 1) / CHUNK;  // of one item, per warp
  constexpr int THREADS = (WARPS + REDUCERS) * 32;
  // Named barriers between main warps and reducers, one for each buffer (0 is __syncthreads).
  constexpr int SUMS_FULL = 1, SUMS_EMPTY = 3;
  static_assert(L::bytes <= MAX_SHARED_BYTES);
  extern __shared__ __align__(128) uint8_t smem[];
  float* const red = reinterpret_cast<float*>(smem + L::red);
  RoutingTable<TOKENS>& rt = *reinterpret_cast<RoutingTable<TOKENS>*>(smem + L::routing);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
  const int pairs = (args.M + 1) / 2,
            reducers = min(pairs, REDUCERS);  // warps that write activations, two tokens at a time

  // This warp's slice of K, in tiles, for each GEMM.
  auto slice_begin = [&](int k) { return k / TILE * warp / WARPS; };
  auto slice_end = [&](int k) { return k / TILE * (warp + 1) / WARPS; };
  uint4 b[KPW][NT];  // B operands of that slice: 8 values of token g (and g + 8) at each tile
  if (warp < WARPS) {
    const uint32_t bars = smem_addr(smem + L::bars) + warp * RING * 8;
    if (lane == 0)
      for (int s = 0; s < RING; ++s)
        mbar_init(bars + s * 8, 1);
  }
  mbar_init_fence();
  wait_for_previous_kernel();
  if (warp < WARPS) {
    const int first = slice_begin(args.H), count = slice_end(args.H) - first;
#pragma unroll
    for (int i = 0; i < KPW; ++i)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = 8 * n + g;
        b[i][n] = uint4{0, 0, 0, 0};
        if (token < args.M && i < count)
          b[i][n] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) +
                                                    static_cast<int64_t>(token) * args.H + (first + i) * TILE + q * 8);
      }
  }
  build_routing(args, rt, warp, lane);
  const Phase gate_up = share(args.w13, 2 * args.I, args.H, rt.count, blockIdx.x);
  // Blocks with a short gate-up run get the long down runs.
  const int longer = rt.count * gate_up.row_tiles % gridDim.x;
  const Phase down = share(args.w2, args.H, args.I, rt.count, (blockIdx.x + gridDim.x - longer) % gridDim.x);
  const int items = gate_up.count + down.count;

  if (warp < WARPS) {
    const uint32_t ring = smem_addr(smem) + warp * RING * CHUNK * TILE_BYTES,
                   bars = smem_addr(smem + L::bars) + warp * RING * 8;
    // ---- the ring: lane 0 walks the same chunks as the consumer below, RING ahead (sm_80: all lanes copy) ----
    int next_item = 0, next_chunk = 0, next_stage = 0, next_tiles = 0;
    const uint8_t* next = nullptr;
    auto seek = [&]() {
      if (next_item >= items) return;
      const bool second = next_item >= gate_up.count;
      const int n = second ? down.first + next_item - gate_up.count : gate_up.first + next_item;
      const int row_tiles = second ? down.row_tiles : gate_up.row_tiles,
                k_tiles = second ? down.k_tiles : gate_up.k_tiles;
      const int first = slice_begin(k_tiles * TILE), a = n / row_tiles;
      next_tiles = slice_end(k_tiles * TILE) - first;
      next = (second ? down.weights : gate_up.weights) +
             ((static_cast<int64_t>(rt.expert[a]) * row_tiles + (n - a * row_tiles)) * k_tiles + first) * TILE_BYTES;
    };
    auto issue = [&]() {
      if (next_item < items) {
        const int bytes = min(CHUNK, next_tiles - next_chunk * CHUNK) * TILE_BYTES;
        const uint32_t dst = ring + next_stage * CHUNK * TILE_BYTES;
        const uint8_t* const src = next + next_chunk * CHUNK * TILE_BYTES;
#if __CUDA_ARCH__ >= 900
        const uint32_t bar = bars + next_stage * 8;
        if (bytes > 0) {
          mbar_expect(bar, bytes);
          bulk_copy(dst, src, bytes, bar);
        } else {
          mbar_arrive(bar);
        }
#else
        for (int i = lane * 16; i < bytes; i += 512)
          cp_async16(dst + i, src + i);
#endif
        if (++next_chunk == CHUNKS) {
          next_chunk = 0;
          ++next_item;
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
      for (int s = 0; s < RING; ++s)
        issue();
    }

    int stage = 0, parity = 0, count = slice_end(args.H) - slice_begin(args.H), input_of = -1;
    for (int item = 0; item < items; ++item) {
      if (item >= gate_up.count) {
        const int a = (down.first + item - gate_up.count) / down.row_tiles;
        if (a != input_of) {  // another expert: wait for its activations, take this warp's slice of them
          input_of = a;
          const int first = slice_begin(args.I);
          count = slice_end(args.I) - first;
          if (lane == 0)
            while (load_acquire(ws.ready + a) < gate_up.row_tiles * reducers) {
            }
          __syncwarp();
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const int token = 8 * n + g, slot = token < args.M ? rt.slot[a][token] : -1;
            const uint16_t* const act =
                ws.act + static_cast<int64_t>(token * args.top_k + slot) * args.I + first * TILE + q * 8;
#pragma unroll
            for (int i = 0; i < KPW; ++i) {
              b[i][n] = uint4{0, 0, 0, 0};
              if (slot >= 0 && i < count) b[i][n] = __ldcg(reinterpret_cast<const uint4*>(act + i * TILE));
            }
          }
        }
      }
      float acc[2][2][NT][4] = {};  // [k16 step][m16 tile]: short chains instead of long ones
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
#if __CUDA_ARCH__ >= 900
        mbar_wait(bars + stage * 8, parity);
#else
        cp_async_wait<RING - 1>();
        __syncwarp();
#endif
        const uint32_t chunk = ring + stage * CHUNK * TILE_BYTES;
        auto multiply = [&](int t) {
          const PackedTile tile = load_tile(chunk + t * TILE_BYTES, lane);
          const int i = c * CHUNK + t < KPW ? c * CHUNK + t : 0;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const AFragments f = decode_half_tile(tile, m);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              mma_bf16(acc[0][m][n], f.lo[0], f.hi[0], f.lo[1], f.hi[1], b[i][n].x, b[i][n].y);
              mma_bf16(acc[1][m][n], f.lo[2], f.hi[2], f.lo[3], f.hi[3], b[i][n].z, b[i][n].w);
            }
          }
        };
        if ((c + 1) * CHUNK <= count && (c + 1) * CHUNK <= KPW) {  // no branch between its tiles: they overlap
#pragma unroll
          for (int t = 0; t < CHUNK; ++t)
            multiply(t);
        } else {
#pragma unroll
          for (int t = 0; t < CHUNK; ++t)
            if (c * CHUNK + t < KPW && c * CHUNK + t < count) multiply(t);
        }
        __syncwarp();
        if (copies) issue();
        if (++stage == RING) {
          stage = 0;
          parity ^= 1;
        }
      }
      if (item >= 2) barrier_wait(SUMS_EMPTY + (item & 1), THREADS);
      float* const mine = red + (item & 1) * L::red_floats + warp * TOKENS * RED_PITCH + 4 * g;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int token = 8 * n + 2 * q + c;
          auto sum = [&](int m, int half) { return acc[0][m][n][2 * half + c] + acc[1][m][n][2 * half + c]; };
          if (token < args.M)
            *reinterpret_cast<float4*>(mine + token * RED_PITCH) = {sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)};
        }
      barrier_arrive(SUMS_FULL + (item & 1), THREADS);
    }
  } else {
    const int reducer = warp - WARPS;
    int finished = 0;  // items of the current expert whose activations this warp has written
    for (int item = 0; item < items; ++item) {
      const bool second = item >= gate_up.count;
      const int n = second ? down.first + item - gate_up.count : gate_up.first + item;
      const int row_tiles = second ? down.row_tiles : gate_up.row_tiles, a = n / row_tiles,
                row_tile = n - a * row_tiles;
      const float* const sums = red + (item & 1) * L::red_floats;
      const int64_t bias_row = static_cast<int64_t>(rt.expert[a]) * row_tiles * TILE + row_tile * TILE;
      if (!second) {
        const int j = lane % 16;
        float2 bias{0.f, 0.f};
        if (args.w13_bias != nullptr)
          bias = unpack_bf16x2(
              *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.w13_bias) + bias_row + 2 * j));
        barrier_wait(SUMS_FULL + (item & 1), THREADS);
        for (int pair = reducer; pair < pairs; pair += REDUCERS) {
          const int token = pair * 2 + lane / 16, slot = token < args.M ? rt.slot[a][token] : -1;
          if (slot < 0) continue;
          float gate = 0.f, up = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            const float2 v = *reinterpret_cast<const float2*>(sums + (w * TOKENS + token) * RED_PITCH + 2 * j);
            gate += v.x;
            up += v.y;
          }
          const float v = activate(gate * ACCUMULATOR_SCALE + bias.x, up * ACCUMULATOR_SCALE + bias.y,
                                   activation_of(args.swiglu_oai));
          ws.act[static_cast<int64_t>(token * args.top_k + slot) * args.I + row_tile * 16 + j] =
              __bfloat16_as_ushort(__float2bfloat16_rn(v));
        }
        if (item + 2 < items) barrier_arrive(SUMS_EMPTY + (item & 1), THREADS);
        ++finished;
        if (item + 1 == gate_up.count || row_tile + 1 == row_tiles) {
          __syncwarp();
          if (lane == 0 && reducer < pairs) add_release(ws.ready + a, finished);
          finished = 0;
        }
      } else {
        const float bias = args.w2_bias == nullptr
                               ? 0.f
                               : __bfloat162float(static_cast<const __nv_bfloat16*>(args.w2_bias)[bias_row + lane]);
        barrier_wait(SUMS_FULL + (item & 1), THREADS);
        for (int token = reducer; token < args.M; token += REDUCERS) {
          const int slot = rt.slot[a][token];
          if (slot < 0) continue;
          float v = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w)
            v += sums[(w * TOKENS + token) * RED_PITCH + lane];
          __stcg(ws.y + static_cast<int64_t>(token * args.top_k + slot) * args.H + row_tile * TILE + lane,
                 (v * ACCUMULATOR_SCALE + bias) * rt.weight[token][slot]);
        }
        if (item + 2 < items) barrier_arrive(SUMS_EMPTY + (item & 1), THREADS);
      }
    }
  }

  // ---- every block's results are in: add each token's slots ----
  let_next_kernel_start();
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(ws.done, 1);
    while (load_acquire(ws.done) < static_cast<int>(gridDim.x)) {
    }
  }
  __syncthreads();
  const int outputs = args.M * args.H, each = (outputs + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each;
  for (int i = begin + threadIdx.x; i < min(outputs, begin + each); i += THREADS) {
    const int token = i / args.H, h = i - token * args.H;
    float v[MAX_TOP_K], sum = 0.f;
#pragma unroll
    for (int j = 0; j < MAX_TOP_K; ++j)
      v[j] = rt.choice[token][j] >= 0 ? __ldcg(ws.y + static_cast<int64_t>(token * args.top_k + j) * args.H + h) : 0.f;
#pragma unroll
    for (int j = 0; j < MAX_TOP_K; ++j)
      sum += v[j];
    static_cast<__nv_bfloat16*>(args.out)[i] = __float2bfloat16_rn(sum);
  }
  // The last block past the barrier leaves the counters as it found them: zero.
  if (warp == 0) {
    int before = 0;
    if (lane == 0) before = add_acq_rel(ws.done + 1, 1);
    if (__shfl_sync(~0u, before, 0) == static_cast<int>(gridDim.x) - 1) {
      for (int i = lane; i < rt.count; i += 32)
        ws.ready[i] = 0;
      if (lane < 2) ws.done[lane] = 0;
    }
  }
}

template <int WARPS, int KPW, int RING, int CHUNK, int REDUCERS, int NT>
const char* launch(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device, cudaStream_t stream) {
  // Cooperative, for blocks wait for each other's results: all of them must be resident.
  return launch_kernel(decode_layer<WARPS, KPW, RING, CHUNK, REDUCERS, NT>, device.multiprocessors,
                       (WARPS + REDUCERS) * 32, Layout<WARPS, RING, CHUNK, 8 * NT>::bytes, stream,
                       {device.dependent_launch, /*cooperative=*/true}, args, ws);
}

}  // namespace

// Warps x tiles of K each cover the longer of H and I; a wide input leaves registers for 8 tokens only.
constexpr int NARROW_TILES = 90, WIDE_TILES = 14 * 16;

static int k_tiles(const MoeArgs& args) { return (args.H > args.I ? args.H : args.I) / TILE; }

bool decode_layer_takes(const MoeArgs& args) {
  return args.M <= 8 ? k_tiles(args) <= WIDE_TILES : args.M <= DECODE_MAX_TOKENS && k_tiles(args) <= NARROW_TILES;
}

Footprint decode_layer_footprint() {
  return {(14 + 2) * 32,
          std::max({Layout<10, 3, 3, 16>::bytes, Layout<10, 4, 3, 8>::bytes, Layout<14, 3, 2, 8>::bytes})};
}

const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                 cudaStream_t stream) {
  if (args.M > 8) return launch<10, 9, 3, 3, 2, 2>(args, ws, device, stream);
  if (k_tiles(args) <= NARROW_TILES) return launch<10, 9, 4, 3, 2, 1>(args, ws, device, stream);
  return launch<14, 16, 3, 2, 2, 1>(args, ws, device, stream);
}

}  // namespace mxfp4_sm120
