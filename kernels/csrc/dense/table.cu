// SPDX-License-Identifier: Apache-2.0
// The table of dense kernels. Which of them answers is measured on the card that serves (vllm_mxfp4_sm120/dense).
#include "table.h"

namespace mxfp4_sm120 {

const std::vector<DenseConfiguration>& dense_configurations() {
  static const std::vector<DenseConfiguration> table = [] {
    std::vector<DenseConfiguration> all = dense::streaming_configurations();
    for (DenseConfiguration& config : dense::tiled_configurations())
      all.push_back(std::move(config));
    return all;
  }();
  return table;
}

}  // namespace mxfp4_sm120
