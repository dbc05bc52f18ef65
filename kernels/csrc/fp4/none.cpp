// SPDX-License-Identifier: Apache-2.0
// The FP4 kernels where there are none: the library was built for no card that has the instruction, or by an nvcc that
// doesn't know it.
#include "fp4.h"

namespace mxfp4_sm120 {

const std::vector<Fp4Configuration>& fp4_configurations() {
  static const std::vector<Fp4Configuration> none;
  return none;
}
bool fp4_runs_here() { return false; }
std::string fp4_architectures() { return ""; }
int64_t fp4_workspace_bytes(int, int, int, int, int) { return 0; }

}  // namespace mxfp4_sm120
