// SPDX-License-Identifier: Apache-2.0
// How the weight rows are shared between blocks.
#pragma once
#include <cstdint>

#include "../common/ptx.cuh"

namespace mxfp4_sm120 {
namespace dense {

// A block's even share of the weight rows, to the row, and how it takes them: in passes of at most `most`.
struct Rows {
  int begin, end, passes, of_pass;
  __device__ __forceinline__ Rows(int64_t N, int most) {
    begin = static_cast<int>(N * blockIdx.x / gridDim.x);
    end = static_cast<int>(N * (blockIdx.x + 1) / gridDim.x);
    passes = (end - begin + most - 1) / most;
    of_pass = (end - begin + passes - 1) / passes;
  }
};

}  // namespace dense
}  // namespace mxfp4_sm120
