// SPDX-License-Identifier: Apache-2.0
// The weight tile as operand B of a block-scaled product.
#pragma once
#include "../common/weight_tile.cuh"
#include "ptx.cuh"

namespace mxfp4_sm120 {
namespace fp4 {

// Word r of lane 4g + q of a tile is row 4g + r, k = 8q .. 8q + 7: column g, k = 8q .. of an operand whose columns are
// rows r, 4 + r, 8 + r ... So two tiles along K are operand B of four products, and the four columns g of those are
// four adjacent rows: with gate and up interleaved, one lane has both halves of an output.

// A word of a tile is coded for decode_word (common/fp4.cuh): these are its bits, by code. From it, the same codes as
// e2m1, in an order of their own: code K_OF_NIBBLE[i] in bits 4i .. 4i + 3. Activations are laid down in that order too
// (terms.cuh). Twelve instructions, beside 12 (terms) products of 16 cycles for each word.
//
//      bit of a half   15  14 13 12  11  10  9  8 7 6   5   4 3 2   1  0        s: sign, m: exponent and mantissa
//      word            s0  m4 . .    s1  (6,7)  m0 . .  s4  m2 . .  (6,7)       of codes 0, 2, 4, 6 (low half); m4 and
//      word, rotated   ..            s4         m6      ..  m4                  its neighbours change halves
//
// The rotated word shows codes 4 and 5 as the word shows 2 and 3, and xored with itself shows 6 and 7 as 0 and 1.
constexpr int K_OF_NIBBLE[8] = {2, 0, 4, 6, 3, 1, 5, 7};

__host__ __device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}
__host__ __device__ __forceinline__ uint32_t rotate_left(uint32_t v, int by) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(v, v, by);
#else
  return v << by | v >> (32 - by);
#endif
}
__host__ __device__ __forceinline__ uint32_t e2m1_word(uint32_t w) {
  constexpr uint32_t UPPER = 0x01c001c0u, LOWER = 0x001c001cu;  // m of codes in bits 8 .. 6 and 4 .. 2
  constexpr uint32_t LOWER_SIGN = 0x00200020u, BYTE = 0x03fc03fcu;
  const uint32_t r = rotate_left(w, 6), v = r ^ (r << 8);
  // Signs of codes at bits 15 and 11 come to bits 9 and 5, above their m: one byte in bits 9 .. 2 of each half.
  const uint32_t first = select(UPPER | LOWER, w, w >> 6);
  const uint32_t second = select(UPPER, v, select(LOWER, r, select(LOWER_SIGN, w, v >> 6)));
  return rotate_left(select(BYTE, first, rotate_left(second, 8)), 30);
}

// A weight's scale byte in the tile is 78 more than the checkpoint's, which is 43 to 176 (common/fp4.cuh). As the scale
// of a product it is 43 less: sums have room for the largest activations, and the epilogue gives 2^43 back.
constexpr int SCALE_BIAS = SCALE_BYTE_BIAS + 43;
constexpr float SUM_SCALE = static_cast<float>(1ull << 43);

// Of two tile rows, one above the other, 64 of K as they lie in shared memory: two tiles each.
constexpr int TILE_ROWS = 2;  // of a warp
struct PackedWeights {
  uint4 codes[TILE_ROWS][2];
  uint32_t scales;  // of row `lane` of both: bytes 0, 1 the first tile row's two tiles, 2, 3 the second's
};
__device__ __forceinline__ PackedWeights load_weights(uint32_t tiles, int lane) {
  PackedWeights p;
  uint32_t bytes[TILE_ROWS][2];
#pragma unroll
  for (int t = 0; t < TILE_ROWS; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t tile = tiles + (2 * t + h) * TILE_BYTES;
      p.codes[t][h] = lds128(tile + lane * 16);
      bytes[t][h] = lds8(tile + TILE_CODES + lane);
    }
  p.scales = (bytes[0][0] | bytes[0][1] << 8 | bytes[1][0] << 16 | bytes[1][1] << 24) - SCALE_BIAS * 0x01010101u;
  return p;
}

// Operands B of eight products: the columns of 4t + r are rows r, 4 + r, .. of tile row t.
struct WeightFragments {
  uint32_t b[4 * TILE_ROWS][2];
  uint32_t scales;  // lane 4g + r has those of row 4g + r, that is, of column g of products r and 4 + r
};
__device__ __forceinline__ WeightFragments fragments_of(const PackedWeights& p) {
  WeightFragments f;
#pragma unroll
  for (int t = 0; t < TILE_ROWS; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      f.b[4 * t][h] = e2m1_word(p.codes[t][h].x);
      f.b[4 * t + 1][h] = e2m1_word(p.codes[t][h].y);
      f.b[4 * t + 2][h] = e2m1_word(p.codes[t][h].z);
      f.b[4 * t + 3][h] = e2m1_word(p.codes[t][h].w);
    }
  f.scales = p.scales;
  return f;
}

}  // namespace fp4
}  // namespace mxfp4_sm120
