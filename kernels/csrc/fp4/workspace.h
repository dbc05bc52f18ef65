// SPDX-License-Identifier: Apache-2.0
// What the FP4 kernels find in a call's workspace.
#pragma once
#include "../workspace.h"
#include "terms.h"

namespace mxfp4_sm120 {

struct Fp4Workspace {
  GroupedWorkspace grouped;  // without `act`
  uint8_t* x;                // [M] tokens' records (terms.h)
  uint8_t* act;              // [M * k] activations' records, sorted by expert
  int64_t bytes;             // of all
};

// Cuts up the workspace at `base` for a call of M tokens, with so many terms. What is kept from call to call is the
// other kernels' too.
inline Fp4Workspace carve_fp4(uint8_t* base, int M, int H, int I, int local_experts, int top_k, int terms) {
  const int64_t slots = static_cast<int64_t>(M) * top_k, record = fp4::record_bytes(terms);
  Fp4Workspace w{carve(base, M, H, I, local_experts, top_k).grouped, nullptr, nullptr, 0};
  Carver c{base, KEPT_BYTES};
  w.grouped.expert = c.take<int>(slots);
  w.grouped.weight = c.take<float>(slots);
  w.grouped.offsets = c.take<int>(local_experts + 1);
  w.grouped.order = c.take<int>(slots);
  w.grouped.position = c.take<int>(slots);
  w.grouped.act = nullptr;
  w.grouped.y = c.take<uint2>(slots * H / 4);
  w.x = c.take<uint8_t>(M * fp4::steps_of(H) * record);
  w.act = c.take<uint8_t>(slots * fp4::steps_of(I) * record);
  w.bytes = c.at;
  return w;
}

}  // namespace mxfp4_sm120
