#pragma once
#include <cstdint>
#include <cuda_runtime_api.h>
namespace mxfp4_sm120 {
struct MoeArgs {               // one layer, one call; all pointers on the current device
  const void* x;               // bf16 [M, H]
  const uint8_t* w13; const uint8_t* w2;   // tiled layout: [local_experts, rows/32, K/32, 544] bytes
  const void* w13_bias; const void* w2_bias; // bf16 [local_experts, 2I] / [local_experts, H] or nullptr
  const void* router_logits;   // bf16 or fp32 [M, E], or nullptr when topk_ids is given
  bool logits_fp32;
  const int32_t* topk_ids; const float* topk_weights; // [M, k] or nullptr
  const int32_t* expert_map;   // [E] or nullptr
  void* out;                   // bf16 [M, H]
  uint8_t* workspace;          // workspace_bytes(...) bytes; its first 4 KiB (counters) zeroed once by the caller and left zero by every call
  int M, H, I, num_experts, local_experts, top_k;
  bool swiglu_oai;             // else silu(gate) * up
};
// Bytes of workspace needed for up to M tokens. Monotonic in M.
int64_t workspace_bytes(int M, int H, int I, int num_experts, int local_experts, int top_k);
// Enqueues the layer on `stream`. Returns nullptr, or a static string saying why not.
const char* moe_forward(const MoeArgs& args, int config, cudaStream_t stream);  // config: index into the dispatch table, -1 = default rule
}
