// A whole MoE layer in one launch, for up to 8 tokens: the time is the time to stream the chosen experts' weights once.
//
// A persistent grid, one block per multiprocessor. Work is a list of items, one item being 32 weight rows of one active
// expert: first all gate-up items, then all down items, item n to block n mod gridDim. Each warp owns the same slice of K
// of every item and streams it through a ring of its own, so there is no block-wide pipeline to stall, and the ring runs
// ahead over the seam between the two GEMMs: down-projection weights are in flight while the last activations are
// still being made. A down item waits only for its own expert's gate-up items.
//
// All tokens are the 8 columns of every active expert's product: a column whose token did not choose the expert costs
// nothing that matters here (the tensor cores idle) and is ignored afterwards. A warp's slice of the input stays in its
// registers for the whole gate-up phase.
//
// The k experts' results of a token are added in slot order by whichever warp finishes last: same bits every run.
#include "dispatch.h"
#include "layer.cuh"
#include "routing.cuh"

namespace mxfp4_sm120 {
namespace {

constexpr int MAX_TOKENS = DECODE_MAX_TOKENS;
constexpr int MAX_SLOTS = MAX_TOKENS * MAX_TOP_K;
// Floats between two tokens of a reduction buffer: 32 rows and 4 more, so that a quarter warp's 16-byte stores hit all banks.
constexpr int RED_PITCH = TILE + 4;

struct RoutingTable {
  uint32_t active_mask[MAX_EXPERTS / 32];
  int count;                            // active experts
  int expert[MAX_SLOTS];                // their local ids, ascending
  int8_t slot[MAX_SLOTS][MAX_TOKENS];   // [active expert][token] -> the token's slot j, or -1
  int choice[MAX_TOKENS][MAX_TOP_K];    // local expert or -1
  float weight[MAX_TOKENS][MAX_TOP_K];
};

template <int WARPS, int RING, int CHUNK, int BUFFERS>
struct Layout {
  static constexpr int ring_bytes = WARPS * RING * CHUNK * TILE_BYTES;
  static constexpr int red_floats = WARPS * MAX_TOKENS * RED_PITCH;
  static constexpr int bytes = ring_bytes + BUFFERS * red_floats * 4 + WARPS * RING * 8 + static_cast<int>(sizeof(RoutingTable));
};

__device__ void build_routing(const MoeArgs& args, RoutingTable& rt, int warp, int lane) {
  const int tid = warp * 32 + lane;
  if (tid < MAX_EXPERTS / 32) rt.active_mask[tid] = 0;
  for (int i = tid; i < MAX_SLOTS * MAX_TOKENS / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(rt.slot)[i] = ~0u;
  __syncthreads();
  if (warp < args.M) {
    const Choice c = route_token(args, warp, lane, /*merge=*/true);
    if (lane < MAX_TOP_K) {
      rt.choice[warp][lane] = lane < args.top_k ? c.expert : -1;
      rt.weight[warp][lane] = c.weight;
    }
    if (c.expert >= 0) atomicOr(&rt.active_mask[c.expert >> 5], 1u << (c.expert & 31));
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
#pragma unroll
    for (int i = 0; i < MAX_EXPERTS / 32; ++i) {
      const uint32_t mask = rt.active_mask[i];
      if (mask >> lane & 1) rt.expert[before + __popc(mask & ((1u << lane) - 1))] = i * 32 + lane;
      before += __popc(mask);
    }
    if (lane == 0) rt.count = before;
    for (int s = lane; s < args.M * MAX_TOP_K; s += 32) {
      const int token = s / MAX_TOP_K, e = rt.choice[token][s % MAX_TOP_K];
      if (e < 0) continue;
      int rank = __popc(rt.active_mask[e >> 5] & ((1u << (e & 31)) - 1));
      for (int i = 0; i < e >> 5; ++i) rank += __popc(rt.active_mask[i]);
      rt.slot[rank][token] = static_cast<int8_t>(s % MAX_TOP_K);
    }
  }
  __syncthreads();
}

// One GEMM as a warp sees it: the tiles of its K slice in an item.
struct Slice {
  const uint8_t* weights;
  int row_tiles, k_tiles, first, count;
};

template <int WARPS, int KPW, int RING, int CHUNK, int BUFFERS>
__global__ void __launch_bounds__(WARPS * 32, 1) decode_layer(const MoeArgs args, const DecodeWorkspace ws) {
  using L = Layout<WARPS, RING, CHUNK, BUFFERS>;
  constexpr int CHUNKS = (KPW + CHUNK - 1) / CHUNK;  // of one item, per warp
  static_assert(L::bytes <= MAX_SHARED_BYTES && WARPS >= MAX_TOKENS);
  extern __shared__ __align__(128) uint8_t smem[];
  float* const red = reinterpret_cast<float*>(smem + L::ring_bytes);
  RoutingTable& rt = *reinterpret_cast<RoutingTable*>(smem + L::ring_bytes + BUFFERS * L::red_floats * 4 + WARPS * RING * 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
  const uint32_t ring = smem_addr(smem) + warp * RING * CHUNK * TILE_BYTES;
  const uint32_t bars = smem_addr(smem + L::ring_bytes + BUFFERS * L::red_floats * 4) + warp * RING * 8;

  auto slice = [&](const uint8_t* weights, int rows, int k) {
    const int tiles = k / TILE, first = tiles * warp / WARPS;
    return Slice{weights, rows / TILE, tiles, first, tiles * (warp + 1) / WARPS - first};
  };
  const Slice gate_up = slice(args.w13, 2 * args.I, args.H), down = slice(args.w2, args.H, args.I);
  auto select = [&](bool second) {  // by value and member by member: both stay in registers
    return Slice{second ? down.weights : gate_up.weights, second ? down.row_tiles : gate_up.row_tiles,
                 second ? down.k_tiles : gate_up.k_tiles, second ? down.first : gate_up.first, second ? down.count : gate_up.count};
  };

  if (lane == 0) {
    for (int s = 0; s < RING; ++s) mbar_init(bars + s * 8, 1);
    mbar_init_fence();
  }
  __syncwarp();
  wait_for_previous_kernel();

  uint4 b[KPW];  // B operands of this warp's K slice: token g's 8 values at each tile
#pragma unroll
  for (int i = 0; i < KPW; ++i) {
    b[i] = uint4{0, 0, 0, 0};
    if (g < args.M && i < gate_up.count)
      b[i] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(g) * args.H +
                                             (gate_up.first + i) * TILE + q * 8);
  }
  build_routing(args, rt, warp, lane);
  const int gate_up_items = rt.count * gate_up.row_tiles, items = gate_up_items + rt.count * down.row_tiles;

  // ---- the ring: lane 0 walks the same chunks as the consumer below, RING ahead (sm_80: all lanes copy) ----
  int next_item = blockIdx.x, next_chunk = 0, next_stage = 0, next_count = 0;
  const uint8_t* next_tiles = nullptr;
  auto seek = [&]() {
    if (next_item >= items) return;
    const bool second = next_item >= gate_up_items;
    const Slice s = select(second);
    const int n = second ? next_item - gate_up_items : next_item, a = n / s.row_tiles;
    next_count = s.count;
    next_tiles = s.weights + ((static_cast<int64_t>(rt.expert[a]) * s.row_tiles + (n - a * s.row_tiles)) * s.k_tiles + s.first) *
                                 TILE_BYTES;
  };
  auto issue = [&]() {
    if (next_item < items) {
      const int tiles = min(CHUNK, next_count - next_chunk * CHUNK);
      const uint32_t dst = ring + next_stage * CHUNK * TILE_BYTES;
      const uint8_t* src = next_tiles + next_chunk * CHUNK * TILE_BYTES;
#if __CUDA_ARCH__ >= 900
      const uint32_t bar = bars + next_stage * 8;
      if (tiles > 0) {
        mbar_expect(bar, tiles * TILE_BYTES);
        bulk_copy(dst, src, tiles * TILE_BYTES, bar);
      } else {
        mbar_arrive(bar);
      }
#else
      for (int i = lane * 16; i < tiles * TILE_BYTES; i += 512) cp_async16(dst + i, src + i);
#endif
      if (++next_chunk == CHUNKS) {
        next_chunk = 0;
        next_item += gridDim.x;
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
    for (int s = 0; s < RING; ++s) issue();
  }

  int stage = 0, parity = 0;
  for (int item = blockIdx.x, turn = 0; item < items; item += gridDim.x, ++turn) {
    const bool second = item >= gate_up_items;
    const Slice s = select(second);
    const int n = second ? item - gate_up_items : item, a = n / s.row_tiles, row_tile = n - a * s.row_tiles;
    const int producers = (args.M + 1) / 2;  // warps that write one gate-up item's activations
    if (second) {
      const int slot = g < args.M ? rt.slot[a][g] : -1;
      if (lane == 0)
        while (load_acquire(ws.ready + a) < gate_up.row_tiles * producers) {
        }
      __syncwarp();
      const uint16_t* act = ws.act + static_cast<int64_t>(g * args.top_k + slot) * args.I + down.first * TILE + q * 8;
#pragma unroll
      for (int i = 0; i < KPW; ++i) {
        b[i] = uint4{0, 0, 0, 0};
        if (slot >= 0 && i < down.count) b[i] = __ldcg(reinterpret_cast<const uint4*>(act + i * TILE));
      }
    }

    float acc[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
#if __CUDA_ARCH__ >= 900
      mbar_wait(bars + stage * 8, parity);
#else
      cp_async_wait<RING - 1>();
      __syncwarp();
#endif
      const uint32_t chunk = ring + stage * CHUNK * TILE_BYTES;
#pragma unroll
      for (int t = 0; t < CHUNK; ++t) {
        const int i = c * CHUNK + t;
        if (i < KPW && i < s.count) {
          const PackedTile tile = load_tile(chunk + t * TILE_BYTES, lane);
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_half_tile(acc[m], decode_half_tile(tile, m), b[i < KPW ? i : 0]);
        }
      }
      __syncwarp();
      if (copies) issue();
      if (++stage == RING) {
        stage = 0;
        parity ^= 1;
      }
    }

    // ---- add the warps' K slices; where buffers alternate, one barrier an item is enough ----
    float* const buffer = red + (BUFFERS == 2 ? (turn & 1) * L::red_floats : 0);
    if (BUFFERS == 1) __syncthreads();
    float* const mine = buffer + warp * MAX_TOKENS * RED_PITCH + 4 * g;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (2 * q + c < args.M)
        *reinterpret_cast<float4*>(mine + (2 * q + c) * RED_PITCH) = {acc[0][c], acc[0][2 + c], acc[1][c], acc[1][2 + c]};
    __syncthreads();
    const int e = rt.expert[a];
    if (!second) {
      if (warp < producers) {
        const int token = warp * 2 + lane / 16, j = lane % 16;
        const int slot = token < args.M ? rt.slot[a][token] : -1;
        if (slot >= 0) {
          float gate = 0.f, up = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            const float2 v = *reinterpret_cast<const float2*>(buffer + (w * MAX_TOKENS + token) * RED_PITCH + 2 * j);
            gate += v.x;
            up += v.y;
          }
          gate *= ACCUMULATOR_SCALE;
          up *= ACCUMULATOR_SCALE;
          if (args.w13_bias != nullptr) {
            const float2 bias = unpack_bf16x2(*reinterpret_cast<const uint32_t*>(
                static_cast<const uint16_t*>(args.w13_bias) + (static_cast<int64_t>(e) * gate_up.row_tiles + row_tile) * TILE + 2 * j));
            gate += bias.x;
            up += bias.y;
          }
          const __nv_bfloat16 v = __float2bfloat16_rn(activate(gate, up, args.swiglu_oai));
          ws.act[static_cast<int64_t>(token * args.top_k + slot) * args.I + row_tile * 16 + j] = __bfloat16_as_ushort(v);
        }
        __syncwarp();
        if (lane == 0) add_release(ws.ready + a, 1);
      }
    } else if (warp < args.M) {
      const int token = warp, slot = rt.slot[a][token], row = row_tile * TILE + lane;
      if (slot >= 0) {
        float v = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) v += buffer[(w * MAX_TOKENS + token) * RED_PITCH + lane];
        v *= ACCUMULATOR_SCALE;
        if (args.w2_bias != nullptr)
          v += __bfloat162float(static_cast<const __nv_bfloat16*>(args.w2_bias)[static_cast<int64_t>(e) * args.H + row]);
        float* const y = ws.y + static_cast<int64_t>(token) * args.top_k * args.H + row;
        __stcg(y + static_cast<int64_t>(slot) * args.H, v * rt.weight[token][slot]);
        int slots = 0;
        for (int j = 0; j < args.top_k; ++j) slots += rt.choice[token][j] >= 0;
        int* const arrived = ws.arrived + row_tile * MAX_TOKENS + token;
        __syncwarp();
        int before = 0;
        if (lane == 0) before = add_acq_rel(arrived, 1);
        before = __shfl_sync(~0u, before, 0);
        __syncwarp();
        if (before == slots - 1) {
          float sum = 0.f;
          for (int j = 0; j < args.top_k; ++j)
            if (rt.choice[token][j] >= 0) sum += __ldcg(y + static_cast<int64_t>(j) * args.H);
          static_cast<__nv_bfloat16*>(args.out)[static_cast<int64_t>(token) * args.H + row] = __float2bfloat16_rn(sum);
          if (lane == 0) *arrived = 0;
        }
      }
    }
  }

  // Tokens none of whose experts live on this rank.
  for (int token = 0; token < args.M; ++token) {
    bool none = true;
    for (int j = 0; j < args.top_k; ++j) none &= rt.choice[token][j] < 0;
    if (none)
      for (int h = blockIdx.x * blockDim.x + threadIdx.x; h < args.H; h += gridDim.x * blockDim.x)
        static_cast<uint16_t*>(args.out)[static_cast<int64_t>(token) * args.H + h] = 0;
  }
  // The last block out leaves the counters as it found them: zero.
  __syncthreads();
  let_next_kernel_start();
  if (warp == 0) {
    int before = 0;
    if (lane == 0) before = add_acq_rel(ws.done, 1);
    if (__shfl_sync(~0u, before, 0) == static_cast<int>(gridDim.x) - 1) {
      for (int i = lane; i < rt.count; i += 32) ws.ready[i] = 0;
      if (lane == 0) *ws.done = 0;
    }
  }
}

template <int WARPS, int KPW, int RING, int CHUNK, int BUFFERS>
const char* launch(const MoeArgs& args, const DecodeWorkspace& ws, int multiprocessors, cudaStream_t stream) {
  auto* kernel = decode_layer<WARPS, KPW, RING, CHUNK, BUFFERS>;
  constexpr int bytes = Layout<WARPS, RING, CHUNK, BUFFERS>::bytes;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return "decode_layer: the device refuses its shared memory";
  // Blocks wait for each other's activations, so all of them must be resident: a cooperative launch guarantees it.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = multiprocessors;
  config.blockDim = WARPS * 32;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args, ws);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, int variant, int multiprocessors,
                                 cudaStream_t stream) {
  const int k_tiles = (args.H > args.I ? args.H : args.I) / TILE;
  if (variant == 0 && k_tiles <= 90) return launch<10, 9, 4, 3, 2>(args, ws, multiprocessors, stream);
  if (variant == 1 && k_tiles <= 90) return launch<15, 6, 3, 3, 1>(args, ws, multiprocessors, stream);
  if (variant == 2 && k_tiles <= 90) return launch<9, 10, 3, 5, 1>(args, ws, multiprocessors, stream);
  if (variant == 3 && k_tiles <= 90) return launch<15, 6, 4, 2, 1>(args, ws, multiprocessors, stream);
  if (k_tiles <= 224) return launch<16, 14, 4, 2, 1>(args, ws, multiprocessors, stream);
  return "decode_layer: H and I must be at most 7168";
}

}  // namespace mxfp4_sm120
