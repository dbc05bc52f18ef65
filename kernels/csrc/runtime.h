// SPDX-License-Identifier: Apache-2.0
// What the ops need of CUDA, in two versions: cuda.cpp, and stub.cpp for machines without it.
#pragma once
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "moe.h"

namespace mxfp4_sm120 {

// The GPUs it was compiled for, as CMake writes them ("90-real 120-virtual"), or "stub".
std::string architectures();
// Throws unless kernels can run on the device of x.
void expect_usable(const torch::stable::Tensor& x);
// What launches on a device, the current one, depend on; asked once. Throws where it can't be had.
const Device& device_of(int32_t index);
// torch's current stream of a device, a cudaStream_t, and whether it is being captured in a CUDA graph.
void* current_stream(int32_t index);
bool is_capturing(void* stream);

}  // namespace mxfp4_sm120
