// SPDX-License-Identifier: Apache-2.0
// The ops' schemas, which the library and its stub share.
#pragma once
#include <torch/csrc/stable/library.h>

namespace mxfp4_sm120 {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  // Sizes come from the tensors: w13 uint8 [E, 2I/32, H/32, 544], w2 uint8 [E, H/32, I/32, 544], out bf16 [M, H].
  // Either router_logits (bf16 or fp32) or topk_ids (int32) with topk_weights (fp32).
  m.def(
      "moe(Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor? router_logits, "
      "Tensor? topk_ids, Tensor? topk_weights, Tensor? expert_map, Tensor(a!) workspace, int num_experts, int top_k, "
      "bool swiglu_oai, int config, Tensor(b!) out) -> ()");
  // logits = x . weight^T + bias for up to ROUTER_MAX_TOKENS tokens: x bf16 [M, H], weight bf16 [E, H], out bf16 [M,
  // E].
  m.def("router(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("workspace_bytes(int tokens, int hidden_size, int intermediate_size, int local_experts, int top_k) -> int");
  // The GPUs it was compiled for, as CMake writes them ("90-real 120-virtual"), or "stub".
  m.def("architectures() -> str");
  // What `config` counts, one a line: name, the most threads of its kernels' blocks, their most bytes of dynamic shared
  // memory, newline.
  m.def("launch_table() -> str");
}

}  // namespace mxfp4_sm120
