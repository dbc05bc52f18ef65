// SPDX-License-Identifier: Apache-2.0
// Between the dispatch table and the kernels.
#pragma once
#include "common/launch.h"
#include "workspace.h"

namespace mxfp4_sm120 {

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

}  // namespace mxfp4_sm120
