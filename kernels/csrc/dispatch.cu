// The entry point: carves the workspace, picks kernels by token count, launches.
#include "dispatch.h"

#include "layer.cuh"

namespace mxfp4_sm120 {
namespace {

// Counters first (zeroed once by the caller, left zero by every call), then what each call overwrites.
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
  int64_t bytes;
};

Workspace carve(uint8_t* base, int M, int H, int I, int local_experts, int top_k) {
  Carver c{base};
  Workspace w{};
  const int64_t slots = static_cast<int64_t>(M) * top_k;
  w.decode.ready = c.take<int>(MAX_EXPERTS);
  w.decode.done = c.take<int>(1);
  w.decode.arrived = c.take<int>(H / TILE * DECODE_MAX_TOKENS);
  c.at = COUNTER_BYTES;
  w.grouped.expert = c.take<int>(slots);
  w.grouped.weight = c.take<float>(slots);
  w.grouped.offsets = c.take<int>(local_experts + 1);
  w.grouped.order = c.take<int>(slots);
  w.decode.act = w.grouped.act = c.take<uint16_t>(slots * I);
  w.decode.y = w.grouped.y = c.take<float>(slots * H);
  w.bytes = c.at;
  return w;
}

// The dispatch table: which kernel, by tokens per expert (M * top_k / num_experts). `config` in moe_forward indexes it.
struct Config {
  const char* name;
  bool decode;
  int variant;
};
constexpr Config CONFIGS[] = {
    {"decode0", true, 0},   {"decode1", true, 1},   {"decode2", true, 2},   {"decode3", true, 3},    {"tokens16", false, 0},
    {"tokens32", false, 1}, {"tokens64", false, 2}, {"tokens128", false, 3}, {"tokens256", false, 4}, {"tokens64x2", false, 5},
};

int default_config(const MoeArgs& args) {
  if (args.M <= DECODE_MAX_TOKENS) return 0;
  const int per_expert = args.M * args.top_k / args.num_experts;
  return per_expert <= 10 ? 4 : per_expert <= 24 ? 5 : per_expert <= 56 ? 6 : 7;
}

}  // namespace

int64_t workspace_bytes(int M, int H, int I, int, int local_experts, int top_k) {
  return carve(nullptr, M, H, I, local_experts, top_k).bytes;
}

const char* moe_forward(const MoeArgs& args, int config, cudaStream_t stream) {
  if (args.M == 0) return nullptr;
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return "the current device can't be queried";
  const Workspace ws = carve(args.workspace, args.M, args.H, args.I, args.local_experts, args.top_k);
  const Config& c = CONFIGS[config < 0 ? default_config(args) : config];
  if (c.decode) return decode_layer_forward(args, ws.decode, c.variant, multiprocessors, stream);
  if (const char* why = route_and_group(args, ws.grouped, stream)) return why;
  if (const char* why = grouped_layer_forward(args, ws.grouped, c.variant, multiprocessors, stream)) return why;
  return combine(args, ws.grouped, stream);
}

}  // namespace mxfp4_sm120
