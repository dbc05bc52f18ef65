// SPDX-License-Identifier: Apache-2.0
// The few PTX instructions these kernels need, each a one-line wrapper. Everything here exists on sm_80 .. sm_121;
// where sm_90 and newer have something better (bulk copies, programmatic launch), sm_80 takes the portable road.
#pragma once
#include <cstdint>

namespace mxfp4_sm120 {

// The block's dynamic shared memory, as much as its launch asked for.
__device__ __forceinline__ uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(128) uint8_t bytes[];
  return bytes;
}
__device__ __forceinline__ uint32_t smem_addr(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers ----
__device__ __forceinline__ void mbar_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void mbar_arrive(uint32_t bar) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .pred p;\n"
      "w: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @p bra d;\n bra w;\n d:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n .reg .pred p;\n"
      "w: mbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n @p bra d;\n bra w;\n d:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
#endif
}

// ---- named barriers: some warps arrive and go on, the others wait for them ----
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_wait(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- copies to shared memory ----
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Zeros unless `load`, without a branch; the rest of the 128 bytes comes to L2, for whoever asks next.
__device__ __forceinline__ void cp_async16_if(bool load, uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(load ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async4_if(bool load, uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(load ? 4 : 0) : "memory");
}
// Arrives when this thread's copies so far have landed.
__device__ __forceinline__ void mbar_arrive_after_copies(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}
// sm_90 and newer only: one copy of a multiple of 16 bytes, completing on `bar`.
__device__ __forceinline__ void mbar_expect(uint32_t bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(bar)
               : "memory");
#endif
}
// Makes initialised mbarriers visible to the copy engine.
__device__ __forceinline__ void mbar_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The 128 bytes at `p`.
__device__ __forceinline__ void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- programmatic dependent launch (nothing before sm_90) ----
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// threadIdx.x, read anew: the compiler keeps nothing in registers that it could have made of it before.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// ---- waiting ----
// Whoever waits for another block does so for at most so many rounds: what never comes (a block that ended early, a
// workspace that another call uses) ends the kernel with an error instead of hanging the device. A round waits for a
// load from L2, half a microsecond or more, so these are some ten seconds for what takes microseconds. Rounds rather
// than time: while a debugger or another process's time slice stops a block, it counts none.
constexpr uint32_t MOST_ROUNDS = 1 << 24;
// Ends the kernel; its stream reports an error from then on. Behind the waiting loop, and without a branch for the
// compiler to see: else it costs registers, which sm_120 has to spill.
__device__ __forceinline__ void trap_if_none_left(uint32_t rounds) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0; @p trap; }" ::"r"(rounds));
}

// ---- shared and global memory ----
__device__ __forceinline__ uint4 lds128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
__device__ __forceinline__ uint2 lds64(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}
__device__ __forceinline__ uint32_t lds32(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
// Predicated, never a branch.
__device__ __forceinline__ void store_if(bool store, void* p, uint32_t v) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.u32 [%1], %2; }" ::"r"(int{store}), "l"(p), "r"(v)
               : "memory");
}
// Evicted first: read once.
__device__ __forceinline__ void store_if(bool store, void* p, uint2 v) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.cs.v2.u32 [%1], {%2, %3}; }" ::"r"(int{store}),
               "l"(p), "r"(v.x), "r"(v.y)
               : "memory");
}
// 16 bytes, zeros unless `load`, without a branch: of weights, which are read once and that nobody writes.
__device__ __forceinline__ uint4 load_once_if(bool load, const void* p) {
  uint4 v;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %4, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      " @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%5]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "r"(int{load}), "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_u16_if(bool load, const uint16_t* p) {
  uint32_t v;
  asm volatile(
      "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, %1, 0; mov.b16 h, 0;\n"
      " @p ld.global.nc.u16 h, [%2]; cvt.u32.u16 %0, h; }"
      : "=r"(v)
      : "r"(int{load}), "l"(p));
  return v;
}
// Of what the kernel before has written.
__device__ __forceinline__ uint4 load_if(bool load, const void* p) {
  uint4 v;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %4, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      " @p ld.global.v4.u32 {%0,%1,%2,%3}, [%5]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "r"(int{load}), "l"(p)
      : "memory");
  return v;
}
__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Loads until `expected` is there, for at most MOST_ROUNDS. In one piece, which the compiler can't unroll or rotate: of
// all forms tried, the grouped kernels' main loops beside this one differ least from those beside an endless wait.
__device__ __forceinline__ void wait_for(const int* p, int expected) {
  asm volatile(
      "{ .reg .pred p; .reg .s32 v; .reg .u32 rounds; mov.u32 rounds, %2;\n"
      "AGAIN: ld.acquire.gpu.global.s32 v, [%0]; sub.u32 rounds, rounds, 1;\n"
      " setp.ne.s32 p, v, %1; setp.ne.and.u32 p, rounds, 0, p; @p bra AGAIN;\n"
      " setp.ne.s32 p, v, %1; @p trap; }" ::"l"(p),
      "r"(expected), "n"(MOST_ROUNDS)
      : "memory");
}
__device__ __forceinline__ void add_release(int* p, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Of a value that says for itself whether it is there; nothing else becomes known by it.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {  // four values, each by itself
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- floats ----
__device__ __forceinline__ float min_nan(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float approximate_exp2(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// ---- tensor core ----
// d += a (16 x 16, row) * b (16 x 8, col), bf16 in, fp32 accumulate.
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm(  // not volatile: nothing but registers, free to be scheduled among copies and barriers
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Packed bf16 product of a with the low or the high half of s: the instruction takes either, so none is spent on
// doubling it. As fma with -0, the form that sm_80 has too.
__device__ __forceinline__ uint32_t mul_bf16x2_by_lo(uint32_t a, uint32_t s) {
  uint32_t d;
  asm("{ .reg .b16 l, h; .reg .b32 ll; mov.b32 {l, h}, %2; mov.b32 ll, {l, l}; fma.rn.bf16x2 %0, %1, ll, %3; }"
      : "=r"(d)
      : "r"(a), "r"(s), "r"(0x80008000u));
  return d;
}
__device__ __forceinline__ uint32_t mul_bf16x2_by_hi(uint32_t a, uint32_t s) {
  uint32_t d;
  asm("{ .reg .b16 l, h; .reg .b32 hh; mov.b32 {l, h}, %2; mov.b32 hh, {h, h}; fma.rn.bf16x2 %0, %1, hh, %3; }"
      : "=r"(d)
      : "r"(a), "r"(s), "r"(0x80008000u));
  return d;
}

__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace mxfp4_sm120
