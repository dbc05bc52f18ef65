// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched, and what of the card that depends on.
#pragma once
#include <cuda_runtime_api.h>

namespace mxfp4_sm120 {

// SM120 gives a block 99 KB; every kernel stays within it, so that what runs on a larger card is what runs there.
constexpr int MAX_SHARED_BYTES = 99 * 1024;

struct Device {
  int multiprocessors;
  int shared_bytes;       // of a multiprocessor
  bool dependent_launch;  // sm_90 and newer: a kernel may start while the one before it drains
};

// What a configuration asks of the card, at most, for one block.
struct Footprint {
  int threads, shared_bytes;
};

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
