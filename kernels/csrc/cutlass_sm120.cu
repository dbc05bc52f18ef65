// SPDX-License-Identifier: Apache-2.0
// Compile-only: `build.sh --cutlass` compiles this and nothing calls it. It has never run.
//
// CUTLASS's grouped GEMM on SM120's block-scaled tensor cores: MXFP8 activations times MXFP4 weights, one problem per
// expert. Twice the arithmetic of bf16 mma.sync, which pays for long prompts only, and at a price that this plugin's
// kernels don't ask: activations are rounded to FP8, and TMA wants rows of 4-bit values in multiples of 128, so that
// GPT-OSS's 2880 is padded to 2944. Kept compiling so that it can be tried on a card when someone has one.
#include <cuda_bf16.h>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#if !defined(CUTLASS_ARCH_MMA_SM120_SUPPORTED) && !defined(CUTLASS_ARCH_MMA_SM121_SUPPORTED) && defined(__CUDA_ARCH__)
#error "cutlass_sm120.cu needs -arch=sm_120a: block-scaled mma is in no other target"
#endif

namespace mxfp4_sm120 {
namespace {

using cute::_1;
using cute::_128;
using cute::Shape;

using Activation = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
using Weight = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
using Output = cutlass::bfloat16_t;
constexpr int ALIGN_ACTIVATION = 16;  // 16 bytes
constexpr int ALIGN_WEIGHT = 128;     // TMA unpacks 4-bit values beside 8-bit ones in runs of 128
constexpr int ALIGN_OUTPUT = 8;       // 16 bytes

using Problem = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using Tile = Shape<_128, _128, _128>;
using Cluster = Shape<_1, _1, _1>;  // SM120 has no multicast to share loads by
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor*, ALIGN_OUTPUT, Output, RowMajor*,
    ALIGN_OUTPUT, cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassBlockScaledTensorOp, Activation, RowMajor*, ALIGN_ACTIVATION, Weight,
    ColumnMajor*, ALIGN_WEIGHT, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;

}  // namespace

using GroupedGemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
static_assert(sizeof(typename Kernel::SharedStorage) <= 99 * 1024, "more shared memory than SM120 gives a block");

// All pointer arrays, strides and scale layouts of `arguments` lie on the device, one entry per expert.
cutlass::Status grouped_gemm(const typename GroupedGemm::Arguments& arguments, void* workspace, cudaStream_t stream) {
  GroupedGemm gemm;
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, workspace, stream);
  return status == cutlass::Status::kSuccess ? gemm.run(stream) : status;
}

}  // namespace mxfp4_sm120
