// SPDX-License-Identifier: Apache-2.0
// The ops of linear layers for few tokens, registered beside those of MoE layers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../calls.h"
#include "../runtime.h"
#include "dense.h"

namespace mxfp4_sm120 {
namespace {

constexpr int64_t FIRST_FIT = -1;  // in place of a configuration

const DenseConfiguration& chosen(int64_t config, bool int8, const DenseArgs& args) {
  const auto& table = dense_configurations();
  if (config == FIRST_FIT) return first_fit(int8, args.M);
  if (config < 0 || config >= static_cast<int64_t>(table.size()))
    refuse("config", " is ", config, ", expected 0 to ", table.size() - 1, ", or ", FIRST_FIT,
           " for the first that fits");
  const std::string why = why_not(table[config], int8);
  if (!why.empty()) refuse("config", " is ", config, ", expected another: ", why);
  return table[config];
}

Tensor dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
                    int64_t config) {
  expect_given(x, "x");
  expect_usable(x);
  const Place place(x);
  const int64_t M = size_of(x, "x", 2, 0), K = size_of(x, "x", 2, 1), N = size_of(weight, "weight", 2, 0);
  if (M > DENSE_MAX_TOKENS) refuse("x", " has ", M, " tokens, expected at most ", DENSE_MAX_TOKENS);
  if (K < DENSE_STEP || K % DENSE_STEP != 0 || K > DENSE_MAX_K)
    refuse("x", " has ", K, " columns, expected a multiple of ", DENSE_STEP, " up to ", DENSE_MAX_K);
  if (N < 1 || N > DENSE_MAX_N) refuse("weight", " has ", N, " rows, expected 1 to ", DENSE_MAX_N);
  const int32_t dtype = dtype_of(weight);
  const bool int8 = dtype == codes().int8;
  if (!int8 && dtype != codes().bfloat16)
    refuse("weight", " is ", dtype_name(weight.scalar_type()), ", expected bfloat16 or int8");
  if (int8 != scale.has_value())
    refuse("scale", int8 ? " is missing" : " is given", ", expected with int8 weights and only then");
  DenseArgs args{};
  args.M = static_cast<int>(M);
  args.N = static_cast<int>(N);
  args.K = static_cast<int>(K);
  args.x = checked(x, "x", place, codes().bfloat16, {M, K});
  args.weight = checked(weight, "weight", place, dtype, {N, K});
  args.scale = static_cast<const uint16_t*>(
      checked(scale, "scale", place, codes().bfloat16, {K / DENSE_STEP, N, 2}, Aligned::Word));
  args.bias = static_cast<const uint16_t*>(checked(bias, "bias", place, codes().bfloat16, {N}, Aligned::Element));
  const DenseConfiguration& kernel = chosen(config, int8, args);
  Tensor out = new_output(place, M, N);
  if (M == 0) return out;
  args.out = static_cast<uint16_t*>(out.data_ptr());
  const On on(place);
  const Device& device = device_of(place.index);
  // From torch's allocator, which gives it to the next on this stream, in a CUDA graph's pool, too.
  const int64_t bytes = kernel.workspace_bytes(args, device);
  std::optional<Tensor> workspace;
  if (bytes > 0) {
    workspace = new_output(place, 1, (bytes + 1) / 2);
    args.partial = static_cast<float*>(workspace->data_ptr());
  }
  expect_launched(kernel.launch(args, device, current_stream(place.index)));
  return out;
}

Tensor dense_dequantize_op(const Tensor& weight, const Tensor& scale) {
  expect_given(weight, "weight");
  expect_usable(weight);
  const Place place(weight);
  const int64_t N = size_of(weight, "weight", 2, 0), K = size_of(weight, "weight", 2, 1);
  if (K < DENSE_BLOCK || K % DENSE_BLOCK != 0 || K > DENSE_MAX_K)
    refuse("weight", " has ", K, " columns, expected a multiple of ", DENSE_BLOCK, " up to ", DENSE_MAX_K);
  if (N < 1 || N > DENSE_MAX_N) refuse("weight", " has ", N, " rows, expected 1 to ", DENSE_MAX_N);
  DenseArgs args{};
  args.N = static_cast<int>(N);
  args.K = static_cast<int>(K);
  args.weight = checked(weight, "weight", place, codes().int8, {N, K});
  args.scale = static_cast<const uint16_t*>(
      checked(scale, "scale", place, codes().bfloat16, {(K + DENSE_STEP - 1) / DENSE_STEP, N, 2}, Aligned::Word));
  Tensor out = new_output(place, N, K);
  args.out = static_cast<uint16_t*>(out.data_ptr());
  const On on(place);
  expect_launched(dense_dequantize(args, device_of(place.index), current_stream(place.index)));
  return out;
}

std::tuple<Names, Integers, Integers, Integers, Integers> dense_configurations_op() {
  std::tuple<Names, Integers, Integers, Integers, Integers> columns;
  auto& [names, int8, tokens, threads, shared_bytes] = columns;
  for (const DenseConfiguration& config : dense_configurations()) {
    names.push_back(config.name);
    int8.push_back(config.int8);
    tokens.push_back(config.tokens);
    threads.push_back(config.footprint.threads);
    shared_bytes.push_back(config.footprint.shared_bytes);
  }
  return columns;
}

std::tuple<int64_t, int64_t> dense_limits() { return {DENSE_MAX_TOKENS, DENSE_STEP}; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mxfp4_sm120, m) {
  // x . weight^T + bias: x bf16 [M, K], weight bf16 [N, K], or int8 with scale bf16 [K / 64, N, 2]; bias bf16 [N] ->
  // bf16 [M, N]. By a configuration's `tokens` at a time, each group of which reads the weights anew. `config` is a
  // place in the table, or -1.
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int config=-1) -> Tensor");
  // weight int8 [N, K], scale bf16 [K / 64, N, 2] -> bf16 [N, K], each product rounded once.
  m.def("dense_dequantize(Tensor weight, Tensor scale) -> Tensor");
  // The table's columns, as of `configurations`; `tokens` share one reading of the weights.
  m.def("dense_configurations() -> (str[] names, int[] int8, int[] tokens, int[] threads, int[] shared_bytes)");
  // Of one call: how many tokens at most, and what K is a multiple of.
  m.def("dense_limits() -> (int tokens, int k_multiple)");
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CUDA, m) {
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("dense_dequantize", TORCH_BOX(&dense_dequantize_op));
}
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CPU, m) {
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("dense_dequantize", TORCH_BOX(&dense_dequantize_op));
}
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CompositeExplicitAutograd, m) {
  m.impl("dense_configurations", TORCH_BOX(&dense_configurations_op));
  m.impl("dense_limits", TORCH_BOX(&dense_limits));
}

}  // namespace mxfp4_sm120
