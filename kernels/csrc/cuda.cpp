// SPDX-License-Identifier: Apache-2.0
// runtime.h where there is CUDA.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "fp4/fp4.h"

// A CPU build of torch lacks this one: weak, so that the library loads there too and can say what it needs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

#ifndef MXFP4_SM120_ARCHITECTURES
#error "CMakeLists.txt says which architectures this is built for"
#endif

namespace mxfp4_sm120 {

std::string architectures() { return MXFP4_SM120_ARCHITECTURES; }

void expect_usable(const torch::stable::Tensor& x) {
  if (!x.is_cuda())
    throw std::runtime_error("mxfp4_sm120: x is on the CPU, expected a CUDA tensor: the native kernels need CUDA");
}

const Device& device_of(int32_t index) {
  struct Known {
    std::once_flag once;
    Device device{};
    bool found = false;
  };
  static std::array<Known, 64> devices;
  if (index < 0 || index >= static_cast<int32_t>(devices.size()))
    throw std::runtime_error("mxfp4_sm120: cuda:" + std::to_string(index) + " is beyond the 64 devices that are known");
  Known& known = devices[index];
  std::call_once(known.once, [&] {
    int major = 0;
    auto ask = [&](int& value, cudaDeviceAttr which) {
      return cudaDeviceGetAttribute(&value, which, index) == cudaSuccess;
    };
    known.found = ask(known.device.multiprocessors, cudaDevAttrMultiProcessorCount) &&
                  ask(known.device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor) &&
                  ask(major, cudaDevAttrComputeCapabilityMajor);
    known.device.dependent_launch = major >= 9;
    known.device.fp4 = fp4_runs_here();
  });
  if (!known.found) throw std::runtime_error("mxfp4_sm120: cuda:" + std::to_string(index) + " can't be queried");
  return known.device;
}

void* current_stream(int32_t index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(index, &stream) != 0)
    throw std::runtime_error("mxfp4_sm120: torch gave no CUDA stream, expected a CUDA build of torch");
  return stream;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

}  // namespace mxfp4_sm120
