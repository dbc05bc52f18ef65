// SPDX-License-Identifier: Apache-2.0
// The library without GPU code: the same ops, so that loading, registration and fakes can be tested where nothing can
// run. It computes nothing: its ops raise, or with MXFP4_SM120_ALLOW_STUB_KERNEL=1 fill the output with zeros.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace mxfp4_sm120 {
namespace {

using torch::stable::Tensor;

void zeros(Tensor& out) {
  const char* allowed = std::getenv("MXFP4_SM120_ALLOW_STUB_KERNEL");
  if (allowed == nullptr || std::strcmp(allowed, "1") != 0)
    throw std::runtime_error(
        "mxfp4_sm120: this library is the stub, which computes nothing; build the kernels with kernels/build.sh, "
        "or set MXFP4_SM120_ALLOW_STUB_KERNEL=1 to get zeros");
  torch::stable::zero_(out);
}

void moe(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
         const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
         const std::optional<Tensor>&, const Tensor&, int64_t, int64_t, bool, int64_t, Tensor out) {
  zeros(out);
}
void router(const Tensor&, const Tensor&, const std::optional<Tensor>&, Tensor out) { zeros(out); }

int64_t workspace_bytes(int64_t, int64_t, int64_t, int64_t, int64_t) { return 64 * 1024; }
std::string architectures() { return "stub"; }
std::string launch_table() { return ""; }

}  // namespace

STABLE_TORCH_LIBRARY(mxfp4_sm120, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CUDA, m) {
  m.impl("moe", TORCH_BOX(&moe));
  m.impl("router", TORCH_BOX(&router));
}
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CPU, m) {
  m.impl("moe", TORCH_BOX(&moe));
  m.impl("router", TORCH_BOX(&router));
}
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CompositeExplicitAutograd, m) {
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
  m.impl("architectures", TORCH_BOX(&architectures));
  m.impl("launch_table", TORCH_BOX(&launch_table));
}

}  // namespace mxfp4_sm120
