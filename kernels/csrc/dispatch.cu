// SPDX-License-Identifier: Apache-2.0
// The dispatch table, and how a call's workspace is cut up.
#include "dispatch.h"

namespace mxfp4_sm120 {
namespace {

// What is kept from call to call, with the most counters that a call can need.
static_assert(256 + 2 * sizeof(DecodeExchange) + 4 * DECODE_MAX_VALUES + 256 +
                  4 * max_token_blocks(MAX_TOKENS, MAX_EXPERTS, MAX_TOP_K) + 256 <=
              KEPT_BYTES);

}  // namespace

// What kernels keep from call to call first (zeroed once by the caller), then what each call overwrites.
Workspace carve(uint8_t* base, int M, int H, int I, int local_experts, int top_k) {
  Carver c{base};
  Workspace w{};
  const int64_t slots = static_cast<int64_t>(M) * top_k;
  w.decode.calls = c.take<int>(1);
  w.decode.exchange = c.take<DecodeExchange>(2);
  w.decode.y = c.take<uint32_t>(DECODE_MAX_VALUES);
  w.grouped.taken = c.take<int>(1);
  w.grouped.finished = c.take<int>(max_token_blocks(M, local_experts, top_k));
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

int64_t workspace_bytes(int M, int H, int I, int local_experts, int top_k) {
  return carve(nullptr, M, H, I, local_experts, top_k).bytes;
}

const std::vector<Configuration>& configurations() {
  static const std::vector<Configuration> table = [] {
    std::vector<Configuration> all = decode_configurations();
    for (Configuration& config : grouped_configurations())
      all.push_back(std::move(config));
    return all;
  }();
  return table;
}

}  // namespace mxfp4_sm120
