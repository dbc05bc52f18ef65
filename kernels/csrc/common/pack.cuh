// SPDX-License-Identifier: Apache-2.0
// Floats in fewer bits: pairs of BF16 and FP16, and four numbers in 8 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace mxfp4_sm120 {

__device__ __forceinline__ float2 unpack_bf16x2(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t pack_bf16x2(float lo, float hi) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint16_t to_bf16(float v) { return static_cast<uint16_t>(pack_bf16x2(v, 0.f)); }
__device__ __forceinline__ float2 unpack_fp16x2(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
__device__ __forceinline__ uint32_t pack_fp16x2(float lo, float hi) {
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Four numbers in 8 bytes: FP16s that share a power of two. A number keeps 10 bits, also beside one 2^21 times as
// large; NaN and infinity stay with the number that is one. The largest is scaled to 2^7 .. 2^15, in steps of 2^8, so
// that four bits say which step: each FP16's last one. Sixteen steps are 2^-63 .. 2^65: beyond, a number is infinite;
// below, it keeps 10 bits down to 2^-84. (w2's scales are 2^-84 to 2^49, its sums mostly some hundred times that.)
// With 300 as the largest, whose exponent field is 135, the step is 135 / 8 = 16: all are multiplied by 2^6, 300
// becomes 19200, and 16 - FIRST_STEP = 9 = 0b1001 leaves 1, 0, 0, 1 as last bits.
//
// Numbers come times PACKED_SCALE. A step less or more costs nothing, and without it gate-up's epilogue and down's
// begin with the same arithmetic, which the compiler then has them share: at 80 tokens on sm_120 that spills registers.
constexpr float PACKED_SCALE = 1.f / 256;
constexpr int FIRST_STEP = 7, LAST_STEP = 22;  // of a float's exponent field, by eights: 56 .. 183
constexpr uint32_t STEP_BITS = 0x00010001u;    // of two FP16s
constexpr uint32_t STEP_SPREAD = 1 | 1 << 15;  // a number times this has its bit 0 in bit 0 and its bit 1 in bit 16

__device__ __forceinline__ uint2 pack_four(const float (&v)[4]) {
  const float largest = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
  const int step = min(max(static_cast<int>(__float_as_uint(largest) >> 26), FIRST_STEP), LAST_STEP);
  const float scale = __uint_as_float(((127u + 127 + 7) << 23) - (step << 26));
  const uint32_t bits = (step - FIRST_STEP) * STEP_SPREAD;
  auto with_step = [](uint32_t pair, uint32_t bits) { return (pair & ~STEP_BITS) | (bits & STEP_BITS); };
  return {with_step(pack_fp16x2(v[0] * scale, v[1] * scale), bits),
          with_step(pack_fp16x2(v[2] * scale, v[3] * scale), bits >> 2)};
}
// sum += weight * the four numbers
__device__ __forceinline__ void add_four(float4& sum, uint2 packed, float weight) {
  const uint32_t bits = (packed.x & STEP_BITS) | (packed.y & STEP_BITS) << 2;
  const uint32_t step = FIRST_STEP + ((bits | bits >> 15) & 15);
  // Half of the last bits were 1 when they were overwritten: 2^-11 of a number near 1, and so of a number whose
  // mantissa is as likely to be anything 2^-11 * 0.72 on average. This takes it back.
  constexpr float UNBIASED = 1.000352f;
  const float scale = __uint_as_float((step << 26) - (7u << 23)) * (UNBIASED / PACKED_SCALE) * weight;
  const float2 lo = unpack_fp16x2(packed.x & ~STEP_BITS), hi = unpack_fp16x2(packed.y & ~STEP_BITS);
  sum.x += lo.x * scale;
  sum.y += lo.y * scale;
  sum.z += hi.x * scale;
  sum.w += hi.y * scale;
}

}  // namespace mxfp4_sm120
