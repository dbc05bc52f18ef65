// SPDX-License-Identifier: Apache-2.0
// One MoE layer, one call: what the bindings hand to the kernels.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace mxfp4_sm120 {

constexpr int MAX_TOP_K = 8;
constexpr int MAX_EXPERTS = 256;

// The workspace's first bytes are kept from call to call: counters, and what decode's blocks exchange. Zeroed once by
// the caller.
constexpr int KEPT_BYTES = 6 * 1024 * 1024;

struct MoeArgs {              // all pointers on the current device
  const void* x;              // bf16 [M, H]
  const uint8_t* w13;         // tiled: [local_experts, 2I/32, H/32, 544] bytes
  const uint8_t* w2;          // tiled: [local_experts, H/32, I/32, 544] bytes
  const void* w13_bias;       // bf16 [local_experts, 2I] or nullptr
  const void* w2_bias;        // bf16 [local_experts, H] or nullptr
  const void* router_logits;  // bf16 or fp32 [M, num_experts], or nullptr when topk_ids is given
  bool logits_fp32;
  const int32_t* topk_ids;    // [M, top_k], global experts
  const float* topk_weights;  // [M, top_k]
  const int32_t* expert_map;  // [num_experts] -> local expert or -1; nullptr when all are local
  void* out;                  // bf16 [M, H]
  uint8_t* workspace;         // workspace_bytes(...) bytes, 256-byte aligned
  int M, H, I, num_experts, local_experts, top_k;
  bool swiglu_oai;  // else silu(gate) * up
};

// The router: few tokens at most, rows no longer than this (more are a GEMM library's business).
constexpr int ROUTER_MAX_TOKENS = 64, ROUTER_MAX_HIDDEN = 9216;

struct RouterArgs {
  const void* x;       // bf16 [M, H], H a multiple of 8
  const void* weight;  // bf16 [experts, H]
  const void* bias;    // bf16 [experts] or nullptr
  void* out;           // bf16 [M, experts]
  int M, H, experts;
};

// Enqueues it on `stream`. Returns nullptr, or a static string saying why not.
const char* router_forward(const RouterArgs& args, cudaStream_t stream);

// Bytes of workspace for up to M tokens; grows with M.
int64_t workspace_bytes(int M, int H, int I, int local_experts, int top_k);

// Enqueues the layer on `stream`. Returns nullptr, or a static string saying why not. `config` indexes the dispatch
// table (dispatch.cu); where one of the first two is asked for and can't take the call, the next one does.
const char* moe_forward(const MoeArgs& args, int config, cudaStream_t stream);

}  // namespace mxfp4_sm120
