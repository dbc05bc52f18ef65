// SPDX-License-Identifier: Apache-2.0
// The library's ops, on torch's stable ABI: one binary for every torch from 2.11 and every Python. Every argument is
// checked here, by name, before a kernel sees a pointer.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "calls.h"
#include "rules.h"
#include "runtime.h"
#include "workspaces.h"

namespace mxfp4_sm120 {
namespace {

// Sizes come from x and the weights; all else must agree with them.
MoeArgs sizes_of(const Tensor& x, const Tensor& w2, int64_t num_experts, int64_t top_k) {
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
void read_routing(MoeArgs& args, const Place& place, const OptionalTensor& router_logits,
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
MoeArgs part_of(const MoeArgs& args, int begin) {
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

// What one token needs at least, and for a power of two of tokens: then workspaces together are at most twice the
// largest (but for 6 MB in each), however the token count grows.
int64_t workspace_bytes_for(const MoeArgs& args) {
  int tokens = 1;
  while (tokens < std::min(args.M, MAX_TOKENS))
    tokens *= 2;
  return workspace_bytes(tokens, args.H, args.I, args.local_experts, args.top_k);
}

Tensor moe_layer(const Tensor& x, const Tensor& w13, const Tensor& w2, const OptionalTensor& w13_bias,
                 const OptionalTensor& w2_bias, const OptionalTensor& router_logits, const OptionalTensor& topk_ids,
                 const OptionalTensor& topk_weights, const OptionalTensor& expert_map, int64_t num_experts,
                 int64_t top_k, bool swiglu_oai, int64_t config) {
  expect_given(x, "x");
  expect_usable(x);
  const Place place(x);
  MoeArgs args = sizes_of(x, w2, num_experts, top_k);
  const int64_t M = args.M, H = args.H, I = args.I, local = args.local_experts;
  args.swiglu_oai = swiglu_oai;
  args.x = checked(x, "x", place, codes().bfloat16, {M, H});
  args.w13 = static_cast<const uint8_t*>(checked(w13, "w13", place, codes().uint8, {local, I / 16, H / 32, 544}));
  args.w2 = static_cast<const uint8_t*>(checked(w2, "w2", place, codes().uint8, {local, H / 32, I / 32, 544}));
  args.w13_bias = checked(w13_bias, "w13_bias", place, codes().bfloat16, {local, 2 * I});
  args.w2_bias = checked(w2_bias, "w2_bias", place, codes().bfloat16, {local, H});
  read_routing(args, place, router_logits, topk_ids, topk_weights, expert_map);
  const Configuration& chosen = config == -1 ? choose(place.index, args) : configuration(config, args);

  Tensor out = new_output(place, M, H);
  if (M == 0) return out;
  args.out = out.data_ptr();
  const On on(place);
  void* const stream = current_stream(place.index);
  args.workspace = workspace(place.type, place.index, stream, workspace_bytes_for(args));
  for (int begin = 0; begin < args.M; begin += MAX_TOKENS)
    expect_launched(chosen.launch(part_of(args, begin), device_of(place.index), stream));
  return out;
}

Tensor router_logits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  expect_given(x, "x");
  expect_usable(x);
  const Place place(x);
  const int64_t tokens = size_of(x, "x", 2, 0), hidden = size_of(x, "x", 2, 1);
  const int64_t experts = size_of(weight, "weight", 2, 0);
  if (tokens > ROUTER_MAX_TOKENS) {  // a GEMM library's business
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  if (hidden % 8 != 0 || hidden > ROUTER_MAX_HIDDEN)
    refuse("x", " has hidden size ", hidden, ", expected a multiple of 8 up to ", ROUTER_MAX_HIDDEN);
  RouterArgs args{};
  args.M = static_cast<int>(tokens);
  args.H = static_cast<int>(hidden);
  args.experts = static_cast<int>(experts);
  args.x = checked(x, "x", place, codes().bfloat16, {tokens, hidden});
  args.weight = checked(weight, "weight", place, codes().bfloat16, {experts, hidden});
  args.bias = checked(bias, "bias", place, codes().bfloat16, {experts}, Aligned::Element);
  Tensor out = new_output(place, tokens, experts);
  if (tokens == 0 || experts == 0) return out;
  args.out = out.data_ptr();
  const On on(place);
  expect_launched(router_forward(args, device_of(place.index), current_stream(place.index)));
  return out;
}

int in_range(int64_t value, const char* name, int least, int most) {
  if (value < least || value > most) refuse(name, " is ", value, ", expected ", least, " to ", most);
  return static_cast<int>(value);
}

int64_t workspace_bytes_op(int64_t tokens, int64_t hidden_size, int64_t intermediate_size, int64_t local_experts,
                           int64_t top_k) {
  return workspace_bytes(in_range(tokens, "tokens", 0, MAX_TOKENS), in_range(hidden_size, "hidden_size", 1, MAX_SIZE),
                         in_range(intermediate_size, "intermediate_size", 1, MAX_SIZE),
                         in_range(local_experts, "local_experts", 1, MAX_EXPERTS),
                         in_range(top_k, "top_k", 1, MAX_TOP_K));
}

using Names = std::vector<std::string>;
using Integers = std::vector<int64_t>;

// By field, each in the table's order.
std::tuple<Names, Integers, Integers, Integers, Integers, Integers> configurations_op() {
  std::tuple<Names, Integers, Integers, Integers, Integers, Integers> columns;
  auto& [names, tokens, sizes, values, threads, shared_bytes] = columns;
  for (const Configuration& config : configurations()) {
    names.push_back(config.name);
    tokens.push_back(config.limits.tokens);
    sizes.push_back(config.limits.size);
    values.push_back(config.limits.values);
    threads.push_back(config.footprint.threads);
    shared_bytes.push_back(config.footprint.shared_bytes);
  }
  return columns;
}

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> limits() {
  return {MAX_EXPERTS, MAX_TOP_K, MAX_SIZE, MAX_TOKENS, ROUTER_MAX_TOKENS};
}

void set_rule_op(int64_t device, Integers configs, std::vector<double> tokens, std::vector<double> tokens_per_expert) {
  STD_TORCH_CHECK(configs.size() == tokens.size() && tokens.size() == tokens_per_expert.size(),
                  "mxfp4_sm120: a rule's lists have ", configs.size(), ", ", tokens.size(), " and ",
                  tokens_per_expert.size(), " entries, expected as many in each");
  std::vector<Bound> rule;
  for (size_t i = 0; i < configs.size(); ++i)
    rule.push_back({static_cast<int>(configs[i]), tokens[i], tokens_per_expert[i]});
  set_rule(static_cast<int32_t>(device), std::move(rule));
}

}  // namespace

STABLE_TORCH_LIBRARY(mxfp4_sm120, m) {
  // x bf16 [M, H]; sizes come from the tensors: w13 uint8 [E, 2I/32, H/32, 544], w2 uint8 [E, H/32, I/32, 544]. Either
  // router_logits (bf16 or fp32) or topk_ids (int32) with topk_weights (fp32). config: of the table, -1 by the rule.
  m.def(
      "moe_layer(Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor? router_logits, "
      "Tensor? topk_ids, Tensor? topk_weights, Tensor? expert_map, int num_experts, int top_k, bool swiglu_oai, "
      "int config) -> Tensor");
  // x . weight^T + bias: x bf16 [M, H], weight bf16 [E, H], bias bf16 [E] -> bf16 [M, E].
  m.def("router_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("workspace_bytes(int tokens, int hidden_size, int intermediate_size, int local_experts, int top_k) -> int");
  m.def("architectures() -> str");
  // The dispatch table's columns: limits, and what a block of the kernels asks for, at most.
  m.def("configurations() -> (str[] names, int[] tokens, int[] size, int[] values, int[] threads, int[] shared_bytes)");
  m.def("limits() -> (int experts, int top_k, int size, int tokens, int router_tokens)");
  // The first line that holds is taken: configurations, each for up to so many tokens, and so many an expert.
  m.def("set_rule(int device, int[] configs, float[] tokens, float[] tokens_per_expert) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CUDA, m) {
  m.impl("moe_layer", TORCH_BOX(&moe_layer));
  m.impl("router_logits", TORCH_BOX(&router_logits));
}
// The same checks, the first of which says what is missing.
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CPU, m) {
  m.impl("moe_layer", TORCH_BOX(&moe_layer));
  m.impl("router_logits", TORCH_BOX(&router_logits));
}

// No tensor among their arguments to choose by.
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CompositeExplicitAutograd, m) {
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes_op));
  m.impl("architectures", TORCH_BOX(&architectures));
  m.impl("configurations", TORCH_BOX(&configurations_op));
  m.impl("limits", TORCH_BOX(&limits));
  m.impl("set_rule", TORCH_BOX(&set_rule_op));
}

}  // namespace mxfp4_sm120
