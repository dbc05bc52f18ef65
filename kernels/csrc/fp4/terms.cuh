// SPDX-License-Identifier: Apache-2.0
// Activations as a sum of FP4 terms: x = q1 s1 + q2 s2 + ..., q e2m1 codes and s a power of two for each 32 values
// along K; each term has the rest of those before it.
#pragma once
#include "../common/ptx.cuh"
#include "terms.h"

namespace mxfp4_sm120 {
namespace fp4 {

// Four codes of a word: k = 0 .. 3 and k = 4 .. 7, as K_OF_NIBBLE places them.
__device__ __forceinline__ uint32_t lower_codes(const uint32_t (&c)[4]) {
  return c[2] | c[0] << 4 | c[3] << 16 | c[1] << 20;
}
__device__ __forceinline__ uint32_t upper_codes(const uint32_t (&c)[4]) {
  return c[0] << 8 | c[2] << 12 | c[1] << 24 | c[3] << 28;
}

// y to e2m1: to the nearest, ties to the even code, 6 at most; the sign is y's, also of zero. Adding 2^22 to what is
// below 2 rounds it to halves, and so on with the power of two below y.
struct Rounded {
  uint32_t code;
  float value;
};
__device__ __forceinline__ Rounded round_to_e2m1(float y) {
  const uint32_t sign = __float_as_uint(y) & 0x80000000u;
  const float size = fabsf(y);
  const uint32_t power = max(__float_as_uint(size) & 0x7f800000u, 0x3f800000u);
  const float large = __uint_as_float(power + (22u << 23));
  const float rounded = fminf((size + large) - large, 6.f);
  // An e2m1 code is a float's highest bits, but for the exponent's offset: 126 less.
  const uint32_t code = __float_as_uint(rounded * 0x1p-126f) >> 22;
  return {code | sign >> 28, __uint_as_float(__float_as_uint(rounded) | sign)};
}

// The terms of a block that the lanes of a quad have 8 values each of: emit(term, codes, scale) for each. The scale is
// the smallest 2^(s - 127) with amax <= 7 times it, s at most 252; with NaN or infinity in the block it is 255 (NaN),
// and all codes 0. terms.py has the same rule, to the bit.
template <int TERMS, typename Emit>
__device__ __forceinline__ void split(float (&rest)[8], Emit emit) {
  bool bad = false;
#pragma unroll
  for (int term = 0; term < TERMS; ++term) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      largest = max(largest, __float_as_uint(rest[i]) & 0x7fffffffu);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    if (term == 0) bad = largest >= 0x7f800000u;
    const int s = min(max(static_cast<int>((largest + 0x1fffffu) >> 23) - 2, 0), 252);
    const float scale = __uint_as_float(s == 0 ? 0x00400000u : static_cast<uint32_t>(s) << 23);
    const float inverse = __uint_as_float(static_cast<uint32_t>(254 - s) << 23);
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Rounded q = round_to_e2m1(rest[i] * inverse);
      codes[i] = bad ? 0 : q.code;
      rest[i] = fmaf(-q.value, scale, rest[i]);
    }
    emit(term, codes, bad ? 255u : static_cast<uint32_t>(s));
  }
}

}  // namespace fp4
}  // namespace mxfp4_sm120
