// SPDX-License-Identifier: Apache-2.0
// One MoE layer, one call: what the ops hand to the kernels, and which kernels there are. No CUDA in here.
#pragma once
#include <climits>
#include <cstdint>
#include <string>
#include <vector>

namespace mxfp4_sm120 {

// What no kernel goes beyond. Lists of experts and of choices are kept in registers and shared memory of these sizes;
// rows (H or I) longer than this don't fit the decode kernel's registers.
constexpr int MAX_EXPERTS = 256, MAX_TOP_K = 8, MAX_SIZE = 7168;
// Of one launch. More are computed in parts: longer ones are no faster, and the workspace stays bounded (6 MB, and 46
// KB a token of gpt-oss-20b, 55 where FP4 kernels may answer).
constexpr int MAX_TOKENS = 8192;
// The router: few tokens at most, rows no longer than this (more are a GEMM library's business).
constexpr int ROUTER_MAX_TOKENS = 64, ROUTER_MAX_HIDDEN = 9216;

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

struct RouterArgs {
  const void* x;       // bf16 [M, H], H a multiple of 8
  const void* weight;  // bf16 [experts, H]
  const void* bias;    // bf16 [experts] or nullptr
  void* out;           // bf16 [M, experts]
  int M, H, experts;
};

struct Device {
  int multiprocessors;
  int shared_bytes;       // of a multiprocessor
  bool dependent_launch;  // sm_90 and newer: a kernel may start while the one before it drains
  bool fp4 = false;       // the library's FP4 kernels (fp4/fp4.h) are compiled for it
};

// What a configuration asks of the card, at most, for one block.
struct Footprint {
  int threads, shared_bytes;
};

// Up to what a configuration takes a call.
struct Limits {
  int tokens = MAX_TOKENS;
  int size = MAX_SIZE;   // the larger of H and I
  int values = INT_MAX;  // tokens * top_k * the larger of H and I
};

// One way to compute a layer. `launch` enqueues it on a stream (a cudaStream_t) and returns nullptr, or a static string
// saying why it can't.
struct Configuration {
  std::string name;
  Limits limits;
  Footprint footprint;
  const char* (*launch)(const MoeArgs& args, const Device& device, void* stream);
};

// The dispatch table: `config` of the ops indexes it, rules in configs/tuning name its entries.
const std::vector<Configuration>& configurations();

// Why a configuration can't take a call of so many tokens, naming the limit; empty if it can.
inline std::string why_not(const Configuration& config, int64_t tokens, int top_k, int hidden, int intermediate) {
  const int64_t size = hidden > intermediate ? hidden : intermediate, values = tokens * top_k * size;
  auto beyond = [&](const char* what, int64_t value, int limit) {
    return config.name + " takes up to " + std::to_string(limit) + " " + what + ", not " + std::to_string(value);
  };
  if (tokens > config.limits.tokens) return beyond("tokens", tokens, config.limits.tokens);
  if (size > config.limits.size)
    return beyond("as the larger of hidden and intermediate size", size, config.limits.size);
  if (values > config.limits.values) return beyond("values (tokens x top_k x size)", values, config.limits.values);
  return "";
}

// Bytes of workspace for up to M tokens; grows with M.
int64_t workspace_bytes(int M, int H, int I, int local_experts, int top_k);

// Enqueues the router's product. Returns as `launch` does.
const char* router_forward(const RouterArgs& args, const Device& device, void* stream);

}  // namespace mxfp4_sm120
