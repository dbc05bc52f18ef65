// SPDX-License-Identifier: Apache-2.0
// The weight tile, which every kernel of the layer reads: its layout, and how a warp decodes it.
#pragma once
#include "fp4.cuh"
#include "ptx.cuh"

namespace mxfp4_sm120 {

// A tile is 32 weight rows x 32 k, 544 bytes: 512 of codes, then one scale byte per row. (Nothing else is called a tile
// but a work tile, what a block computes at a time.) Lane 4g + q of a warp owns 16 bytes of codes, one 32-bit word of
// eight k for each of four rows:
//
//              k   0..7      8..15     16..23    24..31                       bytes
//      row 0      lane 0    lane 1    lane 2    lane 3     first m16, row 0     0..15   lane 0: rows 0..3, k 0..7
//      row 1      lane 0    lane 1    lane 2    lane 3     first m16, row 8    16..31   lane 1: rows 0..3, k 8..15
//      row 2      lane 0    lane 1    lane 2    lane 3     second m16, row 0   ...
//      row 3      lane 0    lane 1    lane 2    lane 3     second m16, row 8  496..511  lane 31: rows 28..31, k 24..31
//      row 4      lane 4    lane 5    lane 6    lane 7     first m16, row 1   512..543  scales of rows 0..31
//      ...
//      row 31     lane 28   lane 29   lane 30   lane 31    second m16, row 15
//
// Rows 4g, 4g + 1 are rows g, g + 8 of the first m16 operand, 4g + 2, 4g + 3 of the second: so, with gate and up
// interleaved, a thread holds gate and up of one output side by side, and its four accumulators of a column are four
// adjacent rows.
constexpr int TILE = 32;
constexpr int TILE_CODES = 512;
constexpr int TILE_BYTES = 544;
constexpr int TILE_CHUNKS = TILE_BYTES / 16;  // 16-byte copies

// 2^SCALE_OFFSET_EXP, which the decoded weights lack (see fp4.cuh).
constexpr float ACCUMULATOR_SCALE = static_cast<float>(1ull << SCALE_OFFSET_EXP);

// The scale bytes of rows 2m and 2m + 1 as bf16 powers of two, in the low and the high half: a byte is bf16's exponent
// field, which begins at bit 7. So 0x7f and 0x80 are 0x3f80 and 0x4000, 1 and 2.
__device__ __forceinline__ uint32_t scales_of_rows(uint32_t four_scales, int m) {
  return __byte_perm(four_scales, 0, ((2 * m + 1) << 12) | (4 << 8) | ((2 * m) << 4) | 4) >> 1;
}

// One tile's codes and scales, as a lane reads them from shared memory.
struct PackedTile {
  uint4 codes;
  uint32_t scales;
};
__device__ __forceinline__ PackedTile load_tile(uint32_t tile, int lane) {
  return {lds128(tile + lane * 16), lds32(tile + TILE_CODES + (lane >> 2) * 4)};
}

// A operands of m16 tile m (0 or 1) for both k16 steps of a 32 x 32 tile.
struct AFragments {
  uint32_t lo[4], hi[4];  // rows g and g+8: pairs k = 8q + {0,1}, {2,3}, {4,5}, {6,7}
};
__device__ __forceinline__ AFragments decode_half_tile(const PackedTile& t, int m) {
  AFragments a;
  decode_word(m == 0 ? t.codes.x : t.codes.z, a.lo);
  decode_word(m == 0 ? t.codes.y : t.codes.w, a.hi);
  const uint32_t scales = scales_of_rows(t.scales, m);
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    a.lo[p] = mul_bf16x2_by_lo(a.lo[p], scales);
    a.hi[p] = mul_bf16x2_by_hi(a.hi[p], scales);
  }
  return a;
}

}  // namespace mxfp4_sm120
