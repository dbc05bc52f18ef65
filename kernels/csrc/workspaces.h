// SPDX-License-Identifier: Apache-2.0
// The kernels' workspaces: one for each device and stream, for what blocks hand each other must not meet another
// call's.
#pragma once
#include <cstdint>

namespace mxfp4_sm120 {

// At least `bytes`, on `device`, for calls on `stream`; its first KEPT_BYTES were zeroed once and are the kernels' own
// since. It grows; outgrown ones are kept, since CUDA graphs captured with them will write there. A stream that is
// being captured and has none large enough takes that of the stream on which the device last worked, where the layer
// was run before (replays belong on that stream). Throws std::runtime_error rather than allocate inside a capture.
uint8_t* workspace(int32_t device_type, int32_t device, void* stream, int64_t bytes);

}  // namespace mxfp4_sm120
