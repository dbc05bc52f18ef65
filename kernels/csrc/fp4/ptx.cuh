// SPDX-License-Identifier: Apache-2.0
// The PTX instructions that the FP4 kernels need beside those of common/ptx.cuh.
#pragma once
#include <cstdint>

// The block-scaled product exists for sm_120a, sm_121a and their family targets (sm_120f) alone: plain sm_120 and
// portable PTX lack it.
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define MXFP4_SM120_BLOCK_SCALED 1
#elif defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#if __CUDA_ARCH_FAMILY_SPECIFIC__ / 100 == 12
#define MXFP4_SM120_BLOCK_SCALED 1
#endif
#endif

namespace mxfp4_sm120 {

// Four matrices of 8 rows of 16 bytes: lane 8m + r says where row r of matrix m begins, and lane 4g + q gets of each
// matrix word q of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(a));
}
__device__ __forceinline__ uint32_t lds8(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}

// d += a (16 x 16, row) * b (16 x 8, col), fp16 in, fp32 accumulate.
__device__ __forceinline__ void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a (16 x 64, row) * b (64 x 8, col), e2m1 in, a power of two for each 32 along K, fp32 accumulate. mma.cuh says
// what lies where.
template <int A_BYTE, int A_THREAD, int B_BYTE, int B_THREAD>
__device__ __forceinline__ void mma_mxf4_instruction(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                     uint32_t scales_a, uint32_t scales_b) {
#ifdef MXFP4_SM120_BLOCK_SCALED
  asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,%13}, {%11}, {%14,%15};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scales_a), "r"(scales_b), "n"(A_BYTE),
        "n"(A_THREAD), "n"(B_BYTE), "n"(B_THREAD));
#endif
}

}  // namespace mxfp4_sm120
