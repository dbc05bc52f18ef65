// Around the grouped GEMMs: top-k and a stable sort of (token, choice) slots by expert before them, the weighted sum of
// each token's slots after them.
#include "dispatch.h"
#include "layer.cuh"
#include "routing.cuh"

namespace mxfp4_sm120 {
namespace {

constexpr int GROUP_THREADS = 1024;
// Up to here every block of `group_slots` routes all tokens itself (two tokens a warp), which saves a launch.
constexpr int FUSED_MAX_SLOTS = GROUP_THREADS;
constexpr int FUSED_MAX_TOKENS = 64;

__global__ void __launch_bounds__(256) route(const MoeArgs args, const GroupedWorkspace ws) {
  wait_for_previous_kernel();
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token < args.M) {
    const Choice c = route_token(args, token, lane, /*merge=*/false);
    if (lane < args.top_k) {
      ws.expert[token * args.top_k + lane] = c.expert;
      ws.weight[token * args.top_k + lane] = c.weight;
    }
  }
  let_next_kernel_start();
}

// Exclusive prefix sum over the block; `total` is the sum.
__device__ int block_scan(int v, int& total, int* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inclusive = inclusive_scan(v, lane);
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  const int w = inclusive_scan(scratch[lane], lane);
  total = __shfl_sync(~0u, w, 31);
  const int before = warp == 0 ? 0 : __shfl_sync(~0u, w, warp - 1);
  __syncthreads();
  return before + inclusive - v;
}

// Block e finds expert e's slots by itself: how many belong to lower experts says where its run begins, and a prefix
// sum over threads that own consecutive slots keeps their order. No atomics, no second pass over other blocks' results.
template <bool FUSED>
__global__ void __launch_bounds__(GROUP_THREADS) group_slots(const MoeArgs args, const GroupedWorkspace ws) {
  __shared__ int scratch[32];
  __shared__ int routed[FUSED ? FUSED_MAX_SLOTS : 1];
  wait_for_previous_kernel();
  const int slots = args.M * args.top_k, e = blockIdx.x;
  const int* experts = ws.expert;
  if (FUSED) {
    const int lane = threadIdx.x % 32;
    for (int token = threadIdx.x / 32; token < args.M; token += GROUP_THREADS / 32) {
      const Choice c = route_token(args, token, lane, /*merge=*/false);
      if (lane < args.top_k) {
        routed[token * args.top_k + lane] = c.expert;
        if (e == 0) {
          ws.expert[token * args.top_k + lane] = c.expert;
          ws.weight[token * args.top_k + lane] = c.weight;
        }
      }
    }
    __syncthreads();
    experts = routed;
  }
  const int each = (slots + GROUP_THREADS - 1) / GROUP_THREADS;
  const int begin = min(slots, static_cast<int>(threadIdx.x) * each), end = min(slots, begin + each);
  int mine = 0, lower = 0;
  for (int s = begin; s < end; ++s) {
    const unsigned v = experts[s];  // -1 is larger than every expert
    mine += v == static_cast<unsigned>(e);
    lower += v < static_cast<unsigned>(e);
  }
  int total = 0, first = 0;
  block_scan(lower, first, scratch);
  int at = first + block_scan(mine, total, scratch);
  for (int s = begin; s < end; ++s)
    if (experts[s] == e) {
      ws.position[s] = at;
      ws.order[at++] = s / args.top_k;
    }
  if (threadIdx.x == 0) {
    ws.offsets[e] = first;
    if (e == args.local_experts - 1) ws.offsets[e + 1] = first + total;
  }
  let_next_kernel_start();
}

// out[token] = weighted sum over its slots, in slot order, in fp32. One thread: 4 columns.
__global__ void __launch_bounds__(256) combine_slots(const MoeArgs args, const GroupedWorkspace ws) {
  wait_for_previous_kernel();
  if (blockIdx.x == 0 && threadIdx.x < 2) ws.taken[threadIdx.x] = 0;
  const int columns = args.H / 4;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < static_cast<int64_t>(args.M) * columns) {
    const int token = static_cast<int>(i / columns),
              column = static_cast<int>(i - static_cast<int64_t>(token) * columns) * 4;
    float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int j = 0; j < args.top_k; ++j) {
      const int64_t slot = static_cast<int64_t>(token) * args.top_k + j;
      if (ws.expert[slot] < 0) continue;
      const float weight = ws.weight[slot];
      const float4 v =
          __ldcs(reinterpret_cast<const float4*>(ws.y + static_cast<int64_t>(ws.position[slot]) * args.H + column));
      sum.x += v.x * weight;
      sum.y += v.y * weight;
      sum.z += v.z * weight;
      sum.w += v.w * weight;
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(args.out) + static_cast<int64_t>(token) * args.H + column) = {
        pack_bf16x2(sum.x, sum.y), pack_bf16x2(sum.z, sum.w)};
  }
  let_next_kernel_start();
}

}  // namespace

const char* route_and_group(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device,
                            cudaStream_t stream) {
  if (args.M <= FUSED_MAX_TOKENS && args.M * args.top_k <= FUSED_MAX_SLOTS)
    return launch_kernel(group_slots<true>, args.local_experts, GROUP_THREADS, 0, stream, {}, args, ws);
  if (const char* why = launch_kernel(route, (args.M + 7) / 8, 256, 0, stream, {}, args, ws)) return why;
  return launch_kernel(group_slots<false>, args.local_experts, GROUP_THREADS, 0, stream, {device.dependent_launch},
                       args, ws);
}

const char* combine(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(args.M) * args.H / 4;
  return launch_kernel(combine_slots, static_cast<int>((threads + 255) / 256), 256, 0, stream,
                       {device.dependent_launch}, args, ws);
}

}  // namespace mxfp4_sm120
