# SPDX-License-Identifier: Apache-2.0
"""What no kernel can beat on this machine: reading the weights once, and multiplying, at rates measured on the spot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.proof import timing

# Larger than any cache: two layers of gpt-oss-20b on a GPU, a third of one on a CPU.
BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
# Rows of the square matrices: large enough for a BLAS to reach its rate.
MATRIX = {"cuda": 8192, "cpu": 1024}
REPEATS = {"cuda": 10, "cpu": 3}


@dataclass(frozen=True)
class Rates:
    """Of this machine, per microsecond: bytes that are read, and operations (two a product) of a large matmul."""

    read: float
    multiply: float

    def __str__(self) -> str:
        return f"reads {self.read / 1e3:,.0f} GB/s, multiplies {self.multiply / 1e6:,.1f} TFLOP/s"

    def limit(self, read_bytes: float, operations: float) -> float:
        """Microseconds that a layer takes at least, if reading and multiplying overlap."""
        return max(read_bytes / self.read, operations / self.multiply)

    def experts(self, shape: MoEShape, tokens: int, active_experts: float) -> float:
        """The limit of an experts layer, of which so many experts are chosen by some token."""
        operations = 6 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
        return self.limit(active_experts * shape.packed_bytes_per_expert, operations)


def measured(device: torch.device) -> Rates:
    """The faster of a sum over a large buffer and a copy of it, which reads and writes; BF16 matrices multiplied.

    On a CPU, whose kernels multiply in FP32, the faster of BF16 and FP32.
    """
    data = torch.ones(BUFFER_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    target, n = torch.empty_like(data), MATRIX[device.type]
    matrix = torch.randn(n, n, device=device)
    half = matrix.bfloat16()
    calls: dict[str, timing.Call] = {
        "sum": data.sum,
        "copy": lambda: target.copy_(data),
        "bf16": lambda: half @ half,
    }
    if device.type == "cpu":
        calls["fp32"] = lambda: matrix @ matrix
    times = timing.medians(calls, device, REPEATS[device.type])
    read = max(data.nbytes / times["sum"], 2 * data.nbytes / times["copy"])
    return Rates(read, 2 * n**3 / min(times["bf16"], times.get("fp32", float("inf"))))
