// SPDX-License-Identifier: Apache-2.0
// The activation between the two GEMMs.
#pragma once
#include "ptx.cuh"

namespace mxfp4_sm120 {

__device__ __forceinline__ float sigmoid(float x) {  // good to some 2^-21; 0 where exp(-x) is infinite
  return approximate_reciprocal(1.f + approximate_exp2(-1.4426950408889634f * x));
}
// gate * sigmoid(alpha gate) * (up + shift), gate clamped from above and up from both sides to `limit`: GPT-OSS's
// SwiGLU, or silu(gate) * up.
struct Activation {
  float limit, alpha, shift;
};
__host__ __device__ __forceinline__ Activation activation_of(bool swiglu_oai) {
  return swiglu_oai ? Activation{7.f, 1.702f, 1.f} : Activation{INFINITY, 1.f, 0.f};
}
// NaN stays NaN. Numbers rather than a flag: a branch would keep the compiler from overlapping one output's arithmetic
// with another's.
__device__ __forceinline__ float activate(float gate, float up, const Activation& a) {
  gate = min_nan(gate, a.limit);
  up = max_nan(min_nan(up, a.limit), -a.limit);
  return gate * sigmoid(a.alpha * gate) * (up + a.shift);
}

}  // namespace mxfp4_sm120
