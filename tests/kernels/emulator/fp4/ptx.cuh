// SPDX-License-Identifier: Apache-2.0
// kernels/csrc/fp4/ptx.cuh, emulated: the same functions by the PTX manual's
// words. emulated.py defines MXFP4_SM120_BLOCK_SCALED for cards that have the
// block-scaled product.
#pragma once
#include "../common/ptx.cuh"
#include "../cuda_fp16.h"

namespace mxfp4_sm120 {

inline uint32_t lds8(uint32_t a) { return emu::load_shared<uint8_t>(a); }

// PTX ISA, "ldmatrix": thread 8m + r has the address of row r of matrix m.
inline void load_matrices(uint32_t (&v)[4], uint32_t a) {
  struct Operands {
    uint32_t *v;
    uint4 row;
  } mine{v, emu::load_shared<uint4>(a)};
  emu::together(mine, [](Operands **all) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        const uint4 &row = all[8 * m + (l >> 2)]->row;
        const uint32_t words[4] = {row.x, row.y, row.z, row.w};
        all[l]->v[m] = words[l & 3];
      }
  });
}

// d += a * b of one warp, all operands as matrices: what an mma computes once
// it is known what lies where. One rounding.
template <int K, typename A, typename B>
void multiply_add(float (&d)[16][8], const A &a, const B &b) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = d[row][column];
      for (int k = 0; k < K; ++k)
        sum += static_cast<double>(a[row][k]) * b[k][column];
      d[row][column] = static_cast<float>(sum);
    }
}

// The accumulators of every m16n8: rows lane / 4 and 8 more, columns 2 (lane %
// 4) and the next.
template <typename Operands>
void gather_sums(float (&d)[16][8], Operands **all, bool back) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      float &at = d[(l >> 2) + 8 * (i / 2)][2 * (l & 3) + i % 2];
      if (back)
        all[l]->d[i] = at;
      else
        at = all[l]->d[i];
    }
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
inline void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                     uint32_t a3, uint32_t b0, uint32_t b1) {
  struct Operands {
    float *d;
    uint32_t a[4], b[2];
  } mine{d, {a0, a1, a2, a3}, {b0, b1}};
  emu::together(mine, [](Operands **all) {
    float a[16][16], b[16][8], sums[16][8];
    for (int l = 0; l < 32; ++l)
      for (int h = 0; h < 2; ++h) {
        for (int r = 0; r < 4; ++r)
          a[(l >> 2) + 8 * (r % 2)][2 * (l & 3) + h + 8 * (r / 2)] =
              fp16_to_float(all[l]->a[r] >> 16 * h & 0xffff);
        for (int r = 0; r < 2; ++r)
          b[2 * (l & 3) + h + 8 * r][l >> 2] =
              fp16_to_float(all[l]->b[r] >> 16 * h & 0xffff);
      }
    gather_sums(sums, all, false);
    multiply_add<16>(sums, a, b);
    gather_sums(sums, all, true);
  });
}

// "OCP Microscaling Formats (MX)", 5.3.3 and 5.4.1.
inline double e2m1_value(uint32_t code) {
  static const double sizes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -sizes[code & 7] : sizes[code & 7];
}
inline double e8m0_value(uint32_t byte) {
  return byte == 255 ? NAN : std::ldexp(1.0, static_cast<int>(byte) - 127);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k64" (element i of A in row groupID
// where i < 8 or 16 <= i < 24, else 8 more, column 8 threadID_in_group + i % 8,
// from i = 16 on 32 more; of B alike), "Block Scaling for mma.sync" (a quad's
// lanes thread-id, of A a pair of lanes, supply the scales; of .scale_vec::2X
// byte-id and the next, for each half of K).
template <int A_BYTE, int A_THREAD, int B_BYTE, int B_THREAD>
void mma_mxf4_instruction(float (&d)[4], const uint32_t (&a)[4],
                          const uint32_t (&b)[2], uint32_t scales_a,
                          uint32_t scales_b) {
  struct Operands {
    float *d;
    const uint32_t *a, *b;
    uint32_t scales_a, scales_b;
  } mine{d, a, b, scales_a, scales_b};
  emu::together(mine, [](Operands **all) {
    double a[16][64], b[64][8];
    float sums[16][8];
    for (int l = 0; l < 32; ++l) {
      const int group = l >> 2, in_group = l & 3;
      for (int i = 0; i < 32; ++i) {
        const int row = i < 8 || (i >= 16 && i < 24) ? group : group + 8;
        const int k = 8 * in_group + (i & 7) + (i < 16 ? 0 : 32);
        const int supplier = 4 * group + 2 * A_THREAD + (row < 8 ? 0 : 1);
        const uint32_t scale =
            all[supplier]->scales_a >> 8 * (A_BYTE + k / 32) & 0xff;
        a[row][k] =
            e2m1_value(all[l]->a[i / 8] >> 4 * (i % 8)) * e8m0_value(scale);
      }
      for (int i = 0; i < 16; ++i) {
        const int k = 8 * in_group + (i & 7) + (i < 8 ? 0 : 32);
        const uint32_t scale =
            all[4 * group + B_THREAD]->scales_b >> 8 * (B_BYTE + k / 32) & 0xff;
        b[k][group] =
            e2m1_value(all[l]->b[i / 8] >> 4 * (i % 8)) * e8m0_value(scale);
      }
    }
    gather_sums(sums, all, false);
    multiply_add<64>(sums, a, b);
    gather_sums(sums, all, true);
  });
}

} // namespace mxfp4_sm120
