// SPDX-License-Identifier: Apache-2.0
// A MoE layer on FP4 tensor cores: activations as terms, weights as they are. Which kernels there are, and their
// workspace. No CUDA here.
#pragma once
#include <string>
#include <vector>

#include "../moe.h"

namespace mxfp4_sm120 {

struct Fp4Configuration {
  std::string name;
  int terms;   // an activation is a sum of so many FP4 numbers
  int tokens;  // of a token block
  Footprint footprint;
  // As of a MoE layer's Configuration; the workspace has fp4_workspace_bytes(...), and the device `fp4`.
  const char* (*launch)(const MoeArgs& args, const Device& device, void* stream);
};

// Empty where the compiler knew no card with the instruction (nvcc older than 12.8).
const std::vector<Fp4Configuration>& fp4_configurations();
// Are they compiled for the current device?
bool fp4_runs_here();
// The GPUs these kernels are compiled for, as CMake writes them; "" where there are none.
std::string fp4_architectures();
int64_t fp4_workspace_bytes(int M, int H, int I, int local_experts, int top_k);

}  // namespace mxfp4_sm120
