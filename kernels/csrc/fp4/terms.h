// SPDX-License-Identifier: Apache-2.0
// How activations as FP4 terms lie in memory, for products that take weights as they lie (weights.cuh). No CUDA here.
//
// A record for each 64 along K, those of a token one after the other. K that is no multiple of 64 ends in half a record
// of zeros.
//
//      32 bytes for each term    codes, in words of eight: those of k = 0 .. 7 in the order K_OF_NIBBLE, and so on
//      16 bytes                  scales, in the first 8: term 0's two blocks, term 1's ...; what is not used is 0
#pragma once

namespace mxfp4_sm120 {
namespace fp4 {

constexpr int MAX_TERMS = 4;
constexpr int BLOCK = 32, STEP = 64;  // values along K that share a scale; that one product takes
constexpr int CODE_BYTES = BLOCK / 2, TERM_BYTES = 2 * CODE_BYTES, SCALE_BYTES = 16;

constexpr int record_bytes(int terms) { return terms * TERM_BYTES + SCALE_BYTES; }
constexpr int steps_of(int K) { return (K + STEP - 1) / STEP; }

}  // namespace fp4
}  // namespace mxfp4_sm120
