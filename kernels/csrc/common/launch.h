// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched, and what of the card that depends on.
#pragma once
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

#include "../moe.h"

namespace mxfp4_sm120 {

// SM120 gives a block 99 KB; every kernel stays within it, so that what runs on a larger card is what runs there.
constexpr int MAX_SHARED_BYTES = 99 * 1024;

struct LaunchOptions {
  bool dependent = false;    // may start while the kernel before it drains
  bool cooperative = false;  // all blocks are resident together, so they may wait for each other
};

// The most shared memory that a launch of `kernel` may ask for, on the current device; told to it once.
template <typename... Params>
const char* allow_shared_memory(void (*kernel)(Params...), int shared) {
  if (shared == 0) return nullptr;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;  // by kernel and device
  int ordinal = 0;
  if (cudaGetDevice(&ordinal) != cudaSuccess) return "there is no current device";
  const std::lock_guard<std::mutex> lock(mutex);
  int& have = allowed[{reinterpret_cast<const void*>(kernel), ordinal}];
  if (have >= shared) return nullptr;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess)
    return "the device refuses the kernel's shared memory";
  have = shared;
  return nullptr;
}

template <typename... Params, typename... Args>
const char* launch_kernel(void (*kernel)(Params...), dim3 grid, int block, int shared, cudaStream_t stream,
                          LaunchOptions options, Args... args) {
  if (const char* why = allow_shared_memory(kernel, shared)) return why;
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
