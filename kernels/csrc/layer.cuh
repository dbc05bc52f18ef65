// What every kernel of the layer shares: the tiled weight layout, the tile product, the activation.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.cuh"
#include "ptx.cuh"

namespace mxfp4_sm120 {

// A weight tile is 32 rows x 32 k: 512 bytes of codes, then one scale byte per row. Lane 4g+q owns 16 bytes of codes:
// rows 4g..4g+3 (one 32-bit word each), k 8q..8q+7. Rows 4g, 4g+1 are rows g, g+8 of the first m16 operand, 4g+2, 4g+3
// of the second; with gate and up interleaved, a thread so holds gate and up of one output side by side, and its four
// accumulators of a column are four adjacent rows.
constexpr int TILE = 32;
constexpr int TILE_CODES = 512;
constexpr int TILE_BYTES = 544;
constexpr int TILE_CHUNKS = TILE_BYTES / 16;  // 16-byte copies

// SM120 gives a block 99 KB; every kernel stays within it, so that what runs on a larger card is what runs there.
constexpr int MAX_SHARED_BYTES = 99 * 1024;

// 2^SCALE_OFFSET_EXP, which the decoded weights lack (see decode.cuh).
constexpr float ACCUMULATOR_SCALE = static_cast<float>(1ull << SCALE_OFFSET_EXP);

// The scale bytes of rows 2m and 2m + 1 as bf16 powers of two, in the low and the high half.
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

// v of this lane and of those below it, added up.
__device__ __forceinline__ int inclusive_scan(int v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int up = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += up;
  }
  return v;
}

}  // namespace mxfp4_sm120
