// Between the dispatch rule and the kernels: who takes which workspace.
#pragma once
#include "moe.h"

namespace mxfp4_sm120 {

// The decode kernel's forms: with all tokens as columns, which takes 8, and with tokens gathered by expert.
constexpr int GATHERED_MAX_TOKENS = 64;
// Activations, or results, of a call's slots together, at most: as many as GPT-OSS's top-k and sizes make of so many.
constexpr int DECODE_MAX_VALUES = GATHERED_MAX_TOKENS * 4 * 2880;

// What blocks of the decode kernel hand each other says by itself whether it is there. It is complemented, and 0 is
// nothing: no number's complement is 0, for no arithmetic makes a NaN of ones only. Two bf16s are one such value.
struct DecodeExchange {
  int taken[2];                                  // items that blocks have taken, of gate-up and of down
  int act_used;                                  // activations of the call
  alignas(256) uint16_t act[DECODE_MAX_VALUES];  // bf16 [M * k, I]
};
struct DecodeWorkspace {
  int* calls;                // blocks that have begun, and in the highest bit whether the number of calls is odd
  DecodeExchange* exchange;  // [2] this call's and the next one's, in turn; each call empties the other's
  uint32_t* y;               // fp32 [M * k, H], already weighted; whoever adds a value up takes it away
};

struct GroupedWorkspace {
  int* taken;     // items that blocks have taken; zero between calls
  int* finished;  // [token tiles] warps that have finished gate-up; zero between calls
  int* expert;    // [M * k] local expert of each slot (token * k + j), -1 if elsewhere; of many tokens only
  float* weight;  // [M * k]
  int* offsets;   // [local_experts + 1] where each expert's slots begin in `order`
  int* order;     // [M * k] tokens of the slots sorted by expert, stable
  int* position;  // [M * k] where each slot stands in that order, -1 if elsewhere
  uint16_t* act;  // bf16 [M * k, I], in that order
  uint2* y;       // [M * k, H / 4] by pack_four, in that order
};

// Token tiles of the grouped GEMMs, at most: no full one has fewer than 8 tokens, and each expert may have a rest.
__host__ __device__ inline int max_token_tiles(int M, int local_experts, int top_k) {
  return M * top_k / 8 + local_experts;
}

struct Device {
  int multiprocessors;
  int shared_bytes;       // of a multiprocessor
  bool dependent_launch;  // sm_90 and newer: a kernel may start while the one before it drains
};

// What a configuration asks of the card, at most, for one block.
struct Footprint {
  int threads, shared_bytes;
};

// The current device. Returns nullptr, or why it can't be queried.
const char* current_device(Device& device);

// Each launcher returns nullptr or why it could not launch.
bool decode_layer_takes(const MoeArgs& args);
Footprint decode_layer_footprint();
const char* decode_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                 cudaStream_t stream);
bool gathered_layer_takes(const MoeArgs& args);
Footprint gathered_layer_footprint();
const char* gathered_layer_forward(const MoeArgs& args, const DecodeWorkspace& ws, const Device& device,
                                   cudaStream_t stream);
Footprint grouped_layer_footprint(int variant);
const char* grouped_layer_forward(const MoeArgs& args, const GroupedWorkspace& ws, int variant, const Device& device,
                                  cudaStream_t stream);
const char* route_and_group(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device, cudaStream_t stream);
const char* combine(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device, cudaStream_t stream);

struct LaunchOptions {
  bool dependent = false;    // may start while the kernel before it drains
  bool cooperative = false;  // all blocks are resident together, so they may wait for each other
};

template <typename... Params, typename... Args>
const char* launch_kernel(void (*kernel)(Params...), dim3 grid, int block, int shared, cudaStream_t stream,
                          LaunchOptions options, Args... args) {
  if (shared > 0 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess)
    return "the device refuses the kernel's shared memory";
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (options.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (options.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mxfp4_sm120
