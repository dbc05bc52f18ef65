// SPDX-License-Identifier: Apache-2.0
// A MoE layer on FP4 tensor cores, for many tokens: activations become FP4 terms (terms.cuh), and grouped GEMMs
// multiply those with the weights as they are, no weight decoded to a number. Around them, what stands around the other
// grouped GEMMs: sorting by expert before, the weighted sum of each token's slots after.
//
// The GEMMs are one persistent launch. Work tiles and their order are those of grouped/scheduler.cuh: gate-up's first,
// down's when gate-up has finished their token block. Tokens are operand A, weights operand B.
#include <algorithm>
#include <string>
#include <utility>

#include "../dispatch.h"
#include "epilogue.cuh"
#include "fp4.h"
#include "workspace.h"

#ifndef MXFP4_SM120_FP4_ARCHITECTURES
#define MXFP4_SM120_FP4_ARCHITECTURES ""
#endif

namespace mxfp4_sm120 {
namespace fp4 {
namespace {

// x, bf16 [M, H], as records. A thread has eight values, a quad a block of 32.
template <int TERMS>
__global__ void __launch_bounds__(256) tokens_to_terms(const uint16_t* x, uint8_t* records, int M, int H) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int pieces = steps_of(H) * 8, lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t token = i / pieces;
  const int piece = static_cast<int>(i - token * pieces);
  const bool exists = token < M;
  const uint4 v = load_if(exists && piece * 8 < H, x + (exists ? token * H + piece * 8 : 0));
  const float2 two[4] = {unpack_bf16x2(v.x), unpack_bf16x2(v.y), unpack_bf16x2(v.z), unpack_bf16x2(v.w)};
  float values[8] = {two[0].x, two[0].y, two[1].x, two[1].y, two[2].x, two[2].y, two[3].x, two[3].y};
  uint8_t* const record = records + (token * (pieces / 8) + piece / 8) * record_bytes(TERMS);
  const int q = piece % 4, second = piece / 4 % 2;
  uint32_t scales = 0;  // a byte for each term
  split<TERMS>(values, [&](int term, const uint32_t (&codes)[8], uint32_t scale) {
    scales |= scale << 8 * term;
    const uint32_t word =
        lower_codes({codes[0], codes[1], codes[2], codes[3]}) | upper_codes({codes[4], codes[5], codes[6], codes[7]});
    if (exists) reinterpret_cast<uint32_t*>(record + term * TERM_BYTES)[4 * second + q] = word;
  });
  const uint32_t others = __shfl_xor_sync(~0u, scales, 4);  // of the record's other block
  if (exists && lane % 8 == 0)
    *reinterpret_cast<uint4*>(record + TERMS * TERM_BYTES) = {__byte_perm(scales, others, 0x5140),
                                                              __byte_perm(scales, others, 0x7362), 0, 0};
}

// Has gate-up finished the work tile's token block?
template <typename S>
__device__ __forceinline__ bool is_ready(const Layer& p, const WorkTile& work) {
  return !work.down || load_acquire(p.finished + work.token_block) == grouped::finished_warps<S>(p.gemms[0]);
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) fp4_gemms(const __grid_constant__ Layer p) {
  uint8_t* const smem_bytes = dynamic_shared_memory();
  const uint32_t smem = smem_addr(smem_bytes);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(smem_bytes + S::RING_BYTES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  wait_for_previous_kernel();
  shared.blocks.prepare(p);
  WorkTile work = grouped::work_tile_of<S>(blockIdx.x, p, shared.blocks);
  Loader<S> loader;
  bool filled = false;
  while (work.expert >= 0) {
    if (!filled) {
      if (work.down) wait_for(p.finished + work.token_block, grouped::finished_warps<S>(p.gemms[0]));
      loader.fill(p, work, smem);
    }
    if (threadIdx.x == 0) shared.taken = gridDim.x + atomicAdd(p.taken, 1);
    const Part<S> part(work, p.gemms[work.down].rows / TILE, warp);
    Sums<S> sums = {};
    run<S>(part, sums, loader, smem, steps_of(p.gemms[work.down].K));  // ends with a barrier
    // The next work tile's first stages come while this one's outputs are made; who still has outputs doesn't wait.
    const WorkTile next = grouped::work_tile_of<S>(shared.taken, p, shared.blocks);
    if (next.expert < 0) let_next_kernel_start();
    filled = next.expert >= 0 && __syncthreads_and(is_ready<S>(p, next));
    if (filled) loader.fill(p, next, smem);
    if (work.down) {
      store<false>(S{}, p, work, part, sums);
    } else {
      store<true>(S{}, p, work, part, sums);
      __syncwarp();
      if (lane == 0) add_release(p.finished + work.token_block, 1);
    }
    if (!filled) __syncthreads();  // all have read the next work tile's number
    work = next;
  }
}

Layer layer_of(const MoeArgs& args, const Fp4Workspace& ws) {
  auto in = [](const uint8_t* records) { return reinterpret_cast<const uint16_t*>(records); };
  return {{{args.w13, static_cast<const uint16_t*>(args.w13_bias), in(ws.x), ws.act, 2 * args.I, args.H},
           {args.w2, static_cast<const uint16_t*>(args.w2_bias), in(ws.act), ws.grouped.y, args.H, args.I}},
          ws.grouped.offsets,
          ws.grouped.order,
          ws.grouped.taken,
          ws.grouped.finished,
          args.local_experts,
          activation_of(args.swiglu_oai)};
}

template <int INDEX>
const char* launch(const MoeArgs& args, const Device& device, void* stream) {
  using S = Shape<INDEX>;
  static_assert(BYTES<S> * S::BLOCKS + (S::BLOCKS - 1) * 1024 <= MAX_SHARED_BYTES);
  if (!device.fp4) return "the FP4 kernels are compiled for " MXFP4_SM120_FP4_ARCHITECTURES ", and not for this GPU";
  const Fp4Workspace ws = carve_fp4(args.workspace, args.M, args.H, args.I, args.local_experts, args.top_k, S::TERMS);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t threads = static_cast<int64_t>(args.M) * steps_of(args.H) * 8;
  if (const char* why =
          launch_kernel(tokens_to_terms<S::TERMS>, static_cast<int>((threads + 255) / 256), 256, 0, on,
                        {device.dependent_launch}, static_cast<const uint16_t*>(args.x), ws.x, args.M, args.H))
    return why;
  if (const char* why = route_and_group(args, ws.grouped, device, on)) return why;
  // As of the other grouped GEMMs: so much shared memory that the next kernel's blocks can't squeeze in beside.
  const int bytes = std::max(BYTES<S>, std::min(MAX_SHARED_BYTES, device.shared_bytes / S::BLOCKS - 1024));
  if (const char* why = launch_kernel(fp4_gemms<S>, device.multiprocessors * S::BLOCKS, S::THREADS, bytes, on,
                                      {device.dependent_launch, /*cooperative=*/true}, layer_of(args, ws)))
    return why;
  return combine(args, ws.grouped, device, on);
}

template <int... INDEX>
std::vector<Fp4Configuration> all(std::integer_sequence<int, INDEX...>) {
  return {{"terms" + std::to_string(CONFIGS[INDEX].terms) + "_tokens" + std::to_string(CONFIGS[INDEX].tokens),
           CONFIGS[INDEX].terms,
           CONFIGS[INDEX].tokens,
           {Shape<INDEX>::THREADS, BYTES<Shape<INDEX>>},
           launch<INDEX>}...};
}

}  // namespace
}  // namespace fp4

const std::vector<Fp4Configuration>& fp4_configurations() {
  static const std::vector<Fp4Configuration> table = fp4::all(std::make_integer_sequence<int, fp4::CONFIG_COUNT>());
  return table;
}
bool fp4_runs_here() {
  cudaFuncAttributes found;
  const bool runs = cudaFuncGetAttributes(&found, fp4::fp4_gemms<fp4::Shape<0>>) == cudaSuccess;
  if (!runs) cudaGetLastError();  // so that nobody else meets it
  return runs;
}
std::string fp4_architectures() { return MXFP4_SM120_FP4_ARCHITECTURES; }
int64_t fp4_workspace_bytes(int M, int H, int I, int local_experts, int top_k) {
  return carve_fp4(nullptr, M, H, I, local_experts, top_k, fp4::MAX_TERMS).bytes;
}

}  // namespace mxfp4_sm120
