// SPDX-License-Identifier: Apache-2.0
// Between the dispatch table and the kernels.
#pragma once
#include "common/launch.h"
#include "workspace.h"

namespace mxfp4_sm120 {

// The decode kernel's two forms: all tokens as columns, and tokens gathered by expert.
std::vector<Configuration> decode_configurations();
// The grouped GEMMs with what stands around them, by tokens of a token block.
std::vector<Configuration> grouped_configurations();

// Around the grouped GEMMs. Each returns nullptr or why it could not launch.
const char* route_and_group(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device, cudaStream_t stream);
const char* combine(const MoeArgs& args, const GroupedWorkspace& ws, const Device& device, cudaStream_t stream);

}  // namespace mxfp4_sm120
