// SPDX-License-Identifier: Apache-2.0
// What the ops of a MoE layer share: checks of their arguments, and the launches of a call.
#pragma once
#include <algorithm>

#include "calls.h"
#include "fp4/fp4.h"
#include "runtime.h"
#include "workspaces.h"

namespace mxfp4_sm120 {

// Sizes come from x and the weights; all else must agree with them.
inline MoeArgs sizes_of(const Tensor& x, const Tensor& w2, int64_t num_experts, int64_t top_k) {
  const int64_t tokens = size_of(x, "x", 2, 0), hidden = size_of(x, "x", 2, 1);
  const int64_t local_experts = size_of(w2, "w2", 4, 0), intermediate = size_of(w2, "w2", 4, 2) * 32;
  if (num_experts < 1 || num_experts > MAX_EXPERTS)
    refuse("num_experts", " is ", num_experts, ", expected 1 to ", MAX_EXPERTS);
  if (top_k < 1 || top_k > MAX_TOP_K || top_k > num_experts)
    refuse("top_k", " is ", top_k, ", expected 1 to ", MAX_TOP_K, " and at most num_experts (", num_experts, ")");
  if (local_experts < 1 || local_experts > num_experts)
    refuse("w2", " holds ", local_experts, " experts, expected 1 to num_experts (", num_experts, ")");
  if (intermediate < 1 || intermediate > MAX_SIZE)
    refuse("w2", " has an intermediate size of ", intermediate, ", expected a multiple of 32 up to ", MAX_SIZE);
  if (hidden < 1 || hidden % 32 != 0 || hidden > MAX_SIZE)
    refuse("x", " has hidden size ", hidden, ", expected a multiple of 32 up to ", MAX_SIZE);
  if (tokens > (1 << 24)) refuse("x", " has ", tokens, " tokens, expected at most ", 1 << 24);
  MoeArgs args{};
  args.M = static_cast<int>(tokens);
  args.H = static_cast<int>(hidden);
  args.I = static_cast<int>(intermediate);
  args.num_experts = static_cast<int>(num_experts);
  args.local_experts = static_cast<int>(local_experts);
  args.top_k = static_cast<int>(top_k);
  return args;
}

// Either router_logits or topk_ids with topk_weights say where tokens go.
inline void read_routing(MoeArgs& args, const Place& place, const OptionalTensor& router_logits,
                         const OptionalTensor& topk_ids, const OptionalTensor& topk_weights,
                         const OptionalTensor& expert_map) {
  const int64_t M = args.M, E = args.num_experts, k = args.top_k;
  if (router_logits.has_value() == topk_ids.has_value())
    refuse("router_logits", " and topk_ids", router_logits ? " are both given" : " are both missing", ", expected one");
  if (topk_ids.has_value() != topk_weights.has_value())
    refuse("topk_weights", topk_weights ? " is given" : " is missing", ", expected with topk_ids and only then");
  if (router_logits) {
    const int32_t dtype = dtype_of(*router_logits);
    args.logits_fp32 = dtype == codes().float32;
    if (!args.logits_fp32 && dtype != codes().bfloat16)
      refuse("router_logits", " is ", dtype_name(router_logits->scalar_type()), ", expected bfloat16 or float32");
    args.router_logits = checked(*router_logits, "router_logits", place, dtype, {M, E}, Aligned::Element);
  } else {
    const void* ids = checked(*topk_ids, "topk_ids", place, codes().int32, {M, k}, Aligned::Element);
    const void* weights = checked(*topk_weights, "topk_weights", place, codes().float32, {M, k}, Aligned::Element);
    args.topk_ids = static_cast<const int32_t*>(ids);
    args.topk_weights = static_cast<const float*>(weights);
  }
  if (!expert_map && args.local_experts != args.num_experts)
    refuse("expert_map", " is missing, expected since only ", args.local_experts, " of ", E, " experts are here");
  args.expert_map =
      static_cast<const int32_t*>(checked(expert_map, "expert_map", place, codes().int32, {E}, Aligned::Element));
}

// The call's tokens from `begin` on.
inline MoeArgs part_of(const MoeArgs& args, int begin) {
  auto forth = [&](const void* p, int64_t bytes_per_token) -> const void* {
    return p == nullptr ? nullptr : static_cast<const uint8_t*>(p) + begin * bytes_per_token;
  };
  MoeArgs part = args;
  part.M = std::min(args.M - begin, MAX_TOKENS);
  part.x = forth(args.x, 2 * args.H);
  part.out = const_cast<void*>(forth(args.out, 2 * args.H));
  part.router_logits = forth(args.router_logits, (args.logits_fp32 ? 4 : 2) * args.num_experts);
  part.topk_ids = static_cast<const int32_t*>(forth(args.topk_ids, 4 * args.top_k));
  part.topk_weights = static_cast<const float*>(forth(args.topk_weights, 4 * args.top_k));
  return part;
}

// A layer's tensors, in the order of the ops' arguments.
struct LayerTensors {
  const Tensor &x, &w13, &w2;
  const OptionalTensor &w13_bias, &w2_bias, &router_logits, &topk_ids, &topk_weights, &expert_map;
};

// Checks all arguments of a layer.
inline MoeArgs checked_layer(const LayerTensors& t, const Place& place, int64_t num_experts, int64_t top_k,
                             bool swiglu_oai) {
  MoeArgs args = sizes_of(t.x, t.w2, num_experts, top_k);
  const int64_t M = args.M, H = args.H, I = args.I, local = args.local_experts;
  args.swiglu_oai = swiglu_oai;
  args.x = checked(t.x, "x", place, codes().bfloat16, {M, H});
  args.w13 = static_cast<const uint8_t*>(checked(t.w13, "w13", place, codes().uint8, {local, I / 16, H / 32, 544}));
  args.w2 = static_cast<const uint8_t*>(checked(t.w2, "w2", place, codes().uint8, {local, H / 32, I / 32, 544}));
  args.w13_bias = checked(t.w13_bias, "w13_bias", place, codes().bfloat16, {local, 2 * I});
  args.w2_bias = checked(t.w2_bias, "w2_bias", place, codes().bfloat16, {local, H});
  read_routing(args, place, t.router_logits, t.topk_ids, t.topk_weights, t.expert_map);
  return args;
}

// Of a call's workspace, whichever kernels take it: vLLM measures with one call, of the most tokens, how much memory it
// may give away, and calls of fewer may be for others. Asked for a power of two of tokens: then workspaces together are
// at most twice the largest (but for 6 MB in each), however the token count grows.
inline int64_t bytes_for(const MoeArgs& args, const Device& device) {
  int tokens = 1;
  while (tokens < std::min(args.M, MAX_TOKENS))
    tokens *= 2;
  const int64_t bytes = workspace_bytes(tokens, args.H, args.I, args.local_experts, args.top_k);
  if (!device.fp4) return bytes;
  return std::max(bytes, fp4_workspace_bytes(tokens, args.H, args.I, args.local_experts, args.top_k));
}

// Computes the layer with a configuration, in parts where there are many tokens.
template <typename Config>
Tensor compute_layer(MoeArgs& args, const Place& place, const Config& chosen) {
  Tensor out = new_output(place, args.M, args.H);
  if (args.M == 0) return out;
  args.out = out.data_ptr();
  const On on(place);
  void* const stream = current_stream(place.index);
  const Device& device = device_of(place.index);
  args.workspace = workspace(place.type, place.index, stream, bytes_for(args, device));
  for (int begin = 0; begin < args.M; begin += MAX_TOKENS)
    expect_launched(chosen.launch(part_of(args, begin), device, stream));
  return out;
}

}  // namespace mxfp4_sm120
