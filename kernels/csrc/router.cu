// SPDX-License-Identifier: Apache-2.0
// The router of a MoE layer for few tokens: logits[token, expert] = x[token] . weight[expert] + bias[expert].
//
// 184 KB of weights for gpt-oss-20b: a matter of latency, which a GEMM library spends on splitting K and adding it up
// in a second launch. Here a block takes one expert and a few tokens, and holds its row of weights in registers before
// the kernel that makes x has ended.
#include <cuda_bf16.h>

#include "dispatch.h"
#include "common/pack.cuh"

namespace mxfp4_sm120 {
namespace {

// 360 chunks of 16 bytes are GPT-OSS's row: one a thread.
constexpr int THREADS = 384, CHUNKS = ROUTER_MAX_HIDDEN / 8 / THREADS;
static_assert(CHUNKS * THREADS * 8 == ROUTER_MAX_HIDDEN);

__device__ __forceinline__ float dot8(uint4 a, uint4 b) {
  const uint32_t u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = unpack_bf16x2(u[i]), q = unpack_bf16x2(v[i]);
    sum += p.x * q.x + p.y * q.y;
  }
  return sum;
}

template <int TOKENS>
__global__ void __launch_bounds__(THREADS) route_tokens(const RouterArgs args) {
  __shared__ float partial[TOKENS][THREADS / 32];
  const int expert = blockIdx.x, first = blockIdx.y * TOKENS, chunks = args.H / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint4* const row = reinterpret_cast<const uint4*>(args.weight) + static_cast<int64_t>(expert) * chunks;
  uint4 w[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int at = threadIdx.x + c * THREADS;
    w[c] = at < chunks ? row[at] : uint4{0, 0, 0, 0};
  }
  wait_for_previous_kernel();
  float sum[TOKENS] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int at = threadIdx.x + c * THREADS;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      if (at < chunks && first + t < args.M)
        sum[t] += dot8(reinterpret_cast<const uint4*>(args.x)[static_cast<int64_t>(first + t) * chunks + at], w[c]);
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1)
      sum[t] += __shfl_xor_sync(~0u, sum[t], d);
    if (lane == 0) partial[t][warp] = sum[t];
  }
  __syncthreads();
  if (threadIdx.x < TOKENS && first + threadIdx.x < args.M) {
    float logit = args.bias == nullptr ? 0.f : __bfloat162float(static_cast<const __nv_bfloat16*>(args.bias)[expert]);
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i)
      logit += partial[threadIdx.x][i];
    static_cast<__nv_bfloat16*>(args.out)[static_cast<int64_t>(first + threadIdx.x) * args.experts + expert] =
        __float2bfloat16_rn(logit);
  }
  let_next_kernel_start();
}

template <int TOKENS>
const char* launch(const RouterArgs& args, bool dependent, cudaStream_t stream) {
  const dim3 grid(args.experts, (args.M + TOKENS - 1) / TOKENS);
  return launch_kernel(route_tokens<TOKENS>, grid, THREADS, 0, stream, {dependent}, args);
}

}  // namespace

const char* router_forward(const RouterArgs& args, const Device& device, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return args.M == 1 ? launch<1>(args, device.dependent_launch, on) : launch<4>(args, device.dependent_launch, on);
}

}  // namespace mxfp4_sm120
