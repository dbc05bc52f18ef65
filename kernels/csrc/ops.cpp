// SPDX-License-Identifier: Apache-2.0
// The library's ops, on torch's stable ABI: one binary for every torch from 2.11 and every Python. Every argument is
// checked here, by name, before a kernel sees a pointer.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "layer_call.h"
#include "rules.h"

namespace mxfp4_sm120 {
namespace {

Tensor moe_layer(const Tensor& x, const Tensor& w13, const Tensor& w2, const OptionalTensor& w13_bias,
                 const OptionalTensor& w2_bias, const OptionalTensor& router_logits, const OptionalTensor& topk_ids,
                 const OptionalTensor& topk_weights, const OptionalTensor& expert_map, int64_t num_experts,
                 int64_t top_k, bool swiglu_oai, int64_t config) {
  expect_given(x, "x");
  expect_usable(x);
  const Place place(x);
  MoeArgs args = checked_layer({x, w13, w2, w13_bias, w2_bias, router_logits, topk_ids, topk_weights, expert_map},
                               place, num_experts, top_k, swiglu_oai);
  const Configuration& chosen = config == -1 ? choose(place.index, args) : configuration(config, args);
  return compute_layer(args, place, chosen);
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
