// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, slowly and strictly, for tests: the same source,
// compiled as C++ with these headers in place of CUDA's.
//
// Every thread of a block is a fiber. A fiber runs until it must wait: for its
// warp (shuffles, votes, mma), for its block (barriers), or for memory that
// another writes. Warps are taken in a random order each round, so that what
// isn't ordered by a barrier happens in any order. Asynchronous copies happen
// as late as they may (when they are waited for) or at once, by choice: the
// first shows a wait or barrier too few before reading, the second before
// refilling.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __shared__ static  // kernels with static shared memory run a block at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 gridDim, blockDim;

namespace emu {

// ---- settings, by the test ----
inline int multiprocessors = 4;
inline bool late_copies = true;
inline int early_loads = 0;  // of what was still being copied
inline int lost_block = -1;  // of a cooperative launch: never runs
inline int fault = -1;       // which of the deliberate ones is on (tests/mutations)
inline std::mt19937 random{0};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int* pending;  // of its first 16 bytes (see Block)
  void begin() const {
    for (int i = 0; i < bytes; i += 16)
      ++pending[i / 16];
  }
  void land() const {
    std::memcpy(to, from, bytes);
    for (int i = 0; i < bytes; i += 16)
      --pending[i / 16];
  }
};

struct Warp {
  const void* kind = nullptr;  // of the collective under way: all lanes must be in the same
  int arrived = 0;
  unsigned done = 0;
  void* lane[32];
};

struct Barrier {
  int arrived = 0;
  unsigned done = 0;
};

// An mbarrier, and the copies that its phase waits for.
struct MBarrier {
  int count, pending, bytes = 0;
  unsigned phase = 0;
  std::vector<Copy> copies{};
};

struct Block {
  dim3 index;
  std::vector<uint8_t> shared;
  std::vector<int> pending;  // of each 16 bytes of it: copies to them that have not landed
  std::vector<Warp> warps;
  Barrier barriers[16];
  bool all = true;                           // of what __syncthreads_and's threads have handed in
  std::map<uint32_t, MBarrier> mbarriers{};  // by address
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;  // where it has yielded, if it has begun
  Block* block;
  dim3 thread;
  bool begun = false, finished = false;
  bool (*ready)(void*) = nullptr;  // is it worth a turn, asked of `waits`? nullptr: always
  void* waits = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // of asynchronous copies, the last still open
};

inline jmp_buf scheduler;
inline Fiber* now = nullptr;
inline std::function<void()> kernel;
inline bool progress = false;  // has anything happened since the scheduler last looked?

// Not by swapcontext, which asks the system for the signal mask each time: half of all the time that tests took.
inline void yield() {
  if (_setjmp(now->at) == 0) _longjmp(scheduler, 1);
}
inline void take_turn(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;  // it has yielded
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}
// As `while (!ready()) yield();`, but the scheduler asks, which takes less than a turn.
template <typename Ready>
void wait_until(Ready ready) {
  if (ready()) return;
  now->ready = [](void* waits) { return (*static_cast<Ready*>(waits))(); };
  now->waits = &ready;
  yield();
  now->ready = nullptr;
}
inline uint8_t* shared_memory() { return now->block->shared.data(); }
inline int lane() { return now->thread.x % 32; }

// All 32 lanes hand in `mine`; the last to come works on all of them.
template <typename T, typename Work>
void together(T& mine, Work work) {
  static const char kind = 0;  // one for each Work
  Warp& warp = now->block->warps[now->thread.x / 32];
  if (warp.arrived == 0) warp.kind = &kind;
  if (warp.kind != &kind) fail("lanes of a warp are in different collectives");
  warp.lane[lane()] = &mine;
  progress = true;
  const unsigned done = warp.done;
  if (++warp.arrived == 32) {
    T* all[32];
    for (int i = 0; i < 32; ++i)
      all[i] = static_cast<T*>(warp.lane[i]);
    work(all);
    warp.arrived = 0;
    ++warp.done;
  } else {
    wait_until([&] { return warp.done != done; });
  }
}

inline void arrive(int id, int threads, bool wait) {
  Barrier& barrier = now->block->barriers[id];
  const unsigned done = barrier.done;
  progress = true;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.done;
  } else if (wait) {
    wait_until([&] { return barrier.done != done; });
  }
}

inline Copy begin_copy(uint32_t to, const void* from, int bytes) {
  const int unit = std::min(bytes, 16);
  if (to % unit != 0 || reinterpret_cast<uintptr_t>(from) % unit != 0) fail("a copy isn't aligned");
  if (to + bytes > now->block->shared.size()) fail("a copy leaves shared memory");
  const Copy copy{shared_memory() + to, from, bytes, &now->block->pending[to / 16]};
  copy.begin();
  return copy;
}
inline void start_copy(uint32_t to, const void* from, int bytes) {
  const Copy copy = begin_copy(to, from, bytes);
  if (late_copies)
    now->groups.back().push_back(copy);
  else
    copy.land();
}
inline void wait_for_copies(int pending) {
  auto& groups = now->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front())
      copy.land();
    groups.erase(groups.begin());
  }
}

inline MBarrier& mbarrier(uint32_t at) {
  const auto found = now->block->mbarriers.find(at);
  if (found == now->block->mbarriers.end()) fail("an mbarrier that wasn't initialised");
  return found->second;
}
inline void complete_if_due(MBarrier& barrier) {
  if (barrier.pending < 0) fail("too many arrivals at an mbarrier");
  if (barrier.pending > 0) return;
  for (const Copy& copy : barrier.copies) {
    copy.land();
    if (barrier.bytes > 0) barrier.bytes -= copy.bytes;
  }
  barrier.copies.clear();
  if (barrier.bytes != 0) fail("an mbarrier expects other bytes than were copied");
  barrier.pending = barrier.count;
  ++barrier.phase;
  progress = true;
}
inline void mbarrier_arrive(uint32_t at, int bytes = 0) {
  MBarrier& barrier = mbarrier(at);
  barrier.bytes += bytes;
  --barrier.pending;
  progress = true;
  if (barrier.copies.empty() && bytes == 0) complete_if_due(barrier);  // else when somebody looks: as late as may be
}
inline void mbarrier_wait(uint32_t at, unsigned parity) {
  MBarrier& barrier = mbarrier(at);
  wait_until([&] {
    if ((barrier.phase & 1) == parity) complete_if_due(barrier);
    return (barrier.phase & 1) != parity;
  });
}
template <typename T>
T load_shared(uint32_t at) {
  if (at % sizeof(T) != 0 || at + sizeof(T) > now->block->shared.size()) fail("a load leaves shared memory");
  early_loads += now->block->pending[at / 16] > 0;
  T v;
  std::memcpy(&v, shared_memory() + at, sizeof(T));
  return v;
}

inline void run_fiber() {
  kernel();
  now->finished = true;
  progress = true;
  yield();
}

// Blocks one after the other, or all of them together where they wait for each
// other.
inline void launch(dim3 blocks, dim3 threads, size_t shared_bytes, bool cooperative, std::function<void()> body) {
  constexpr size_t STACK = 256 * 1024;
  static std::vector<std::unique_ptr<uint8_t[]>> stacks;
  gridDim = blocks, blockDim = threads, kernel = std::move(body);
  const unsigned count = blocks.x * blocks.y, at_once = cooperative ? count : 1, warps = threads.x / 32;
  for (unsigned first = 0; first < count; first += at_once) {
    std::vector<Block> resident(at_once);
    std::vector<Fiber> fibers(at_once * threads.x);
    for (unsigned b = 0; b < at_once; ++b) {
      resident[b].index = dim3((first + b) % blocks.x, (first + b) / blocks.x);
      resident[b].shared.assign(shared_bytes, 0xff);  // NaNs
      resident[b].pending.assign(shared_bytes / 16, 0);
      resident[b].warps.resize(warps);
      for (unsigned t = 0; t < threads.x; ++t) {
        Fiber& fiber = fibers[b * threads.x + t];
        fiber.block = &resident[b];
        fiber.thread = dim3(t);
        fiber.finished = cooperative && static_cast<int>(first + b) == lost_block;
        const unsigned number = b * threads.x + t;
        if (number == stacks.size()) stacks.emplace_back(new uint8_t[STACK]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks[number].get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
      }
    }
    std::vector<unsigned> order(at_once * warps);
    std::iota(order.begin(), order.end(), 0);
    for (int idle = 0;;) {
      std::shuffle(order.begin(), order.end(), random);
      bool left = false;
      progress = false;
      for (unsigned warp : order)
        for (unsigned i = 0; i < 32; ++i) {
          Fiber& fiber = fibers[warp * 32 + i];
          if (fiber.finished) continue;
          left = true;
          now = &fiber;
          if (fiber.ready == nullptr || fiber.ready(fiber.waits)) take_turn(fiber);
        }
      if (!left) break;
      // For a lost block, blocks are to find out by themselves.
      if (!progress && ++idle == (lost_block < 0 ? 1000 : 1'000'000)) fail("everyone waits for someone else");
      if (progress) idle = 0;
    }
  }
}

}  // namespace emu

#define threadIdx (emu::now->thread)
#define blockIdx (emu::now->block->index)

// ---- CUDA's functions that the kernels use ----
inline void __syncthreads() { emu::arrive(0, blockDim.x, true); }
inline int __syncthreads_and(int v) {
  bool& all = emu::now->block->all;
  all &= v != 0;
  __syncthreads();
  const bool result = all;
  __syncthreads();
  all = true;
  __syncthreads();
  return result;
}
inline void __syncwarp() {
  int nothing = 0;
  emu::together(nothing, [](int**) {});
}

namespace emu {
template <typename T>
struct Exchange {
  T value;
  int from;
  T got;
};
template <typename T>
T exchange(T value, int from) {
  Exchange<T> mine{value, from, value};
  together(mine, [](Exchange<T>** all) {
    for (int i = 0; i < 32; ++i)
      all[i]->got = all[all[i]->from & 31]->value;
  });
  return mine.got;
}
template <typename T, typename Join>
T reduced(T value, Join join) {
  struct Mine {
    T value, result;
  } mine{value, value};
  together(mine, [join](Mine** all) {
    T sum = all[0]->value;
    for (int i = 1; i < 32; ++i)
      sum = join(sum, all[i]->value);
    for (int i = 0; i < 32; ++i)
      all[i]->result = sum;
  });
  return mine.result;
}
}  // namespace emu

template <typename T>
T __shfl_sync(unsigned, T v, int from) {
  return emu::exchange(v, from);
}
template <typename T>
T __shfl_up_sync(unsigned, T v, int by) {
  return emu::exchange(v, emu::lane() < by ? emu::lane() : emu::lane() - by);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emu::exchange(v, emu::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  return emu::reduced(v ? 1u << emu::lane() : 0u, [](unsigned a, unsigned b) { return a | b; });
}
template <typename T>
T __reduce_max_sync(unsigned, T v) {
  return emu::reduced(v, [](T a, T b) { return a > b ? a : b; });
}

inline int __reduce_add_sync(unsigned, int v) {
  return emu::reduced(v, [](int a, int b) { return a + b; });
}

template <typename T>
T atomicAdd(T* p, T v) {
  return (*p += v) - v;
}
template <typename T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p |= v;
  return old;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, unsigned by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (by & 31) >> 32);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}
// A GPU's arithmetic makes one NaN alone, whatever NaNs go into it (CUDA C++ Programming Guide, floating-point standard).
inline uint32_t __float_as_uint(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return std::isnan(v) ? 0x7fffffff : u;
}
inline float __uint_as_float(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline float __expf(float v) { return std::exp(v); }
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
using std::isnan;
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
