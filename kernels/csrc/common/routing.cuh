// SPDX-License-Identifier: Apache-2.0
// Top-k over router logits then softmax over the chosen k, by one warp.
#pragma once
#include <cuda_bf16.h>

#include "../moe.h"

namespace mxfp4_sm120 {

// A float as an unsigned that sorts the same way (NaN with its sign cleared sorts above +inf, as torch.topk has it):
// positive ones get their sign bit set, negative ones are complemented. So -2, -1, 1, 2 are 0x3fffffff, 0x407fffff,
// 0xbf800000, 0xc0000000.
__device__ __forceinline__ uint32_t sortable(float f) {
  const uint32_t u = isnan(f) ? 0x7fffffffu : __float_as_uint(f);
  return (u & 0x80000000u) ? ~u : (u | 0x80000000u);
}
__device__ __forceinline__ float unsortable(uint32_t u) {
  return __uint_as_float((u & 0x80000000u) ? (u & 0x7fffffffu) : ~u);
}

// The j-th largest of a token's logits, in lane j < top_k; equal ones: the lower expert first. A lane looks at WORDS of
// them.
struct TopK {
  int expert = -1;
  float logit = 0.f, top = 0.f;  // and the largest
};
template <int WORDS>
__device__ __forceinline__ TopK find_top_k(const MoeArgs& args, int token, int lane) {
  const int64_t first = static_cast<int64_t>(token) * args.num_experts + lane;
  float value[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i)  // all loads together
    if (lane + 32 * i < args.num_experts)
      value[i] = args.logits_fp32
                     ? static_cast<const float*>(args.router_logits)[first + 32 * i]
                     : __bfloat162float(static_cast<const __nv_bfloat16*>(args.router_logits)[first + 32 * i]);
  uint32_t key[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i)
    key[i] = lane + 32 * i < args.num_experts ? sortable(value[i]) : 0;  // 0 is below every float
  TopK found;
#pragma unroll 1
  for (int j = 0; j < args.top_k; ++j) {
    uint32_t best = key[0];
#pragma unroll
    for (int i = 1; i < WORDS; ++i)
      best = max(best, key[i]);
    best = __reduce_max_sync(~0u, best);
    int expert = -1;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const uint32_t has = __ballot_sync(~0u, key[i] == best);
      if (expert < 0 && has != 0) expert = 32 * i + __ffs(has) - 1;
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      if (lane + 32 * i == expert) key[i] = 0;
    if (j == 0) found.top = unsortable(best);
    if (lane == j) {
      found.expert = expert;
      found.logit = unsortable(best);
    }
  }
  return found;
}

// Lane j < k returns the j-th choice of `token`: local expert (-1: not on this rank) and its weight.
// A repeated expert keeps its own slot unless `merge`: then the first one gets the summed weight and the others become
// -1.
struct Choice {
  int expert;
  float weight;
};
__device__ inline Choice route_token(const MoeArgs& args, int token, int lane, bool merge) {
  const int k = args.top_k;
  int expert = -1;
  float weight = 0.f;
  if (args.router_logits == nullptr) {
    if (lane < k) {
      expert = args.topk_ids[static_cast<int64_t>(token) * k + lane];
      weight = args.topk_weights[static_cast<int64_t>(token) * k + lane];
    }
  } else {
    const TopK found = args.num_experts <= 32    ? find_top_k<1>(args, token, lane)
                       : args.num_experts <= 128 ? find_top_k<4>(args, token, lane)
                                                 : find_top_k<MAX_EXPERTS / 32>(args, token, lane);
    expert = found.expert;
    // All logits -inf, or a +inf: inf - inf is NaN, as softmax gives.
    weight = lane < k ? __expf(found.logit - found.top) : 0.f;
    float sum = weight;
#pragma unroll
    for (int d = 4; d > 0; d >>= 1)
      sum += __shfl_xor_sync(~0u, sum, d);  // k <= 8 lanes
    weight /= sum;
  }
  if (lane >= k) expert = -1;
  // Whatever is sent: what isn't an expert's number is not here.
  if (args.expert_map != nullptr)
    expert = static_cast<unsigned>(expert) < static_cast<unsigned>(args.num_experts) ? args.expert_map[expert] : -1;
  if (static_cast<unsigned>(expert) >= static_cast<unsigned>(args.local_experts)) expert = -1;
  if (merge && (args.router_logits == nullptr || args.expert_map != nullptr)) {  // else all are different
    float sum = weight;
    bool repeated = false;
    for (int j = 0; j < k; ++j) {
      const int other = __shfl_sync(~0u, expert, j);
      const float w = __shfl_sync(~0u, weight, j);
      if (j != lane && other == expert) {
        if (j < lane)
          repeated = true;
        else
          sum += w;
      }
    }
    weight = sum;
    if (repeated) expert = -1;
  }
  return {expert, weight};
}

}  // namespace mxfp4_sm120
