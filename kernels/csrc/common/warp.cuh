// SPDX-License-Identifier: Apache-2.0
// What a warp does together.
#pragma once

namespace mxfp4_sm120 {

// v of this lane and of those below it, added up.
__device__ __forceinline__ int inclusive_scan(int v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int up = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += up;
  }
  return v;
}

}  // namespace mxfp4_sm120
