# SPDX-License-Identifier: Apache-2.0
"""What a backend is: a way to compute one MoE layer from packed weights, in a layout only it knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.moe import MoEShape, MoEWeights, topk_softmax
from vllm_mxfp4_sm120.platform import Machine

Prepared = Mapping[str, Tensor]


class Backend(ABC):
    """One layer's backend.

    It has no state beyond `shape`: the tensors it made in `prepare` are handed back to `forward`, so that the engine
    can register, move and count them.
    """

    name: ClassVar[str]
    # May a forward pass be captured in a CUDA graph: fixed launches, no host sync, no allocation that depends on data.
    capturable: ClassVar[bool]
    # Does it run kernels of its own, which can hang or kill a process: then its proof runs in a child process.
    compiled: ClassVar[bool] = True
    # Has it a kernel for the router in front of the experts, too (`router_logits`)?
    has_router: ClassVar[bool] = False
    # Largest relative error (Frobenius) against the float64 reference that its proof accepts; BF16 rounding makes 4e-3.
    tolerance: ClassVar[float] = 1e-2
    # The E8M0 scale codes of blocks that aren't all zero with which its arithmetic is exact, the first and the last.
    scale_range: ClassVar[tuple[int, int]] = (0, mxfp4.MAX_FINITE_SCALE)

    def __init__(self, shape: MoEShape) -> None:
        self.shape = shape

    @classmethod
    @abstractmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        """One line saying why this backend can't run that shape on that machine; None if it can."""

    @classmethod
    def why_not_weights(cls, weights: MoEWeights) -> str | None:
        """One line that names the first block whose scale this backend can't represent; None if there is none.

        The one look that is taken at scales, before `prepare`. Raises ValueError for a scale of 255, NaN, which no
        backend takes.
        """
        low, high = cls.scale_range
        outside = weights.scale_outside(low, high)
        return None if outside is None else f"{outside}, the {cls.name} backend takes {low} to {high}"

    def fix_kernel(self) -> bool:
        """Compute every call with the same kernel from now on, however many tokens it has.

        Then a token's answer has the same bits whatever others there are. False where the backend can't say that.
        """
        return False

    @abstractmethod
    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        """Rearrange the checkpoint's layout into this backend's own, once, at load.

        Consumes `weights`: tensors may be reused in place. Their scales are such as `why_not_weights` takes.
        """

    @abstractmethod
    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """x bf16 [M, H], topk_ids int32/int64 [M, k] (global), topk_weights float32 [M, k] -> bf16 [M, H].

        expert_map int32 [num_experts] -> local id or -1 (this rank's share is left out), None when all are local.
        M may be 0. `moe.reference` in float64 defines the answer, for any input:
        - An id below 0 or from num_experts on, like a local id below 0 or from local_experts on, is an expert that
          isn't here. What isn't here adds nothing, whatever its gate.
        - NaN and infinity follow IEEE 754: where the reference is NaN or infinite, so is the answer (one or the other),
          and never in another token's row. The clamps of SwiGLU keep NaN, and bring +-infinity to their limits.
        - A NaN in x makes its row NaN, as does a NaN gate; so, from logits, do a NaN logit, a logit of +infinity, and
          -infinity for all k chosen (`topk_softmax`). Where none of the token's experts are here, the row is 0.
        - What float32 or BF16 can't hold (beyond 3.4e38) on the way is infinite, and may become NaN.
        """

    def forward_logits(
        self, prepared: Prepared, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """The same from router logits [M, num_experts]; backends that route inside their kernels override it.

        Of equal logits the lower id is chosen.
        """
        topk_ids, topk_weights = topk_softmax(router_logits, self.shape.top_k)
        return self.forward(prepared, x, topk_ids, topk_weights, expert_map)

    def router_logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x bf16 [M, H], weight bf16 [num_experts, H], bias bf16 [num_experts] -> x @ weight^T + bias, bf16."""
        return torch.nn.functional.linear(x, weight, bias)
