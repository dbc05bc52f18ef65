// SPDX-License-Identifier: Apache-2.0
// A linear layer for few tokens, one call: what the op hands to the kernels, and which kernels there are. No CUDA here.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../moe.h"

namespace mxfp4_sm120 {

// Of one call. For more tokens a GEMM is bound by arithmetic and a library's business.
constexpr int DENSE_MAX_TOKENS = 256;
constexpr int DENSE_MAX_K = 1 << 16, DENSE_MAX_N = 1 << 20;
constexpr int DENSE_STEP = 64;   // K is a multiple of it
constexpr int DENSE_BLOCK = 32;  // INT8 weights have a scale for each so many along K

struct DenseArgs {        // all pointers on the current device, multiples of 16 but for scale (4) and bias (2)
  const void* x;          // bf16 [M, K]
  const void* weight;     // [N, K], bf16 or int8
  const uint16_t* scale;  // of int8 weights: bf16 [K / 64, N, 2], nullptr for bf16 weights
  const uint16_t* bias;   // bf16 [N] or nullptr
  uint16_t* out;          // bf16 [M, N]
  float* partial;         // `workspace_bytes` of the configuration
  int M, N, K;
};

// One way to compute it. `launch` is as of a MoE layer's Configuration.
struct DenseConfiguration {
  std::string name;
  bool int8;
  int tokens;  // that share one reading of the weights; more are taken in groups of so many
  Footprint footprint;
  // What a call needs for sums that several blocks share.
  int64_t (*workspace_bytes)(const DenseArgs& args, const Device& device);
  const char* (*launch)(const DenseArgs& args, const Device& device, void* stream);
};

// The table, for each kind of weights by tokens.
const std::vector<DenseConfiguration>& dense_configurations();

// INT8 weights, `weight` and `scale`, as bf16 [N, K] to `out`; as `launch`.
const char* dense_dequantize(const DenseArgs& args, const Device& device, void* stream);

// Why a configuration can't take a layer; empty if it can.
inline std::string why_not(const DenseConfiguration& config, bool int8) {
  if (config.int8 == int8) return "";
  return config.name + " takes " + (config.int8 ? "int8" : "bfloat16") + " weights, not " +
         (int8 ? "int8" : "bfloat16");
}

// For a caller who doesn't choose: the first that takes the layer and all tokens at once, or else the last.
inline const DenseConfiguration& first_fit(bool int8, int tokens) {
  const DenseConfiguration* chosen = nullptr;
  for (const DenseConfiguration& config : dense_configurations())
    if (config.int8 == int8 && (chosen == nullptr || chosen->tokens < tokens)) chosen = &config;
  return *chosen;
}

}  // namespace mxfp4_sm120
