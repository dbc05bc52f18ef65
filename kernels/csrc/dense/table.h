// SPDX-License-Identifier: Apache-2.0
// Where the table's entries come from.
#pragma once
#include "dense.h"

namespace mxfp4_sm120 {
namespace dense {

std::vector<DenseConfiguration> streaming_configurations();  // linear.cu
std::vector<DenseConfiguration> tiled_configurations();      // tiled.cu

}  // namespace dense
}  // namespace mxfp4_sm120
