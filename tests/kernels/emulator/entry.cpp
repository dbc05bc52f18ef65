// SPDX-License-Identifier: Apache-2.0
// What the tests call: settings, a layer, a router; and what Python mirrors of moe.h, to compare.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "dense/dense.h"
#include "emulator.h"
#include "moe.h"

using namespace mxfp4_sm120;

namespace {
const char* kept(std::string text) {
  static std::string last;
  last = std::move(text);
  return last.c_str();
}
Device device() { return {emu::multiprocessors, 100 * 1024, false}; }  // an SM 8.x: dependent launches aren't emulated
}  // namespace

extern "C" {
void emulate(int multiprocessors, bool late_copies, unsigned seed) {
  emu::multiprocessors = multiprocessors;
  emu::late_copies = late_copies;
  emu::random.seed(seed);
}
void lose_block(int block) { emu::lost_block = block; }
void switch_on(int fault) { emu::fault = fault; }
int early_loads() { return std::exchange(emu::early_loads, 0); }
int64_t moe_workspace_bytes(int M, int H, int I, int local_experts, int top_k) {
  return workspace_bytes(M, H, I, local_experts, top_k);
}
int64_t moe_kept_bytes() { return KEPT_BYTES; }

// nullptr past the table's end.
const char* config_name(int config) {
  const auto& table = configurations();
  return config < static_cast<int>(table.size()) ? table[config].name.c_str() : nullptr;
}
int config_tokens(int config) { return configurations()[config].limits.tokens; }

const char* moe(const MoeArgs* args, int config) {
  const Configuration& chosen = configurations()[config];
  const std::string why = why_not(chosen, args->M, args->top_k, args->H, args->I);
  return why.empty() ? chosen.launch(*args, device(), nullptr) : kept(why);
}
const char* dense_name(int config) {
  const auto& table = dense_configurations();
  return config < static_cast<int>(table.size()) ? table[config].name.c_str() : nullptr;
}
const char* dense(const DenseArgs* given, int config) {
  const DenseConfiguration& chosen = dense_configurations()[config];
  DenseArgs args = *given;
  const int64_t floats = chosen.workspace_bytes(args, device()) / 4, beyond = 64;
  std::vector<float> partial(floats + beyond, NAN);
  args.partial = partial.data();
  const char* why = chosen.launch(args, device(), nullptr);
  const auto is_nan = [](float value) { return std::isnan(value); };
  if (!std::all_of(partial.begin() + floats, partial.end(), is_nan)) emu::fail("a write leaves the workspace");
  return why;
}
const char* dense_chosen(bool int8, int tokens) { return first_fit(int8, tokens).name.c_str(); }
const char* dense_dequantized(const DenseArgs* args) { return dense_dequantize(*args, device(), nullptr); }
const char* router(const RouterArgs* args) { return router_forward(*args, device(), nullptr); }

// sizeof, then where each field begins, in order.
int MOE_ARGS[] = {sizeof(MoeArgs),
                        offsetof(MoeArgs, x),
                        offsetof(MoeArgs, w13),
                        offsetof(MoeArgs, w2),
                        offsetof(MoeArgs, w13_bias),
                        offsetof(MoeArgs, w2_bias),
                        offsetof(MoeArgs, router_logits),
                        offsetof(MoeArgs, logits_fp32),
                        offsetof(MoeArgs, topk_ids),
                        offsetof(MoeArgs, topk_weights),
                        offsetof(MoeArgs, expert_map),
                        offsetof(MoeArgs, out),
                        offsetof(MoeArgs, workspace),
                        offsetof(MoeArgs, M),
                        offsetof(MoeArgs, H),
                        offsetof(MoeArgs, I),
                        offsetof(MoeArgs, num_experts),
                        offsetof(MoeArgs, local_experts),
                        offsetof(MoeArgs, top_k),
                        offsetof(MoeArgs, swiglu_oai)};
int ROUTER_ARGS[] = {sizeof(RouterArgs),         offsetof(RouterArgs, x), offsetof(RouterArgs, weight),
                           offsetof(RouterArgs, bias), offsetof(RouterArgs, out), offsetof(RouterArgs, M),
                           offsetof(RouterArgs, H),    offsetof(RouterArgs, experts)};
int DENSE_ARGS[] = {sizeof(DenseArgs),          offsetof(DenseArgs, x),    offsetof(DenseArgs, weight),
                    offsetof(DenseArgs, scale), offsetof(DenseArgs, bias), offsetof(DenseArgs, out),
                    offsetof(DenseArgs, partial), offsetof(DenseArgs, M),  offsetof(DenseArgs, N),
                    offsetof(DenseArgs, K)};
}
