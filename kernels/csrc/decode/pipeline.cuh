// SPDX-License-Identifier: Apache-2.0
// Rings of stages in shared memory, and how weights get into one.
//
// A ring of 4 stages, of which a work tile of GPT-OSS takes 3:
//
//                     stage 0        stage 1        stage 2        stage 3
//      contents       work tile 0    work tile 0    work tile 0    work tile 1
//      again          work tile 1    work tile 1    work tile 2 ...
//      producer       waits for `empty` (all MMA warps have arrived), copies, which completes `full`
//      MMA warps      wait for `full`, multiply, arrive at `empty`; each multiplies its own 3 of the stage's 30 tiles
//
// Both barriers turn over once a round, and who waits says for which by the round's parity.
#pragma once
#include "../common/ptx.cuh"

namespace mxfp4_sm120 {
namespace decode {

// A ring's stages pass from those who fill them to those who empty them and back: two mbarriers each.
struct Ring {
  uint32_t bars;
  int size, stage = 0, parity = 0;
  __device__ __forceinline__ void init(int fillers, int users) const {
    for (int s = 0; s < size; ++s) {
      if (fillers > 0) mbar_init(bars + s * 16, fillers);
      mbar_init(bars + s * 16 + 8, users);
    }
  }
  __device__ __forceinline__ uint32_t full() const { return bars + stage * 16; }
  __device__ __forceinline__ uint32_t empty() const { return bars + stage * 16 + 8; }
  __device__ __forceinline__ void wait_full() const { mbar_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { mbar_wait(empty(), parity ^ 1); }  // at once in the first round
  __device__ __forceinline__ void advance() {
    if (++stage == size) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// From sm_90 on, one lane copies for the warp, in bulk.
#if __CUDA_ARCH__ >= 900
constexpr int PRODUCER_LANES = 1;
#else
constexpr int PRODUCER_LANES = 32;
#endif

__device__ __forceinline__ void copy_to_stage(const Ring& ring, uint32_t dst, const void* src, int bytes, int lane) {
  if (lane >= PRODUCER_LANES) return;
#if __CUDA_ARCH__ >= 900
  mbar_expect(ring.full(), bytes);
  bulk_copy(dst, src, bytes, ring.full());
#else
  for (int i = lane * 16; i < bytes; i += 512)
    cp_async16(dst + i, static_cast<const uint8_t*>(src) + i);
  mbar_arrive_after_copies(ring.full());
#endif
}

}  // namespace decode
}  // namespace mxfp4_sm120
