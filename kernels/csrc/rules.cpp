// SPDX-License-Identifier: Apache-2.0
#include "rules.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

namespace mxfp4_sm120 {
namespace {

std::shared_mutex mutex;
std::map<int32_t, std::vector<Bound>>& rules() {
  static std::map<int32_t, std::vector<Bound>> all;
  return all;
}

// A call's tokens, in parts of at most MAX_TOKENS.
std::string why_not(const Configuration& config, const MoeArgs& args) {
  return why_not(config, std::min(args.M, MAX_TOKENS), args.top_k, args.H, args.I);
}

}  // namespace

void set_rule(int32_t device, std::vector<Bound> rule) {
  const int count = static_cast<int>(configurations().size());
  for (const Bound& bound : rule)
    if (bound.config < 0 || bound.config >= count)
      throw std::runtime_error("mxfp4_sm120: a rule names configuration " + std::to_string(bound.config) +
                               ", expected 0 to " + std::to_string(count - 1));
  const std::unique_lock lock(mutex);
  rules()[device] = std::move(rule);
}

const Configuration& choose(int32_t device, const MoeArgs& args) {
  const double tokens_per_expert = static_cast<double>(args.M) * args.top_k / args.num_experts;
  const std::shared_lock lock(mutex);
  const auto found = rules().find(device);
  if (found == rules().end())
    throw std::runtime_error("mxfp4_sm120: no rule says which kernels device " + std::to_string(device) +
                             " takes, expected set_rule before the first layer");
  for (const Bound& bound : found->second) {
    const Configuration& config = configurations()[bound.config];
    if (args.M <= bound.tokens && tokens_per_expert <= bound.tokens_per_expert && why_not(config, args).empty())
      return config;
  }
  throw std::runtime_error("mxfp4_sm120: the rule of device " + std::to_string(device) + " leaves out " +
                           std::to_string(args.M) + " tokens, " + std::to_string(tokens_per_expert) + " an expert");
}

const Configuration& configuration(int64_t config, const MoeArgs& args) {
  const auto& table = configurations();
  if (config < 0 || config >= static_cast<int64_t>(table.size()))
    throw std::runtime_error("mxfp4_sm120: config is " + std::to_string(config) + ", expected 0 to " +
                             std::to_string(table.size() - 1) + ", or -1 for the rule's");
  const std::string why = why_not(table[config], args);
  if (!why.empty()) throw std::runtime_error("mxfp4_sm120: config " + why);
  return table[config];
}

}  // namespace mxfp4_sm120
