// Top-k over router logits then softmax over the chosen k, by one warp.
#pragma once
#include "layer.cuh"
#include "moe.h"

namespace mxfp4_sm120 {

// A float as an unsigned that sorts the same way (NaN with its sign cleared sorts above +inf, as torch.topk has it).
__device__ __forceinline__ uint32_t sortable(float f) {
  const uint32_t u = isnan(f) ? 0x7fffffffu : __float_as_uint(f);
  return (u & 0x80000000u) ? ~u : (u | 0x80000000u);
}
__device__ __forceinline__ float unsortable(uint32_t u) {
  return __uint_as_float((u & 0x80000000u) ? (u & 0x7fffffffu) : ~u);
}

// Lane j < k returns the j-th choice of `token`: local expert (-1: not on this rank) and its weight.
// Equal logits: the lower expert first. A repeated expert keeps its own slot unless `merge`: then the first one gets
// the summed weight and the others become -1.
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
    uint32_t key[MAX_EXPERTS / 32];
    const int64_t row = static_cast<int64_t>(token) * args.num_experts;
    const int words =
        (args.num_experts + 31) / 32;  // leaves the loops below early; they stay unrolled for the registers
#pragma unroll
    for (int i = 0; i < MAX_EXPERTS / 32; ++i) {
      const int e = lane + 32 * i;
      key[i] = 0;
      if (i >= words) break;
      if (e < args.num_experts) {
        const float v = args.logits_fp32
                            ? static_cast<const float*>(args.router_logits)[row + e]
                            : __bfloat162float(static_cast<const __nv_bfloat16*>(args.router_logits)[row + e]);
        key[i] = sortable(v);  // never 0: 0 is below every float
      }
    }
    float logit = 0.f, top = 0.f;
    for (int j = 0; j < k; ++j) {
      uint32_t best = 0;
#pragma unroll
      for (int i = 0; i < MAX_EXPERTS / 32; ++i) {
        if (i >= words) break;
        best = max(best, key[i]);
      }
      best = __reduce_max_sync(~0u, best);
      int chosen = MAX_EXPERTS;
#pragma unroll
      for (int i = 0; i < MAX_EXPERTS / 32; ++i) {
        if (i >= words) break;
        if (key[i] == best) chosen = min(chosen, lane + 32 * i);
      }
      chosen = __reduce_min_sync(~0u, chosen);
#pragma unroll
      for (int i = 0; i < MAX_EXPERTS / 32; ++i) {
        if (i >= words) break;
        if (lane + 32 * i == chosen) key[i] = 0;
      }
      if (j == 0) top = unsortable(best);
      if (lane == j) {
        expert = chosen;
        logit = unsortable(best);
      }
    }
    // All logits -inf, or a +inf: inf - inf is NaN, as softmax gives.
    weight = lane < k ? __expf(logit - top) : 0.f;
    float sum = weight;
#pragma unroll
    for (int d = 4; d > 0; d >>= 1)
      sum += __shfl_xor_sync(~0u, sum, d);  // k <= 8 lanes
    weight /= sum;
  }
  if (lane >= k) expert = -1;
  if (expert >= 0) {
    if (args.expert_map != nullptr) expert = expert < args.num_experts ? args.expert_map[expert] : -1;
    if (expert >= args.local_experts) expert = -1;
  }
  if (merge) {
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
