// SPDX-License-Identifier: Apache-2.0
// What the ops share beside checks of their arguments: outputs, the current device, a launch's error, tables.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "arguments.h"

namespace mxfp4_sm120 {

using OptionalTensor = std::optional<Tensor>;
// Columns of a table of kernels, as Python gets them.
using Names = std::vector<std::string>;
using Integers = std::vector<int64_t>;

// A new contiguous bf16 [rows, columns] where `place` is.
inline Tensor new_output(const Place& place, int64_t rows, int64_t columns) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{columns, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes.data(), strides.data(), codes().bfloat16, place.type, place.index, &handle));
  return Tensor(handle);
}

// The tensors' device is the current one while this lives.
class On {
 public:
  explicit On(const Place& place) {
    if (place.cuda()) guard_.emplace(place.index);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline void expect_launched(const char* why) { STD_TORCH_CHECK(why == nullptr, "mxfp4_sm120: ", why); }

}  // namespace mxfp4_sm120
