// SPDX-License-Identifier: Apache-2.0
// Compile-only: `build.sh --flashinfer` compiles this and nothing calls it. It has never run.
//
// FlashInfer's own MXFP4 grouped GEMM for SM120 from its headers, with the argument set-up on the device that
// cutlass_sm120.cu leaves to its caller: MXFP8 activations, MXFP4 weights, weight rows as the 128 of the tile (SwapAB)
// since experts see few tokens.
#include <flashinfer/gemm/group_gemm_mxfp4_groupwise_sm120.cuh>

namespace flashinfer::group_gemm {

INSTANTIATE_GROUP_GEMM_MXFP4_GROUPWISE_SM120(128, 32, 128, true, cutlass::float_e4m3_t, cutlass::float_e2m1_t,
                                             cutlass::float_ue8m0_t, cutlass::float_ue8m0_t, cutlass::bfloat16_t,
                                             float_e4m3_t, float_e2m1_t, float_ue8m0_t, float_ue8m0_t, bfloat16_t)

}  // namespace flashinfer::group_gemm
