// SPDX-License-Identifier: Apache-2.0
#include "workspaces.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "runtime.h"

namespace mxfp4_sm120 {
namespace {

struct Kept {
  torch::stable::Tensor tensor;
  uint8_t* data;
  int64_t bytes;
};
struct OfStream {
  std::vector<Kept> kept;  // the last the largest
  int64_t bytes() const { return kept.empty() ? 0 : kept.back().bytes; }
};
struct OfDevice {
  std::map<void*, OfStream> streams;
  void* last = nullptr;  // the stream that last took one of its own
};

Kept zeros(int32_t device_type, int32_t device, int64_t bytes) {
  AtenTensorHandle handle = nullptr;
  const int64_t stride = 1;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), device_type, device, &handle));
  torch::stable::Tensor tensor(handle);
  torch::stable::zero_(tensor);
  return {tensor, static_cast<uint8_t*>(tensor.data_ptr()), bytes};
}

}  // namespace

uint8_t* workspace(int32_t device_type, int32_t device, void* stream, int64_t bytes) {
  static std::mutex mutex;
  // Never destroyed: at exit torch's allocator may be gone before.
  static auto& devices = *new std::map<int32_t, OfDevice>;
  const std::lock_guard<std::mutex> lock(mutex);
  OfDevice& here = devices[device];
  OfStream& mine = here.streams[stream];
  if (mine.bytes() < bytes) {
    if (is_capturing(stream)) {
      OfStream& warm = here.streams[here.last];
      if (warm.bytes() >= bytes) return warm.kept.back().data;
      std::ostringstream message;
      message << "mxfp4_sm120: the workspace has " << std::max(mine.bytes(), warm.bytes())
              << " bytes and this CUDA graph needs " << bytes
              << ": run the layer once with as many tokens before capturing";
      throw std::runtime_error(message.str());
    }
    mine.kept.push_back(zeros(device_type, device, bytes));
  }
  here.last = stream;
  return mine.kept.back().data;
}

}  // namespace mxfp4_sm120
