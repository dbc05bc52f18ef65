// SPDX-License-Identifier: Apache-2.0
// The entry point: carves the workspace, picks kernels by token count, launches.
#include <string>

#include "dispatch.h"

namespace mxfp4_sm120 {
namespace {

// What kernels keep from call to call first (zeroed once by the caller), then what each call overwrites.
struct Carver {
  uint8_t* base;
  int64_t at = 0;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return p;
  }
};

struct Workspace {
  DecodeWorkspace decode;
  GroupedWorkspace grouped;
  int64_t kept, bytes;  // bytes of what is kept; of all
};

Workspace carve(uint8_t* base, int M, int H, int I, int local_experts, int top_k) {
  Carver c{base};
  Workspace w{};
  const int64_t slots = static_cast<int64_t>(M) * top_k;
  w.decode.calls = c.take<int>(1);
  w.decode.exchange = c.take<DecodeExchange>(2);
  w.decode.y = c.take<uint32_t>(DECODE_MAX_VALUES);
  w.grouped.taken = c.take<int>(1);
  w.grouped.finished = c.take<int>(max_token_blocks(M, local_experts, top_k));
  w.kept = c.at;
  c.at = KEPT_BYTES;
  w.grouped.expert = c.take<int>(slots);
  w.grouped.weight = c.take<float>(slots);
  w.grouped.offsets = c.take<int>(local_experts + 1);
  w.grouped.order = c.take<int>(slots);
  w.grouped.position = c.take<int>(slots);
  w.grouped.act = c.take<uint16_t>(slots * I);
  w.grouped.y = c.take<uint2>(slots * H / 4);
  w.bytes = c.at;
  return w;
}

// The dispatch table; `config` in moe_forward indexes it. After the decode kernel's two forms come grouped_gemm's
// variants, in their order, each named after its token tile.
constexpr const char* CONFIGS[] = {"decode",   "gathered", "tokens24",  "tokens40", "tokens48",
                                   "tokens64", "tokens80", "tokens112", "tokens144"};
constexpr int DECODE = 0, GATHERED = 1, FIRST_GROUPED = 2, CONFIG_COUNT = sizeof(CONFIGS) / sizeof(CONFIGS[0]);

}  // namespace

// name, threads of a block, bytes of shared memory of a block, newline; in the order of `config`.
const char* launch_table() {
  static const std::string table = [] {
    std::string text;
    for (int config = 0; config < CONFIG_COUNT; ++config) {
      const Footprint f = config == DECODE     ? decode_layer_footprint()
                          : config == GATHERED ? gathered_layer_footprint()
                                               : grouped_layer_footprint(config - FIRST_GROUPED);
      text +=
          std::string(CONFIGS[config]) + " " + std::to_string(f.threads) + " " + std::to_string(f.shared_bytes) + "\n";
    }
    return text;
  }();
  return table.c_str();
}

int64_t workspace_bytes(int M, int H, int I, int local_experts, int top_k) {
  return carve(nullptr, M, H, I, local_experts, top_k).bytes;
}

const char* current_device(Device& device) {
  int ordinal = 0, major = 0;
  if (cudaGetDevice(&ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, ordinal) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess)
    return "the current device can't be queried";
  device.dependent_launch = major >= 9;
  return nullptr;
}

const char* moe_forward(const MoeArgs& args, int config, cudaStream_t stream) {
  if (args.M == 0) return nullptr;
  Device device{};
  if (const char* why = current_device(device)) return why;
  const Workspace ws = carve(args.workspace, args.M, args.H, args.I, args.local_experts, args.top_k);
  if (config < 0 || config >= CONFIG_COUNT) return "no such configuration";
  if (ws.kept > KEPT_BYTES) return "too many tokens for one call";
  if (config == DECODE && !decode_layer_takes(args)) config = GATHERED;
  if (config == DECODE) return decode_layer_forward(args, ws.decode, device, stream);
  if (config == GATHERED && !gathered_layer_takes(args)) config = FIRST_GROUPED;
  if (config == GATHERED) return gathered_layer_forward(args, ws.decode, device, stream);
  if (const char* why = route_and_group(args, ws.grouped, device, stream)) return why;
  if (const char* why = grouped_layer_forward(args, ws.grouped, config - FIRST_GROUPED, device, stream)) return why;
  return combine(args, ws.grouped, device, stream);
}

}  // namespace mxfp4_sm120
