// SPDX-License-Identifier: Apache-2.0
// FP16 as CUDA has it, for the emulator.
#pragma once
#include "emulator.h"

struct __half2 {
  uint16_t x, y;
};

inline float fp16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits >> 15 ? -size : size;
}
// To the nearest, ties to even.
inline uint16_t float_to_fp16(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return 0x7fff;
  const float size = std::fabs(v);
  if (size >= 65520.f) return sign | 0x7c00;
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int steps =
      static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 2^10 steps from 2^e to 2^(e+1)
  return sign | static_cast<uint16_t>((exponent + 14 << 10) + steps);     // a carry goes on into the exponent
}
inline __half2 __floats2half2_rn(float x, float y) { return {float_to_fp16(x), float_to_fp16(y)}; }
inline float2 __half22float2(__half2 v) { return {fp16_to_float(v.x), fp16_to_float(v.y)}; }
