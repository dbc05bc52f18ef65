// SPDX-License-Identifier: Apache-2.0
// The ops of MoE layers on FP4 tensor cores, registered beside the others. Who calls them for how many tokens is
// decided in Python (vllm_mxfp4_sm120/fp4).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../layer_call.h"
#include "fp4.h"

namespace mxfp4_sm120 {
namespace {

Tensor fp4_moe_layer(const Tensor& x, const Tensor& w13, const Tensor& w2, const OptionalTensor& w13_bias,
                     const OptionalTensor& w2_bias, const OptionalTensor& router_logits, const OptionalTensor& topk_ids,
                     const OptionalTensor& topk_weights, const OptionalTensor& expert_map, int64_t num_experts,
                     int64_t top_k, bool swiglu_oai, int64_t config) {
  expect_given(x, "x");
  expect_usable(x);
  const auto& table = fp4_configurations();
  if (table.empty())
    refuse("fp4_moe_layer", " isn't in this library, expected one built for SM 12.x by nvcc 12.8 or newer");
  if (config < 0 || config >= static_cast<int64_t>(table.size()))
    refuse("config", " is ", config, ", expected 0 to ", table.size() - 1);
  const Place place(x);
  MoeArgs args = checked_layer({x, w13, w2, w13_bias, w2_bias, router_logits, topk_ids, topk_weights, expert_map},
                               place, num_experts, top_k, swiglu_oai);
  return compute_layer(args, place, table[config]);
}

std::tuple<Names, Integers, Integers, Integers, Integers> fp4_configurations_op() {
  std::tuple<Names, Integers, Integers, Integers, Integers> columns;
  auto& [names, terms, tokens, threads, shared_bytes] = columns;
  for (const Fp4Configuration& config : fp4_configurations()) {
    names.push_back(config.name);
    terms.push_back(config.terms);
    tokens.push_back(config.tokens);
    threads.push_back(config.footprint.threads);
    shared_bytes.push_back(config.footprint.shared_bytes);
  }
  return columns;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mxfp4_sm120, m) {
  // As moe_layer, with activations as FP4 terms. config: of fp4_configurations.
  m.def(
      "fp4_moe_layer(Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor? router_logits, "
      "Tensor? topk_ids, Tensor? topk_weights, Tensor? expert_map, int num_experts, int top_k, bool swiglu_oai, "
      "int config) -> Tensor");
  // The table's columns, empty where the library has no such kernels; `tokens` of a token block.
  m.def("fp4_configurations() -> (str[] names, int[] terms, int[] tokens, int[] threads, int[] shared_bytes)");
  // The GPUs that they are compiled for, as `architectures`.
  m.def("fp4_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CUDA, m) { m.impl("fp4_moe_layer", TORCH_BOX(&fp4_moe_layer)); }
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CPU, m) { m.impl("fp4_moe_layer", TORCH_BOX(&fp4_moe_layer)); }
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CompositeExplicitAutograd, m) {
  m.impl("fp4_configurations", TORCH_BOX(&fp4_configurations_op));
  m.impl("fp4_architectures", TORCH_BOX(&fp4_architectures));
}

}  // namespace mxfp4_sm120
