// SPDX-License-Identifier: Apache-2.0
// What the tests of the FP4 kernels call.
#include "emulator.h"
#include "fp4/fp4.h"
#include "fp4/mma.cuh"
#include "fp4/workspace.h"

using namespace mxfp4_sm120;

namespace {

// One product of a warp: its lanes' operands, and whether the instruction or
// its twin multiplies them.
struct Product {
  const uint32_t *a, *b, *scales_a, *scales_b; // [32][4], [32][2], [32], [32]
  float *d;                                    // [32][4]
  bool twin;
};

template <int A_BYTE, int A_THREAD, int B_BYTE, int B_THREAD>
void multiply(const Product &p) {
  emu::launch(dim3(1), dim3(32), 0, false, [p] {
    const int lane = threadIdx.x;
    uint32_t a[4], b[2];
    float d[4];
    std::memcpy(a, p.a + 4 * lane, sizeof(a));
    std::memcpy(b, p.b + 2 * lane, sizeof(b));
    std::memcpy(d, p.d + 4 * lane, sizeof(d));
    if (p.twin)
      fp4::mma_mxf4_twin(fp4::Selector<A_BYTE, A_THREAD, B_BYTE, B_THREAD>{}, d,
                         a, b, p.scales_a[lane], p.scales_b[lane]);
    else
      mma_mxf4_instruction<A_BYTE, A_THREAD, B_BYTE, B_THREAD>(
          d, a, b, p.scales_a[lane], p.scales_b[lane]);
    std::memcpy(p.d + 4 * lane, d, sizeof(d));
  });
}

// `selector` counts through all of them: B's thread fastest, then B's byte, A's
// thread, A's byte.
template <int N = 0> void multiply_by(int selector, const Product &p) {
  if constexpr (N < 32) {
    if (selector == N)
      return multiply<N / 16 * 2, N / 8 % 2, N / 4 % 2 * 2, N % 4>(p);
    multiply_by<N + 1>(selector, p);
  }
}

} // namespace

extern "C" {
void fp4_multiply(int selector, bool twin, const uint32_t *a, const uint32_t *b,
                  const uint32_t *scales_a, const uint32_t *scales_b,
                  float *d) {
  multiply_by(selector, {a, b, scales_a, scales_b, d, twin});
}

// nullptr past the table's end.
const char *fp4_name(int config) {
  const auto &table = fp4_configurations();
  return config < static_cast<int>(table.size()) ? table[config].name.c_str()
                                                 : nullptr;
}
int fp4_terms(int config) { return fp4_configurations()[config].terms; }
int64_t fp4_workspace(int M, int H, int I, int local_experts, int top_k) {
  return fp4_workspace_bytes(M, H, I, local_experts, top_k);
}
// Where tokens' records begin in a call's workspace, and those of activations.
int64_t fp4_records(int M, int H, int I, int local_experts, int top_k,
                    int terms, bool activations) {
  const Fp4Workspace ws =
      carve_fp4(nullptr, M, H, I, local_experts, top_k, terms);
  return reinterpret_cast<int64_t>(activations ? ws.act : ws.x);
}
const char *fp4_layer(const MoeArgs *args, int config) {
  return fp4_configurations()[config].launch(
      *args, {emu::multiprocessors, 100 * 1024, false, true}, nullptr);
}
}
