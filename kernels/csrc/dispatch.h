// Between the dispatch rule and the kernels: who takes which workspace.
#pragma once
#include "moe.h"

namespace mxfp4_sm120 {

constexpr int DECODE_MAX_TOKENS = 8;  // one n8 column tile

// Counters are zero between calls.
struct DecodeWorkspace {
  int* ready;     // [256] gate-up results finished, per active expert
  int* done;      // [1] blocks finished
  int* arrived;   // [H/32 * 8] experts added so far, per 32 rows and token
  uint16_t* act;  // bf16 [M * k, I]
  float* y;       // fp32 [M * k, H], already weighted
};

struct GroupedWorkspace {
  int* expert;      // [M * k] local expert of each slot (token * k + j), -1 if elsewhere
  float* weight;    // [M * k]
  int* offsets;     // [local_experts + 1] where each expert's slots begin in `order`
  int* order;       // [M * k] slots sorted by expert, stable
  uint16_t* act;    // bf16 [M * k, I], in `order`
  float* y;         // fp32 [M * k, H], by slot, already weighted
};

// Each returns nullptr or why it could not launch.
const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, int variant, int multiprocessors,
                                 cudaStream_t stream);
const char* route_and_group(const MoeArgs& args, const GroupedWorkspace& ws, cudaStream_t stream);
const char* grouped_layer_forward(const MoeArgs& args, const GroupedWorkspace& ws, int variant, int multiprocessors,
                                  cudaStream_t stream);
const char* combine(const MoeArgs& args, const GroupedWorkspace& ws, cudaStream_t stream);

// Launches `kernel` so that on sm_90 and newer it may start while the kernel before it drains.
template <typename... Params, typename... Args>
const char* launch_dependent(void (*kernel)(Params...), dim3 grid, int block, int shared, cudaStream_t stream, bool dependent,
                             Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mxfp4_sm120
