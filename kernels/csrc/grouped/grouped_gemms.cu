// SPDX-License-Identifier: Apache-2.0
// Grouped GEMMs over experts, for more tokens than the decode kernel takes: gate-up (with SwiGLU) and down, one launch.
//
// A persistent grid. A work tile (scheduler.cuh) is a token block of one expert by a block of weight rows, of gate-up
// or of down. Gate-up's come first; down's wait until gate-up has finished their token block, which it has long done as
// a rule, so that only the end of all has blocks without work. Threads fill a ring of shared-memory stages with
// cp.async, ahead of the arithmetic and across work tiles: packed weights and gathered token rows. Warps decode weights
// straight into A operands, in registers, and never write a decoded weight anywhere.
//
//      time ->
//      copies        stage 0 | 1 | 2 | 3 | 4 | 5 | 0 | 1 | 2 ...              the last stages are the next work tile's
//      tensor cores              0   | 1 | 2 | 3 | 4 | 5 | 0 | ...
//      decoding              0  0'|1 1'|2 2'|3 3'| ...                        upper and lower half of a stage's tile
//
// On an H100 a product (m16n8k16) takes 6 cycles of its scheduler, and every other instruction, whatever it does, adds
// about 0.5 to 0.7, as if they shared the register file's ports. So other instructions are what to save. A warp has 32
// rows and all of the block's tokens, which decodes a weight once for as many products as there are tokens; the warps
// of a block share the tokens. With 144 tokens a tile of K costs a warp 72 products and 103 other instructions: 52 to
// decode, 20 to read shared memory, the rest copies, addresses, barrier and loop. There is no producer warp: it would
// take registers that the accumulators need.
#include <algorithm>
#include <string>
#include <utility>

#include "../dispatch.h"
#include "epilogue.cuh"
#include "main_loop.cuh"

namespace mxfp4_sm120 {
namespace grouped {
namespace {

template <typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) grouped_gemms(const __grid_constant__ Layer p) {
  uint8_t* const smem_bytes = dynamic_shared_memory();
  const uint32_t smem = smem_addr(smem_bytes);
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(smem_bytes + S::RING_BYTES);
  constexpr int STAGES = S::STAGES, STAGE_BYTES = S::STAGE_BYTES, COLUMN_GROUPS = S::COLUMN_GROUPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  wait_for_previous_kernel();
  shared.blocks.prepare(p);
  // Blocks take work tiles as they come free, from a counter, so many turns before they come: the ring runs ahead. The
  // first ones are dealt: of the second turn in reverse, for the longer ones not to come together, unless down's are
  // among them, which then find a block that has been through gate-up.
  auto ahead = [&] { return 2 + STAGES / (min(p.gemms[0].K, p.gemms[1].K) / TILE); };
  if (threadIdx.x < ahead()) {
    const int turn = threadIdx.x, blocks = gridDim.x;
    const bool reverse = turn % 2 == 1 && shared.blocks.gate_up_work_tiles(p) >= 2 * blocks;
    shared.taken[turn] = turn * blocks + (reverse ? blocks - 1 - blockIdx.x : blockIdx.x);
  }
  __syncthreads();
  Loader<S> loader(p, shared);
  uint32_t stage = 0;
  for (int turn = 0;; ++turn) {
    if (turn == loader.turn) {  // the first, or one that wasn't ready yet when its tokens were to be fetched
      const WorkTile work = loader.next();
      if (work.expert < 0) break;
      __syncthreads();
      loader.begin_when_ready(work);
      for (int s = 0; s < STAGES; ++s) {
        loader.load_stage(smem + s * STAGE_BYTES + warp * TILE_BYTES + lane * 16,
                          smem + s * STAGE_BYTES + S::WEIGHT_BYTES + threadIdx.x * 16, 0);
        loader.advance(1);
        if (--loader.left == 0) loader.begin_if_ready();
      }
      cp_async_wait<STAGES - 1>();
      __syncthreads();
      stage = 0;
    }
    const WorkTile& work = shared.work_tiles[turn % TURNS];
    float acc[2][COLUMN_GROUPS][4] = {};
    {
      const Part<S> part(work, p.gemms[work.down].rows / TILE, warp);
      int column_group = part.column_group, k_tiles = p.gemms[work.down].K / TILE;
      run<S>(part.column_groups, acc, loader, smem, column_group, k_tiles, stage);
    }
    int taken = 0;
    if (threadIdx.x == 0) taken = atomicAdd(p.taken, 1);
    const Part<S> part(work, p.gemms[work.down].rows / TILE, warp);  // again, for not to keep it in registers
    if (work.down) {
      store<false>(S{}, p, work, part, acc);
    } else {
      store<true>(S{}, p, work, part, acc);
      __syncwarp();
      if (lane == 0) add_release(p.finished + work.token_block, 1);
    }
    if (threadIdx.x == 0) shared.taken[(turn + ahead()) % TURNS] = ahead() * gridDim.x + taken;
  }
}

Layer layer_of(const MoeArgs& args, const GroupedWorkspace& ws) {
  return {{{args.w13, static_cast<const uint16_t*>(args.w13_bias), static_cast<const uint16_t*>(args.x), ws.act,
            2 * args.I, args.H},
           {args.w2, static_cast<const uint16_t*>(args.w2_bias), ws.act, ws.y, args.H, args.I}},
          ws.offsets,
          ws.order,
          ws.taken,
          ws.finished,
          args.local_experts,
          activation_of(args.swiglu_oai)};
}

template <int INDEX>
const char* launch(const MoeArgs& args, const Device& device, void* stream) {
  using S = Shape<INDEX>;
  static_assert(BYTES<S> * S::BLOCKS + (S::BLOCKS - 1) * 1024 <= MAX_SHARED_BYTES && 2 + S::STAGES < TURNS);
  const GroupedWorkspace ws = carve(args).grouped;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  // Asks for so much shared memory that the next kernel's blocks, which may start early, can't squeeze in beside and
  // land unevenly (a block's first KB is the system's).
  const int bytes = std::max(BYTES<S>, std::min(MAX_SHARED_BYTES, device.shared_bytes / S::BLOCKS - 1024));
  if (const char* why = route_and_group(args, ws, device, on)) return why;
  if (const char* why = launch_kernel(grouped_gemms<S>, device.multiprocessors * S::BLOCKS, S::THREADS, bytes, on,
                                      {device.dependent_launch, /*cooperative=*/true}, layer_of(args, ws)))
    return why;
  return combine(args, ws, device, on);
}

template <int... INDEX>
std::vector<Configuration> all(std::integer_sequence<int, INDEX...>) {
  return {{"tokens" + std::to_string(CONFIGS[INDEX].tokens),
           {},
           {Shape<INDEX>::THREADS, BYTES<Shape<INDEX>>},
           launch<INDEX>}...};
}

}  // namespace
}  // namespace grouped

std::vector<Configuration> grouped_configurations() {
  return grouped::all(std::make_integer_sequence<int, grouped::CONFIG_COUNT>());
}

}  // namespace mxfp4_sm120
