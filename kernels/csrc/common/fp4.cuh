// SPDX-License-Identifier: Apache-2.0
// From packed FP4 codes to BF16 pairs: the arithmetic that every kernel spends per weight.
#pragma once
#include <cstdint>

namespace mxfp4_sm120 {

// A weight is fp4 * 2^(s - 127), s its block's E8M0 scale. decode_word leaves an FP4 code's three low bits on BF16's
// bits 8..6, which reads as fp4 * 2^-126 (0.5 is BF16's subnormal 2^-127). Multiplied by a BF16 whose exponent field is
// the stored scale byte, 2^(byte - 127), and, once per output, by 2^48: byte = s + 126 - 48. 48 centres the usable
// scales on what checkpoints hold: s = 43..176 (2^-84..2^49) gives exact weights; below 43 the product would round (0.5
// * 2^(43 - 127 - 48) = 2^-133 is BF16's smallest number), above 176 the byte overflows. `prepare` refuses others.
constexpr int SCALE_OFFSET_EXP = 48;
constexpr int SCALE_BYTE_BIAS = 126 - SCALE_OFFSET_EXP;

// Sign on bit 15, exponent and mantissa on bits 8..6, in both halves.
constexpr uint32_t FP4_IN_BF16_MASK = 0x81C081C0u;

// The eight codes of a word (k = 0..7), as four BF16 pairs: out[p] holds k = 2p in its low half and k = 2p + 1 in its
// high half, each fp4 * 2^-126.
//
// Where a code's four bits lie is free, since weights are shuffled once at load: pair 0 lies in place, 1 and 2 a shift
// away, and 3 fills what remains, {10, 9, 1, 0} of each half, such that r ^ (r << 8) shows it (the bits that this picks
// up from other codes are known to the encoder, which XORs them in; layout.py has the inverse). Eight
// instructions for eight weights: 16 bits can't be four translates of {15, 8, 7, 6}, and a search over rotations, byte
// permutes, funnel shifts and integer multiply-adds found no seven. Of the eight, the three left shifts may issue as
// IMAD beside the ALU's five. The rotation moves bits between halves, which costs nothing and admits this solution.
__host__ __device__ __forceinline__ void decode_word(uint32_t w, uint32_t out[4]) {
#ifdef __CUDA_ARCH__
  const uint32_t r = __funnelshift_l(w, w, 6);
#else
  const uint32_t r = w << 6 | w >> 26;
#endif
  out[0] = w & FP4_IN_BF16_MASK;
  out[1] = (w << 4) & FP4_IN_BF16_MASK;
  out[2] = (r << 4) & FP4_IN_BF16_MASK;
  out[3] = (r ^ (r << 8)) & FP4_IN_BF16_MASK;
}

}  // namespace mxfp4_sm120
