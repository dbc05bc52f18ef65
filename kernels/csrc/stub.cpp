// SPDX-License-Identifier: Apache-2.0
// The library without GPU code: the same ops and checks, on the CPU, so that loading, registration and all that stands
// around the kernels can be tested and timed where nothing can run. It computes nothing: its ops raise, or with
// MXFP4_SM120_ALLOW_STUB_KERNEL=1 give zeros.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "dense/dense.h"
#include "runtime.h"

namespace mxfp4_sm120 {
namespace {

const char* zeros(const MoeArgs& args, const Device&, void*) {
  std::memset(args.out, 0, static_cast<size_t>(args.M) * args.H * 2);
  return nullptr;
}

int64_t no_bytes(const DenseArgs&, const Device&) { return 0; }

const char* dense_zeros(const DenseArgs& args, const Device&, void*) {
  std::memset(args.out, 0, static_cast<size_t>(args.M) * args.N * 2);
  return nullptr;
}

}  // namespace

std::string architectures() { return "stub"; }

void expect_usable(const torch::stable::Tensor& x) {
  static const bool allowed = [] {
    const char* value = std::getenv("MXFP4_SM120_ALLOW_STUB_KERNEL");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  if (!allowed)
    throw std::runtime_error(
        "mxfp4_sm120: this library is the stub, which computes nothing; build the kernels with mxfp4-sm120 build, "
        "or set MXFP4_SM120_ALLOW_STUB_KERNEL=1 to get zeros");
  if (!x.is_cpu())
    throw std::runtime_error("mxfp4_sm120: x is not on the CPU, where alone the stub gives zeros; build the kernels");
}

const Device& device_of(int32_t) {
  static const Device none{};
  return none;
}
void* current_stream(int32_t) { return nullptr; }
bool is_capturing(void*) { return false; }

const std::vector<Configuration>& configurations() {
  static const std::vector<Configuration> table = {{"zeros", {}, {0, 0}, zeros}, {"zeros8", {8}, {0, 0}, zeros}};
  return table;
}

const char* dense_dequantize(const DenseArgs& args, const Device&, void*) {
  std::memset(args.out, 0, static_cast<size_t>(args.N) * args.K * 2);
  return nullptr;
}

const std::vector<DenseConfiguration>& dense_configurations() {
  static const std::vector<DenseConfiguration> table = {{"bf16_zeros", false, 16, {0, 0}, no_bytes, dense_zeros},
                                                        {"int8_zeros", true, 16, {0, 0}, no_bytes, dense_zeros},
                                                        {"int8_zeros64", true, 64, {0, 0}, no_bytes, dense_zeros}};
  return table;
}

int64_t workspace_bytes(int M, int, int, int, int) { return KEPT_BYTES + 256 * static_cast<int64_t>(M); }

const char* router_forward(const RouterArgs& args, const Device&, void*) {
  std::memset(args.out, 0, static_cast<size_t>(args.M) * args.experts * 2);
  return nullptr;
}

}  // namespace mxfp4_sm120
