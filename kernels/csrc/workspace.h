// SPDX-License-Identifier: Apache-2.0
// What the kernels find in a call's workspace.
#pragma once
#include <cuda_runtime_api.h>

#include "moe.h"

namespace mxfp4_sm120 {

// The decode kernel's forms: with all tokens as columns, which takes 8, and with tokens gathered by expert.
constexpr int GATHERED_MAX_TOKENS = 64;
// Activations, or results, of a call's slots together, at most: as many as GPT-OSS's top-k and sizes make of so many.
constexpr int DECODE_MAX_VALUES = GATHERED_MAX_TOKENS * 4 * 2880;

// What blocks of the decode kernel hand each other says by itself whether it is there. It is complemented, and 0 is
// nothing: no number's complement is 0, for no arithmetic makes a NaN of ones only. Two bf16s are one such value.
struct DecodeExchange {
  int taken[2];  // work tiles of the tail that blocks have taken, of gate-up and of down
  int act_used;  // activations of the call
  alignas(256) uint16_t act[DECODE_MAX_VALUES];  // bf16 [M * k, I]
};
struct DecodeWorkspace {
  int* calls;                // blocks that have begun, and in the highest bit whether the number of calls is odd
  DecodeExchange* exchange;  // [2] this call's and the next one's, in turn; each call empties the other's
  uint32_t* y;               // fp32 [M * k, H], already weighted; whoever adds a value up takes it away
};

struct GroupedWorkspace {
  int* taken;     // work tiles that blocks have taken; zero between calls
  int* finished;  // [token blocks] warps that have finished gate-up; zero between calls
  int* expert;    // [M * k] local expert of each slot (token * k + j), -1 if elsewhere; of many tokens only
  float* weight;  // [M * k]
  int* offsets;   // [local_experts + 1] where each expert's slots begin in `order`
  int* order;     // [M * k] tokens of the slots sorted by expert, stable
  int* position;  // [M * k] where each slot stands in that order, -1 if elsewhere
  uint16_t* act;  // bf16 [M * k, I], in that order
  uint2* y;       // [M * k, H / 4] by pack_four, in that order
};

// Token blocks of the grouped GEMMs, at most: no full one has fewer than 8 tokens, and each expert may have a rest.
__host__ __device__ constexpr int max_token_blocks(int M, int local_experts, int top_k) {
  return M * top_k / 8 + local_experts;
}

// Cuts arrays off a run of bytes, one after the other.
struct Carver {
  uint8_t* base;
  int64_t at = 0;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return p;
  }
};

struct Workspace {
  DecodeWorkspace decode;
  GroupedWorkspace grouped;
  int64_t bytes;  // of all
};
// Cuts up the workspace at `base` for a call of M tokens.
Workspace carve(uint8_t* base, int M, int H, int I, int local_experts, int top_k);
inline Workspace carve(const MoeArgs& args) {
  return carve(args.workspace, args.M, args.H, args.I, args.local_experts, args.top_k);
}

}  // namespace mxfp4_sm120
