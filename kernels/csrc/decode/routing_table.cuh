// SPDX-License-Identifier: Apache-2.0
// A block's own account of the routing: which tokens chose which expert, as the column groups to multiply with.
#pragma once
#include <algorithm>

#include "../common/routing.cuh"
#include "../common/warp.cuh"
#include "../workspace.h"

namespace mxfp4_sm120 {
namespace decode {

constexpr int COLUMNS = 8;  // of a product: its n
// A token's j-th choice has a place, token * MAX_TOP_K + j.
constexpr int token_of(int place) { return place / MAX_TOP_K; }

// A block's account of the routing: each token's choices, and the column groups to multiply experts with.
template <int TOKENS_>
struct Choices {
  static constexpr int TOKENS = TOKENS_, PLACES = TOKENS * MAX_TOP_K;
  int groups;              // how many there are
  int16_t expert[PLACES];  // by place: local expert or -1
  float weight[PLACES];
};

// Every active expert has one group, and every token is a column of it: the input of gate-up is the same for all.
struct AllTokens : Choices<COLUMNS> {
  static constexpr bool GATHERED = false;
  struct Scratch {
    uint32_t active[MAX_EXPERTS / 32];  // experts, a bit each
  };
  int16_t group_expert[PLACES];    // ascending
  int8_t choice[PLACES][COLUMNS];  // [group][token] -> which of the token's, or -1

  __device__ __forceinline__ int expert_of(int group) const { return group_expert[group]; }
  __device__ __forceinline__ int columns_of(int, int tokens) const { return tokens; }
  // Of a column's choice, -1 where it has not chosen the group's expert or doesn't exist.
  __device__ __forceinline__ int place(int group, int column) const {
    const int j = choice[group][column];
    return j < 0 ? -1 : column * MAX_TOP_K + j;
  }
  // The tokens that chose a group's expert, a bit each.
  __device__ __forceinline__ uint32_t tokens_of(int group) const {
    uint32_t chosen = 0;
#pragma unroll
    for (int t = 0; t < COLUMNS; ++t)
      chosen |= (choice[group][t] >= 0) << t;
    return chosen;
  }

  __device__ __forceinline__ void clear(Scratch& scratch) {
    if (threadIdx.x < MAX_EXPERTS / 32) scratch.active[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < PLACES * COLUMNS / 4; i += blockDim.x)
      reinterpret_cast<uint32_t*>(choice)[i] = ~0u;
  }
  __device__ __forceinline__ static void add(Scratch& scratch, int expert, int) {
    atomicOr(&scratch.active[expert >> 5], 1u << (expert & 31));
  }
  // Once all choices have been added.
  __device__ __forceinline__ void build(const Scratch& scratch, const MoeArgs& args) {
    // An expert's place among the active ones: how many bits stand below its own.
    auto rank = [&](int e) {
      int n = __popc(scratch.active[e >> 5] & ((1u << (e & 31)) - 1));
      for (int i = 0; i < e >> 5; ++i)
        n += __popc(scratch.active[i]);
      return n;
    };
    for (int s = threadIdx.x; s < args.M * MAX_TOP_K; s += blockDim.x) {
      const int e = expert[s];
      if (e < 0) continue;
      const int group = rank(e);
      group_expert[group] = static_cast<int16_t>(e);  // the same value from every token that chose it
      choice[group][token_of(s)] = static_cast<int8_t>(s % MAX_TOP_K);
    }
    if (threadIdx.x == blockDim.x - 1) {
      int n = 0;
      for (int i = 0; i < (args.local_experts + 31) / 32; ++i)
        n += __popc(scratch.active[i]);
      groups = n;
    }
  }
};

// An expert's own tokens are its groups' columns, ascending.
struct OwnTokens : Choices<GATHERED_MAX_TOKENS> {
  static constexpr bool GATHERED = true;
  static constexpr int MAX_GROUPS = std::min(MAX_EXPERTS, PLACES) + PLACES / COLUMNS, WORDS = TOKENS / 32;
  struct Group {
    int16_t expert, first, columns;  // the first of its places in `order`, and how many there are
  };
  Group group[MAX_GROUPS];
  int16_t order[PLACES];  // places, sorted by expert
  // What it takes to find that out.
  struct Scratch {
    uint32_t tokens[MAX_EXPERTS][WORDS];  // that chose an expert, a bit each
    int16_t first_place[MAX_EXPERTS], first_group[MAX_EXPERTS];
  };

  __device__ __forceinline__ int expert_of(int t) const { return group[t].expert; }
  __device__ __forceinline__ int columns_of(int t, int) const { return group[t].columns; }
  __device__ __forceinline__ int place(int t, int column) const {
    return column < group[t].columns ? order[group[t].first + column] : -1;
  }

  __device__ __forceinline__ void clear(Scratch& scratch) {
    for (int i = threadIdx.x; i < MAX_EXPERTS * WORDS; i += blockDim.x)
      reinterpret_cast<uint32_t*>(scratch.tokens)[i] = 0;
  }
  __device__ __forceinline__ static void add(Scratch& scratch, int expert, int token) {
    atomicOr(&scratch.tokens[expert][token / 32], 1u << token % 32);
  }
  __device__ __forceinline__ void build(Scratch& scratch, const MoeArgs& args) {
    auto count_of = [&](int expert) {
      int n = 0;
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        n += __popc(scratch.tokens[expert][i]);
      return n;
    };
    if (threadIdx.x < 32) {
      // Groups, and in the upper half places: 11 tokens of an expert are 2 | 11 << 16, two groups and eleven places.
      int before = 0;
      for (int e0 = 0; e0 < args.local_experts; e0 += 32) {
        const int e = e0 + threadIdx.x, n = e < args.local_experts ? count_of(e) : 0;
        const int mine = (n + COLUMNS - 1) / COLUMNS | n << 16, through = before + inclusive_scan(mine, threadIdx.x);
        if (e < args.local_experts) {
          scratch.first_group[e] = static_cast<int16_t>((through - mine) & 0xffff);
          scratch.first_place[e] = static_cast<int16_t>((through - mine) >> 16);
        }
        before = __shfl_sync(~0u, through, 31);
      }
      if (threadIdx.x == 0) groups = before & 0xffff;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < args.local_experts; e += blockDim.x) {
      const int n = count_of(e);
      for (int i = 0; i < n; i += COLUMNS)
        group[scratch.first_group[e] + i / COLUMNS] = {static_cast<int16_t>(e),
                                                       static_cast<int16_t>(scratch.first_place[e] + i),
                                                       static_cast<int16_t>(min(COLUMNS, n - i))};
    }
    for (int s = threadIdx.x; s < args.M * MAX_TOP_K; s += blockDim.x) {
      const int e = expert[s], t = token_of(s);
      if (e < 0) continue;
      int at = scratch.first_place[e];
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        at += __popc(scratch.tokens[e][i] & (t >= 32 * (i + 1) ? ~0u : t < 32 * i ? 0u : (1u << t % 32) - 1));
      order[at] = static_cast<int16_t>(s);
    }
  }
};

}  // namespace decode
}  // namespace mxfp4_sm120
