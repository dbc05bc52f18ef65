# SPDX-License-Identifier: Apache-2.0
"""What vLLM's communicator for CPUs lacks, and data parallel together with expert parallel needs; by import."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def all_gatherv(self: CpuCommunicator, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None):
    """All ranks' rows, one rank after the other; a rank has `sizes[rank]` of them."""
    assert dim == 0 and sizes is not None
    gathered = []
    for tensor in [input_] if isinstance(input_, Tensor) else input_:
        parts = [tensor.new_empty(size, *tensor.shape[1:]) for size in sizes]
        parts[self.rank_in_group].copy_(tensor)
        for rank, part in zip(self.ranks, parts, strict=True):
            distributed.broadcast(part, src=rank, group=self.cpu_group)
        gathered.append(torch.cat(parts))
    return gathered[0] if isinstance(input_, Tensor) else gathered


def reduce_scatterv(self: CpuCommunicator, input_: Tensor, dim: int = 0, sizes: list[int] | None = None) -> Tensor:
    """This rank's rows of the sum over all ranks."""
    assert dim == 0 and sizes is not None
    total = input_.clone()
    distributed.all_reduce(total, group=self.cpu_group)
    return total.split(sizes)[self.rank_in_group].clone()


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv
