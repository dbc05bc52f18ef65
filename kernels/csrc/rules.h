// SPDX-License-Identifier: Apache-2.0
// Which configuration computes a call: a rule for each device, which Python reads from configs/tuning and hands over.
#pragma once
#include "moe.h"

namespace mxfp4_sm120 {

// One line of a rule: the configuration for up to so many tokens, and so many per expert on average.
struct Bound {
  int config;
  double tokens, tokens_per_expert;
};

// Replaces the rule of a device. Throws std::runtime_error for a configuration that doesn't exist.
void set_rule(int32_t device, std::vector<Bound> rule);
// The first line that holds and whose configuration takes the call. Throws where there is none.
const Configuration& choose(int32_t device, const MoeArgs& args);
// `config` of the table. Throws where it doesn't exist or can't take the call, naming the limit.
const Configuration& configuration(int64_t config, const MoeArgs& args);

}  // namespace mxfp4_sm120
