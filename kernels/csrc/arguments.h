// SPDX-License-Identifier: Apache-2.0
// Checks of an op's arguments, by name, before a kernel sees a pointer.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mxfp4_sm120 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void refuse(const char* name, const Parts&... parts) {
  std::ostringstream message;
  message << "mxfp4_sm120: " << name;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python prints it.
inline std::string dtype_name(ScalarType type) {
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
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* before = "[";
  for (const int64_t size : sizes) {
    text << before << size;
    before = ", ";
  }
  text << "]";
  return text.str();
}

// torch hands over None, where a tensor must be, as a tensor that isn't defined.
inline void expect_given(const Tensor& t, const char* name) {
  if (!t.defined()) refuse(name, " is missing, expected a tensor");
}

inline int64_t size_of(const Tensor& t, const char* name, int64_t dims, int64_t i) {
  expect_given(t, name);
  if (t.dim() != dims) refuse(name, " has ", t.dim(), " dimensions, expected ", dims);
  return t.size(i);
}

// Kernels load 16 bytes at a time; what they read by element may lie where its dtype allows.
enum class Aligned { Vector = 16, Word = 4, Element = 1 };

// torch's own numbers for what is compared here, asked once: `scalar_type()` asks for up to thirteen of them.
struct Codes {
  int32_t cuda = aoti_torch_device_type_cuda(), cpu = aoti_torch_device_type_cpu();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16(), float32 = aoti_torch_dtype_float32();
  int32_t uint8 = aoti_torch_dtype_uint8(), int8 = aoti_torch_dtype_int8(), int32 = aoti_torch_dtype_int32();
};
inline const Codes& codes() {
  static const Codes codes;
  return codes;
}
inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// Where all tensors of a call must lie: where x does.
struct Place {
  int32_t type, index;
  explicit Place(const Tensor& x) : type(0), index(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  }
  bool cuda() const { return type == codes().cuda; }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
  std::string text() const { return cuda() ? "cuda:" + std::to_string(index) : "the CPU"; }
};

// The tensor's data, if it is as expected.
inline void* checked(const Tensor& t, const char* name, const Place& place, int32_t dtype,
                     std::initializer_list<int64_t> shape, Aligned aligned = Aligned::Vector) {
  expect_given(t, name);
  if (const Place here(t); !(here == place)) refuse(name, " is on ", here.text(), ", expected ", place.text(), " as x");
  if (dtype_of(t) != dtype)
    refuse(name, " is ", dtype_name(t.scalar_type()), ", expected ",
           dtype_name(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype))));
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()))
    refuse(name, " has shape ", shape_text(sizes), ", expected ", shape_text(shape));
  if (!t.is_contiguous()) refuse(name, " is not contiguous, expected a contiguous tensor");
  void* const data = t.data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(aligned) != 0)
    refuse(name, " is not aligned, expected an address that is a multiple of ", static_cast<int>(aligned));
  return data;
}
inline void* checked(const std::optional<Tensor>& t, const char* name, const Place& place, int32_t dtype,
                     std::initializer_list<int64_t> shape, Aligned aligned = Aligned::Vector) {
  return t ? checked(*t, name, place, dtype, shape, aligned) : nullptr;
}

}  // namespace mxfp4_sm120
