// SPDX-License-Identifier: Apache-2.0
// The epilogue: what becomes of a work tile's sums.
#pragma once
#include "../common/pack.cuh"
#include "main_loop.cuh"

namespace mxfp4_sm120 {
namespace fp4 {

// Eight adjacent rows' biases, as floats.
__device__ __forceinline__ void load_bias(float (&bias)[8], const Gemm& p, int expert, int row, float scale) {
  uint4 v{0, 0, 0, 0};
  if (p.bias != nullptr) v = *reinterpret_cast<const uint4*>(p.bias + static_cast<int64_t>(expert) * p.rows + row);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack_bf16x2(words[i]);
    bias[2 * i] = two.x * scale;
    bias[2 * i + 1] = two.y * scale;
  }
}

// A token's 32 activations from a warp's 64 rows, of which lane q of a quad has values 4q .. 4q + 3 (of the first tile
// row) and 16 + 4q ..: as terms, half a record. `last`: K ends with it, so that the record's other half is nobody's.
template <int TERMS>
__device__ __forceinline__ void store_terms(uint8_t* record, int second, bool exists, bool last, float (&values)[8]) {
  const int q = threadIdx.x & 3, odd = q & 1;
  uint32_t my_scale = 0;  // lane q keeps term q's
  split<TERMS>(values, [&](int term, const uint32_t (&codes)[8], uint32_t scale) {
    if (q == term) my_scale = scale;
    // Four codes are half a word, and the other half is the neighbour's: an even lane makes the word of the first tile
    // row, an odd one that of the second.
    const uint32_t first[4] = {codes[0], codes[1], codes[2], codes[3]};
    const uint32_t other[4] = {codes[4], codes[5], codes[6], codes[7]};
    const uint32_t of_first = odd ? upper_codes(first) : lower_codes(first);
    const uint32_t of_other = odd ? upper_codes(other) : lower_codes(other);
    const uint32_t word = (odd ? of_other : of_first) | __shfl_xor_sync(~0u, odd ? of_first : of_other, 1);
    uint32_t* const at =
        reinterpret_cast<uint32_t*>(record + term * TERM_BYTES + second * CODE_BYTES) + 2 * odd + q / 2;
    if (exists) *at = word;
    if (exists && last) at[CODE_BYTES / 4] = 0;
  });
  uint8_t* const scales = record + TERMS * TERM_BYTES;
  if (!exists) return;
  scales[2 * q + second] = static_cast<uint8_t>(my_scale);
  if (last) scales[2 * q + 1] = 0;
  if (second == 0) *reinterpret_cast<uint16_t*>(scales + 8 + 2 * q) = 0;
}

// gate-up: a token's sums -> activations -> terms.
template <typename S>
__device__ __forceinline__ void store_gate_up(S, const Layer& p, const float (&sums)[4 * TILE_ROWS][4], int half,
                                              const float (&bias)[TILE_ROWS][8], int block, int slot, bool exists) {
  const int K = p.gemms[1].K;
  float values[8];
#pragma unroll
  for (int t = 0; t < TILE_ROWS; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * half + i / 2, r = 4 * t + i % 2 * 2;
      const float gate = sums[r][column] * SUM_SCALE + bias[t][2 * i];
      const float up = sums[r + 1][column] * SUM_SCALE + bias[t][2 * i + 1];
      values[4 * t + i] = activate(gate, up, p.activation);
    }
  uint8_t* const record =
      static_cast<uint8_t*>(p.gemms[0].out) + (static_cast<int64_t>(slot) * steps_of(K) + block / 2) * S::RECORD_BYTES;
  store_terms<S::TERMS>(record, block % 2, exists, block % 2 == 0 && (block + 1) * BLOCK == K, values);
}

// down: a token's sums, packed by four, of one tile row.
__device__ __forceinline__ void store_down(const Gemm& p, const float (&sums)[4 * TILE_ROWS][4], int half,
                                           const float (&bias)[8], int t, int slot, int row) {
  constexpr float scale = SUM_SCALE * PACKED_SCALE;
  uint2 packed[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float v[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      v[r] = sums[4 * t + r][2 * half + c] * scale + bias[4 * c + r];
    packed[c] = pack_four(v);
  }
  uint4* const at =
      reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + (static_cast<int64_t>(slot) * p.rows + row) * 2);
  __stcs(at, uint4{packed[0].x, packed[0].y, packed[1].x, packed[1].y});
}

// A warp's outputs of a work tile.
template <bool GATE_UP, typename S>
__device__ __forceinline__ void store(S, const Layer& p, const WorkTile& work, const Part<S>& part,
                                      const Sums<S>& sums) {
  const Gemm& gemm = p.gemms[!GATE_UP];
  const int lane = threadIdx.x % 32, tile_rows = gemm.rows / TILE;
  if (part.tile_row >= tile_rows) return;
  float bias[TILE_ROWS][8];
#pragma unroll
  for (int t = 0; t < TILE_ROWS; ++t)
    load_bias(bias[t], gemm, work.expert, min(part.tile_row + t, tile_rows - 1) * TILE + 8 * (lane & 3),
              GATE_UP ? 1.f : PACKED_SCALE);
#pragma unroll
  for (int m = 0; m < S::M_TILES; ++m) {
    if (m >= part.m_tiles) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = 16 * (part.m_tile + m * part.m_stride) + 8 * half + (lane >> 2);
      const bool exists = token < work.tokens;
      if constexpr (GATE_UP) {
        store_gate_up(S{}, p, sums[m], half, bias, part.tile_row / TILE_ROWS, work.begin + token, exists);
      } else {
#pragma unroll
        for (int t = 0; t < TILE_ROWS; ++t)
          if (exists && part.tile_row + t < tile_rows)
            store_down(gemm, sums[m], half, bias[t], t, work.begin + token,
                       (part.tile_row + t) * TILE + 8 * (lane & 3));
      }
    }
  }
}

}  // namespace fp4
}  // namespace mxfp4_sm120
