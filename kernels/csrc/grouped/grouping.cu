// SPDX-License-Identifier: Apache-2.0
// Around the grouped GEMMs: top-k and a stable sort of (token, choice) slots by expert before them, the weighted sum of
// each token's slots after them.
#include <algorithm>

#include "../common/pack.cuh"
#include "../common/routing.cuh"
#include "../dispatch.h"

namespace mxfp4_sm120 {
namespace {

// All of these kernels let the next one start as soon as they have waited themselves: its blocks find room as these
// leave, and it waits for all that these write.

constexpr int GROUP_WARPS = 32;
// Up to here every block of `group_slots` routes all tokens itself (two tokens a warp), which saves a launch.
constexpr int FUSED_MAX_TOKENS = 64;
// Shared memory that small launches ask for without using it: of an H100's, one block of theirs then fits beside the
// GEMMs' two, so that they start early and spread over many multiprocessors instead of filling the first to come free.
constexpr int SPREAD_BYTES = 16 * 1024;

// A token's choices; their weights too, if wanted.
__device__ __forceinline__ void route_into(int* experts, float* weights, const MoeArgs& args, int token, int lane) {
  const Choice c = route_token(args, token, lane, /*merge=*/false);
  if (lane >= args.top_k) return;
  experts[token * args.top_k + lane] = c.expert;
  if (weights != nullptr) weights[token * args.top_k + lane] = c.weight;
}

__global__ void __launch_bounds__(256) route(const MoeArgs args, const GroupedWorkspace ws) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token < args.M) route_into(ws.expert, ws.weight, args, token, lane);
}

// All tokens, by a whole block.
__device__ __forceinline__ void route_all(int* experts, float* weights, const MoeArgs& args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int token = warp; token < args.M; token += warps)
    route_into(experts, weights, args, token, lane);
  __syncthreads();
}

constexpr int NO_SLOT = -2;  // -1 is a slot whose expert is elsewhere

// Block e finds expert e's slots by itself: how many belong to lower experts says where its run begins. A warp owns
// consecutive slots, and ballots keep their order. No atomics, no second pass over other blocks' results.
template <bool FUSED>
__global__ void __launch_bounds__(32 * GROUP_WARPS) group_slots(const MoeArgs args, const GroupedWorkspace ws) {
  __shared__ int mine_of[GROUP_WARPS], lower_of[GROUP_WARPS];
  __shared__ int routed[FUSED ? FUSED_MAX_TOKENS * MAX_TOP_K : 1];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int e = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (FUSED) route_all(routed, e == 0 ? ws.weight : nullptr, args);
  const int* const expert_of = FUSED ? routed : ws.expert;
  const int slots = args.M * args.top_k, each = (slots + 32 * warps - 1) / (32 * warps) * 32;  // of a warp
  const int begin = min(slots, warp * each), end = min(slots, begin + each);
  constexpr int AT_ONCE = FUSED ? 1 : 8;  // loads under way together
  int experts[AT_ONCE];                   // of this warp's next slots; NO_SLOT past its last
  auto load = [&](int s) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      experts[i] = s + 32 * i + lane < end ? expert_of[s + 32 * i + lane] : NO_SLOT;
  };
  int mine = 0, lower = 0;
  for (int s = begin; s < end; s += 32 * AT_ONCE) {
    load(s);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      mine += experts[i] == e;
      lower += static_cast<unsigned>(experts[i]) < static_cast<unsigned>(e);  // below 0 is larger than every expert
    }
  }
  mine = __reduce_add_sync(~0u, mine);
  lower = __reduce_add_sync(~0u, lower);
  if (lane == 0) {
    mine_of[warp] = mine;
    lower_of[warp] = lower;
  }
  __syncthreads();
  const int first = __reduce_add_sync(~0u, lane < warps ? lower_of[lane] : 0);
  int at = first + __reduce_add_sync(~0u, lane < warp ? mine_of[lane] : 0);
  for (int s0 = begin; s0 < end; s0 += 32 * AT_ONCE) {
    load(s0);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int s = s0 + 32 * i + lane;
      const unsigned here = __ballot_sync(~0u, experts[i] == e);
      if (experts[i] == e) {
        const int to = at + __popc(here & ((1u << lane) - 1));
        ws.position[s] = to;
        ws.order[to] = s / args.top_k;
      } else if (e == 0 && experts[i] == -1) {
        ws.position[s] = -1;
      }
      at += __popc(here);
    }
  }
  if (threadIdx.x == blockDim.x - 1) {
    ws.offsets[e] = first;
    if (e == args.local_experts - 1) ws.offsets[e + 1] = at;
  }
}

// out[token] = weighted sum over its slots, in slot order, in fp32. One thread: COLUMNS.
constexpr int COLUMNS = 8;

__global__ void __launch_bounds__(256) combine_slots(const MoeArgs args, const GroupedWorkspace ws) {
  const unsigned pieces = args.H / COLUMNS, i = blockIdx.x * blockDim.x + threadIdx.x, token = i / pieces;
  const unsigned piece = i - token * pieces;
  const int64_t slot = static_cast<int64_t>(token) * args.top_k;
  constexpr int AT_ONCE = 4;  // slots whose loads are under way together
  int position[AT_ONCE];
  float weight[AT_ONCE];
  auto find = [&](int j0) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const bool exists = static_cast<int>(token) < args.M && j0 + j < args.top_k;
      position[j] = exists ? __ldcg(ws.position + slot + j0 + j) : -1;
      weight[j] = exists ? __ldcg(ws.weight + slot + j0 + j) : 0.f;
    }
  };
  find(0);  // the GEMMs, which have started, found these finished
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (i == 0) *ws.taken = 0;
  for (int tile = i; tile < max_token_blocks(args.M, args.local_experts, args.top_k); tile += gridDim.x * blockDim.x)
    ws.finished[tile] = 0;
  if (token >= args.M) return;
  const uint4* const y = reinterpret_cast<const uint4*>(ws.y) + piece;
  float4 lo{0.f, 0.f, 0.f, 0.f}, hi = lo;
  for (int j0 = 0; j0 < args.top_k; j0 += AT_ONCE) {
    if (j0 > 0) find(j0);
    uint4 v[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      if (position[j] >= 0) v[j] = __ldcs(y + static_cast<int64_t>(position[j]) * pieces);
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      if (position[j] >= 0) {
        add_four(lo, {v[j].x, v[j].y}, weight[j]);
        add_four(hi, {v[j].z, v[j].w}, weight[j]);
      }
  }
  static_cast<uint4*>(args.out)[static_cast<int64_t>(token) * pieces + piece] = {
      pack_bf16x2(lo.x, lo.y), pack_bf16x2(lo.z, lo.w), pack_bf16x2(hi.x, hi.y), pack_bf16x2(hi.z, hi.w)};
}

}  // namespace

const char* route_and_group(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device,
                            cudaStream_t stream) {
  const LaunchOptions options{device.dependent_launch};
  if (args.M <= FUSED_MAX_TOKENS)
    return launch_kernel(group_slots<true>, args.local_experts, 32 * std::min(args.M, GROUP_WARPS), SPREAD_BYTES,
                         stream, options, args, ws);
  if (const char* why = launch_kernel(route, (args.M + 7) / 8, 256, 0, stream, options, args, ws)) return why;
  return launch_kernel(group_slots<false>, args.local_experts, 32 * GROUP_WARPS, 0, stream, options, args, ws);
}

const char* combine(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(args.M) * args.H / COLUMNS;
  const int blocks = static_cast<int>((threads + 255) / 256);
  const int shared = blocks <= 2 * device.multiprocessors ? SPREAD_BYTES : 0;
  return launch_kernel(combine_slots, blocks, 256, shared, stream, {device.dependent_launch}, args, ws);
}

}  // namespace mxfp4_sm120
