// SPDX-License-Identifier: Apache-2.0
// What the tests call: settings, a layer, a router.
#include <utility>

#include "moe.h"

using namespace mxfp4_sm120;

extern "C" {
void emulate(int multiprocessors, bool late_copies, unsigned seed) {
  emu::multiprocessors = multiprocessors;
  emu::late_copies = late_copies;
  emu::random.seed(seed);
}
int early_loads() { return std::exchange(emu::early_loads, 0); }
int64_t moe_workspace_bytes(int M, int H, int I, int local_experts, int top_k) {
  return workspace_bytes(M, H, I, local_experts, top_k);
}
int64_t moe_kept_bytes() { return KEPT_BYTES; }
const char* moe(const MoeArgs* args, int config) { return moe_forward(*args, config, nullptr); }
const char* router(const RouterArgs* args) { return router_forward(*args, nullptr); }
}
