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
__device__ __forceinline__ float2 unpack_fp16x2(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
__device__ __forceinline__ uint32_t pack_fp16x2(float lo, float hi) {
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Four numbers in 8 bytes: FP16s of them, scaled so that the largest is just below 2^-7. Then two bits of each FP16 are
// zero, and hold the exponent instead. A number keeps 11 bits, down to 1/64 of the largest; from there on its last bit
// is 2^-17 of it: beside a number a thousand times as large it is as good as in BF16. One of them NaN or infinite: all
// four are NaN. Numbers come divided by 2^12, so that the scale is a float whatever they are.
constexpr float PACKED_SCALE = 1.f / 4096.f;
constexpr uint32_t FREE_BITS = 0x60006000u;

__device__ __forceinline__ uint2 pack_four(const float (&v)[4]) {
  const float largest = max_nan(max_nan(fabsf(v[0]), fabsf(v[1])), max_nan(fabsf(v[2]), fabsf(v[3])));
  // Just below a power of two the exponent is one higher, for FP16 not to round up to 2^-7.
  const uint32_t n = __float_as_uint(largest * (1.f + 1.f / 2048.f)) >> 23;
  const float scale = __uint_as_float((127 + 126 - 7 - n) << 23);
  return {pack_fp16x2(v[0] * scale, v[1] * scale) | (n * (1u << 13 | 1u << 27) & FREE_BITS),
          pack_fp16x2(v[2] * scale, v[3] * scale) | (n * (1u << 9 | 1u << 23) & FREE_BITS)};
}
__device__ __forceinline__ float4 unpack_four(uint2 packed) {
  const uint32_t x = packed.x, y = packed.y;
  const uint32_t n = (x >> 13 & 3) | (x >> 27 & 12) | (y >> 9 & 48) | (y >> 23 & 192);
  const float scale = n == 255 ? NAN : __uint_as_float(n << 23);  // 2^(n - 127)
  constexpr float REST = 256.f / PACKED_SCALE;                    // 2^(n - 119) undoes pack_four's scale
  const float2 lo = unpack_fp16x2(x & ~FREE_BITS), hi = unpack_fp16x2(y & ~FREE_BITS);
  return {lo.x * REST * scale, lo.y * REST * scale, hi.x * REST * scale, hi.y * REST * scale};
}

}  // namespace mxfp4_sm120
