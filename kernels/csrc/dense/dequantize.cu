// SPDX-License-Identifier: Apache-2.0
// INT8 weights to BF16, each product rounded once: for many tokens, where a library's GEMM does the rest. The time is
// the time to read the codes and to write the weights, to the L2 cache if they fit.
#include "../common/launch.h"
#include "../common/pack.cuh"
#include "dense.h"
#include "weights.cuh"

namespace mxfp4_sm120 {
namespace dense {
namespace {

constexpr int THREADS = 256, CODES = 16;  // of a thread: a load, and two stores
// Of a block: a warp's lanes side by side along K, and rows whose scales are a sector of 32 bytes.
constexpr int LANES = 32, ROWS = THREADS / LANES;

__global__ void __launch_bounds__(THREADS)
    dequantize(const uint4* codes, const uint16_t* scales, uint4* out, int rows, int groups_of_row) {
  wait_for_previous_kernel();  // which may still read what is written here
  let_next_kernel_start();
  const int group = blockIdx.y * LANES + threadIdx.x % LANES, row = blockIdx.x * ROWS + threadIdx.x / LANES;
  if (group >= groups_of_row || row >= rows) return;
  const int64_t i = static_cast<int64_t>(row) * groups_of_row + group;
  const int block = group / (DENSE_BLOCK / CODES);
  const uint4 loaded = load_once_if(true, codes + i);
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  const uint32_t scale = scales_of(scales, rows, block / 2, row)[block % 2];
  const float of_pair = __uint_as_float(scale << 16) * OF_WHOLE;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 whole = unpack_bf16x2(whole_pair(offset_by_128(words[2 * half + j / 2]), j % 2 * 2));
      pairs[j] = pack_bf16x2(whole.x * of_pair, whole.y * of_pair);
    }
    out[2 * i + half] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

}  // namespace
}  // namespace dense

const char* dense_dequantize(const DenseArgs& args, const Device& device, void* stream) {
  const int groups = args.K / dense::CODES;
  const dim3 grid((args.N + dense::ROWS - 1) / dense::ROWS, (groups + dense::LANES - 1) / dense::LANES);
  return launch_kernel(dense::dequantize, grid, dense::THREADS, 0, static_cast<cudaStream_t>(stream),
                       {device.dependent_launch}, static_cast<const uint4*>(args.weight), args.scale,
                       reinterpret_cast<uint4*>(args.out), args.N, groups);
}

}  // namespace mxfp4_sm120
