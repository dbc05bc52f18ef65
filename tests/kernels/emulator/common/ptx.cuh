// SPDX-License-Identifier: Apache-2.0
// kernels/csrc/ptx.cuh, emulated: the same functions by the PTX manual's words.
#pragma once
#include "cuda_bf16.h"
#include <cstring>

namespace mxfp4_sm120 {

inline uint8_t* dynamic_shared_memory() { return emu::shared_memory(); }  // its own, where several blocks run together
inline uint32_t smem_addr(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emu::shared_memory());
}

inline void barrier_arrive(int id, int threads) { emu::arrive(id, threads, false); }
inline void barrier_wait(int id, int threads) { emu::arrive(id, threads, true); }

inline void cp_async16(uint32_t dst, const void* src) { emu::start_copy(dst, src, 16); }
inline void cp_async16_if(bool load, uint32_t dst, const void* src) {
  alignas(16) static const uint8_t zeros[16] = {};
  emu::start_copy(dst, load ? src : zeros, 16);
}
inline void cp_async4_if(bool load, uint32_t dst, const void* src) {
  alignas(4) static const uint8_t zeros[4] = {};
  emu::start_copy(dst, load ? src : zeros, 4);
}
inline void cp_async_commit() { emu::now->groups.emplace_back(); }
template <int PENDING>
void cp_async_wait() {
  emu::wait_for_copies(PENDING);
}

inline void mbar_init(uint32_t bar, int count) {
  if (bar % 8 != 0 || bar + 8 > emu::now->block->shared.size()) emu::fail("an mbarrier leaves shared memory");
  emu::now->block->mbarriers.insert_or_assign(bar, emu::MBarrier{count, count});
}
inline void mbar_arrive(uint32_t bar) { emu::mbarrier_arrive(bar); }
inline void mbar_arrive_after_copies(uint32_t bar) {
  auto& landing = emu::mbarrier(bar).copies;
  for (auto& group : emu::now->groups) {
    landing.insert(landing.end(), group.begin(), group.end());
    group.clear();
  }
  emu::mbarrier_arrive(bar);
}
inline void mbar_wait(uint32_t bar, uint32_t parity) { emu::mbarrier_wait(bar, parity); }
inline void mbar_init_fence() {}

// Of sm_90 and newer.
inline void mbar_expect(uint32_t bar, uint32_t bytes) { emu::mbarrier_arrive(bar, bytes); }
inline void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  if (bytes == 0 || bytes % 16 != 0) emu::fail("a bulk copy of no multiple of 16 bytes");
  const emu::Copy copy = emu::begin_copy(dst, src, bytes);
  if (!emu::late_copies) std::memcpy(copy.to, copy.from, bytes);  // and once more when it lands, which changes nothing
  emu::mbarrier(bar).copies.push_back(copy);
}
inline void prefetch_to_l2(const void*) {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline uint4 lds128(uint32_t a) { return emu::load_shared<uint4>(a); }
inline uint2 lds64(uint32_t a) { return emu::load_shared<uint2>(a); }
inline uint32_t lds32(uint32_t a) { return emu::load_shared<uint32_t>(a); }
inline void store_if(bool store, void* p, uint32_t v) {
  if (store) std::memcpy(p, &v, sizeof(v));
}
inline void store_if(bool store, void* p, uint2 v) {
  if (store) std::memcpy(p, &v, sizeof(v));
}
inline uint4 load_if(bool load, const void* p) {
  uint4 v{0, 0, 0, 0};
  if (load && reinterpret_cast<uintptr_t>(p) % 16 != 0) emu::fail("a load isn't aligned");
  if (load) std::memcpy(&v, p, sizeof(v));
  return v;
}
inline uint4 load_once_if(bool load, const void* p) { return load_if(load, p); }
inline uint32_t load_u16_if(bool load, const uint16_t* p) { return load ? *p : 0; }
// A round is a turn of all threads, not a load from L2: few for a lost block, for a test to end soon.
#define MOST_ROUNDS (emu::lost_block < 0 ? 1u << 17 : 1u << 10)
inline void trap_if_none_left(uint32_t rounds) {
  if (rounds == 0) emu::fail("a trap ends the kernel");
}
inline int thread_index() { return threadIdx.x; }
inline int load_acquire(const int* p) {
  emu::yield();
  return *p;
}
inline void wait_for(const int* p, int expected) {
  uint32_t rounds = MOST_ROUNDS;
  while (load_acquire(p) != expected)
    trap_if_none_left(--rounds);
}
inline void add_release(int* p, int v) {
  *p += v;
  emu::progress = true;
}

inline uint4 load_relaxed(const uint4* p) {
  emu::yield();
  return *p;
}
inline uint32_t load_relaxed(const uint32_t* p) {
  emu::yield();
  return *p;
}
template <typename T>
void store_relaxed(T* p, T v) {
  *p = v;
  emu::progress = true;
}

// std::fmin would drop a NaN.
inline float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a < b ? a : b; }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
inline float approximate_exp2(float x) { return std::exp2(x); }
inline float approximate_reciprocal(float x) { return 1.f / x; }

inline float half_of(uint32_t pair, int half) { return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u); }

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": lane
// 4g + q.
inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    uint32_t a[4], b[2];
  } mine{d, {a0, a1, a2, a3}, {b0, b1}};
  emu::together(mine, [](Operands** all) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l >> 2, q = l & 3;
      for (int h = 0; h < 2; ++h) {
        for (int r = 0; r < 4; ++r)
          a[g + 8 * (r % 2)][2 * q + h + 8 * (r / 2)] = half_of(all[l]->a[r], h);
        for (int r = 0; r < 2; ++r)
          b[2 * q + h + 8 * r][g] = half_of(all[l]->b[r], h);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int c = 0; c < 4; ++c) {
        const int row = (l >> 2) + 8 * (c / 2), column = 2 * (l & 3) + c % 2;
        double sum = all[l]->d[c];
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(a[row][k]) * b[k][column];
        all[l]->d[c] = static_cast<float>(sum);
      }
  });
}

inline uint32_t mul_bf16x2(uint32_t a, float lo, float hi) {
  return __float2bfloat16_rn(half_of(a, 0) * lo).bits |
         static_cast<uint32_t>(__float2bfloat16_rn(half_of(a, 1) * hi).bits) << 16;
}
inline uint32_t mul_bf16x2_by_lo(uint32_t a, uint32_t s) { return mul_bf16x2(a, half_of(s, 0), half_of(s, 0)); }
inline uint32_t mul_bf16x2_by_hi(uint32_t a, uint32_t s) { return mul_bf16x2(a, half_of(s, 1), half_of(s, 1)); }

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  auto half = [&](int h) { return __float2bfloat16_rn(std::fma(half_of(a, h), half_of(b, h), half_of(c, h))).bits; };
  return half(0) | static_cast<uint32_t>(half(1)) << 16;
}

}  // namespace mxfp4_sm120
