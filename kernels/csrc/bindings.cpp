// SPDX-License-Identifier: Apache-2.0
// The library's ops, on torch's stable ABI: one binary for every torch from 2.11 and every Python. Every argument is
// checked here, by name, before a kernel sees a pointer.
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <algorithm>
#include <string>
#include <vector>

#include "moe.h"
#include "ops.h"

// A CPU build of torch lacks this one: weak, so that the library loads there too and can say what it needs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

#ifndef MXFP4_SM120_ARCHITECTURES
#error "CMakeLists.txt says which architectures this is built for"
#endif

namespace mxfp4_sm120 {

// The dispatch table in its order: see ops.h.
const char* launch_table();

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void refuse(const char* name, const Parts&... parts) {
  std::ostringstream message;
  message << "mxfp4_sm120: " << name;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "of another dtype";
  }
}

std::string shape_text(const int64_t* sizes, size_t dim) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < dim; ++i)
    text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

// x decides on which device all else must lie.
int32_t device_of(const Tensor& x) {
  if (!x.is_cuda()) refuse("x", " is on the CPU, expected a CUDA tensor: the native kernels need CUDA");
  return x.get_device_index();
}

int64_t size_of(const Tensor& t, const char* name, int64_t dims, int64_t i) {
  if (t.dim() != dims) refuse(name, " has ", t.dim(), " dimensions, expected ", dims);
  return t.size(i);
}

// Kernels load 16 bytes at a time; what they read by element may lie where its dtype allows.
enum class Aligned { Vector = 16, Element = 1 };

void check(const Tensor& t, const char* name, int32_t device, ScalarType dtype, const std::vector<int64_t>& shape,
           Aligned aligned = Aligned::Vector) {
  if (!t.is_cuda()) refuse(name, " is on the CPU, expected a CUDA tensor: the native kernels need CUDA");
  if (t.get_device_index() != device)
    refuse(name, " is on cuda:", t.get_device_index(), ", expected cuda:", device, " as x");
  if (t.scalar_type() != dtype) refuse(name, " is ", dtype_name(t.scalar_type()), ", expected ", dtype_name(dtype));
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()))
    refuse(name, " has shape ", shape_text(sizes.data(), sizes.size()), ", expected ",
           shape_text(shape.data(), shape.size()));
  if (!t.is_contiguous()) refuse(name, " is not contiguous, expected a contiguous tensor");
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % static_cast<uintptr_t>(aligned) != 0)
    refuse(name, " is not aligned, expected an address that is a multiple of ", static_cast<int>(aligned));
}

const void* pointer(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

// The tensors' device is the current one while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Launches on torch's current stream of `device`. `launch` says why it can't, or nullptr.
template <typename Launch>
void enqueue(int32_t device, Launch launch) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("mxfp4_sm120: torch gave no CUDA stream, expected a CUDA build of torch");
  const DeviceGuard guard(device);
  if (const char* why = launch(static_cast<cudaStream_t>(stream)))
    throw std::runtime_error(std::string("mxfp4_sm120: ") + why);
}

int64_t workspace_bytes_op(int64_t tokens, int64_t hidden_size, int64_t intermediate_size, int64_t local_experts,
                           int64_t top_k) {
  return workspace_bytes(static_cast<int>(tokens), static_cast<int>(hidden_size), static_cast<int>(intermediate_size),
                         static_cast<int>(local_experts), static_cast<int>(top_k));
}

// Lines of the dispatch table, that is, values of `config`.
int64_t configurations() {
  static const int64_t count = [] {
    const std::string table = launch_table();
    return std::count(table.begin(), table.end(), '\n');
  }();
  return count;
}

void moe(const Tensor& x, const Tensor& w13, const Tensor& w2, const std::optional<Tensor>& w13_bias,
         const std::optional<Tensor>& w2_bias, const std::optional<Tensor>& router_logits,
         const std::optional<Tensor>& topk_ids, const std::optional<Tensor>& topk_weights,
         const std::optional<Tensor>& expert_map, const Tensor& workspace, int64_t num_experts, int64_t top_k,
         bool swiglu_oai, int64_t config, const Tensor& out) {
  const int32_t device = device_of(x);

  // Sizes come from x and the weights; all else must agree with them.
  const int64_t tokens = size_of(x, "x", 2, 0), hidden = size_of(x, "x", 2, 1);
  const int64_t local_experts = size_of(w2, "w2", 4, 0), intermediate = size_of(w2, "w2", 4, 2) * 32;
  if (num_experts < 1 || num_experts > MAX_EXPERTS)
    refuse("num_experts", " is ", num_experts, ", expected 1 to ", MAX_EXPERTS);
  if (top_k < 1 || top_k > MAX_TOP_K || top_k > num_experts)
    refuse("top_k", " is ", top_k, ", expected 1 to ", MAX_TOP_K, " and at most num_experts (", num_experts, ")");
  if (local_experts < 1 || local_experts > num_experts)
    refuse("w2", " holds ", local_experts, " experts, expected 1 to num_experts (", num_experts, ")");
  if (intermediate < 1) refuse("w2", " has an intermediate size of 0, expected a multiple of 32");
  if (hidden < 1 || hidden % 32 != 0) refuse("x", " has hidden size ", hidden, ", expected a multiple of 32");
  if (tokens > (1 << 24)) refuse("x", " has ", tokens, " tokens, expected at most ", 1 << 24);

  if (config < 0 || config >= configurations())
    refuse("config", " is ", config, ", expected 0 to ", configurations() - 1);

  check(x, "x", device, ScalarType::BFloat16, {tokens, hidden});
  check(w13, "w13", device, ScalarType::Byte, {local_experts, intermediate / 16, hidden / 32, 544});
  check(w2, "w2", device, ScalarType::Byte, {local_experts, hidden / 32, intermediate / 32, 544});
  if (w13_bias) check(*w13_bias, "w13_bias", device, ScalarType::BFloat16, {local_experts, 2 * intermediate});
  if (w2_bias) check(*w2_bias, "w2_bias", device, ScalarType::BFloat16, {local_experts, hidden});
  if (router_logits.has_value() == topk_ids.has_value())
    refuse("router_logits", " and topk_ids", router_logits ? " are both given" : " are both missing", ", expected one");
  if (topk_ids.has_value() != topk_weights.has_value())
    refuse("topk_weights", topk_weights ? " is given" : " is missing", ", expected with topk_ids and only then");
  bool logits_fp32 = false;
  if (router_logits) {
    logits_fp32 = router_logits->scalar_type() == ScalarType::Float;
    if (!logits_fp32 && router_logits->scalar_type() != ScalarType::BFloat16)
      refuse("router_logits", " is ", dtype_name(router_logits->scalar_type()), ", expected bfloat16 or float32");
    check(*router_logits, "router_logits", device, router_logits->scalar_type(), {tokens, num_experts},
          Aligned::Element);
  } else {
    check(*topk_ids, "topk_ids", device, ScalarType::Int, {tokens, top_k}, Aligned::Element);
    check(*topk_weights, "topk_weights", device, ScalarType::Float, {tokens, top_k}, Aligned::Element);
  }
  if (expert_map) check(*expert_map, "expert_map", device, ScalarType::Int, {num_experts}, Aligned::Element);
  if (!expert_map && local_experts != num_experts)
    refuse("expert_map", " is missing, expected since only ", local_experts, " of ", num_experts, " experts are here");
  check(out, "out", device, ScalarType::BFloat16, {tokens, hidden});
  if (tokens > 0 && out.data_ptr() == x.data_ptr()) refuse("out", " is x, expected a tensor of its own");

  MoeArgs args{};
  args.M = static_cast<int>(tokens);
  args.H = static_cast<int>(hidden);
  args.I = static_cast<int>(intermediate);
  args.num_experts = static_cast<int>(num_experts);
  args.local_experts = static_cast<int>(local_experts);
  args.top_k = static_cast<int>(top_k);
  args.swiglu_oai = swiglu_oai;

  const int64_t needed = workspace_bytes(args.M, args.H, args.I, args.local_experts, args.top_k);
  const int64_t given = size_of(workspace, "workspace", 1, 0);
  check(workspace, "workspace", device, ScalarType::Byte, {given});
  if (given < needed) refuse("workspace", " has ", given, " bytes, expected at least ", needed);
  if (reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 256 != 0)
    refuse("workspace", " is not aligned, expected an address that is a multiple of 256");
  if (tokens == 0) return;

  args.x = x.data_ptr();
  args.w13 = static_cast<const uint8_t*>(w13.data_ptr());
  args.w2 = static_cast<const uint8_t*>(w2.data_ptr());
  args.w13_bias = pointer(w13_bias);
  args.w2_bias = pointer(w2_bias);
  args.router_logits = pointer(router_logits);
  args.logits_fp32 = logits_fp32;
  args.topk_ids = static_cast<const int32_t*>(pointer(topk_ids));
  args.topk_weights = static_cast<const float*>(pointer(topk_weights));
  args.expert_map = static_cast<const int32_t*>(pointer(expert_map));
  args.out = out.data_ptr();
  args.workspace = static_cast<uint8_t*>(workspace.data_ptr());

  enqueue(device, [&](cudaStream_t stream) { return moe_forward(args, static_cast<int>(config), stream); });
}

void router(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const int32_t device = device_of(x);
  const int64_t tokens = size_of(x, "x", 2, 0), hidden = size_of(x, "x", 2, 1);
  const int64_t experts = size_of(weight, "weight", 2, 0);
  if (tokens > ROUTER_MAX_TOKENS) refuse("x", " has ", tokens, " tokens, expected at most ", ROUTER_MAX_TOKENS);
  if (hidden % 8 != 0 || hidden > ROUTER_MAX_HIDDEN)
    refuse("x", " has hidden size ", hidden, ", expected a multiple of 8 up to ", ROUTER_MAX_HIDDEN);
  check(x, "x", device, ScalarType::BFloat16, {tokens, hidden});
  check(weight, "weight", device, ScalarType::BFloat16, {experts, hidden});
  if (bias) check(*bias, "bias", device, ScalarType::BFloat16, {experts}, Aligned::Element);
  check(out, "out", device, ScalarType::BFloat16, {tokens, experts}, Aligned::Element);
  if (tokens == 0 || experts == 0) return;
  const RouterArgs args{x.data_ptr(),
                        weight.data_ptr(),
                        pointer(bias),
                        out.data_ptr(),
                        static_cast<int>(tokens),
                        static_cast<int>(hidden),
                        static_cast<int>(experts)};
  enqueue(device, [&](cudaStream_t stream) { return router_forward(args, stream); });
}

std::string architectures() { return MXFP4_SM120_ARCHITECTURES; }
std::string launch_table_op() { return launch_table(); }

}  // namespace

STABLE_TORCH_LIBRARY(mxfp4_sm120, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CUDA, m) {
  m.impl("moe", TORCH_BOX(&moe));
  m.impl("router", TORCH_BOX(&router));
}
// The same checks, the first of which says what is missing.
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CPU, m) {
  m.impl("moe", TORCH_BOX(&moe));
  m.impl("router", TORCH_BOX(&router));
}

// No tensor among their arguments to choose by.
STABLE_TORCH_LIBRARY_IMPL(mxfp4_sm120, CompositeExplicitAutograd, m) {
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes_op));
  m.impl("architectures", TORCH_BOX(&architectures));
  m.impl("launch_table", TORCH_BOX(&launch_table_op));
}

}  // namespace mxfp4_sm120
