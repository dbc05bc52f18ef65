# SPDX-License-Identifier: Apache-2.0
"""A logits processor for vLLM: the answer to a request is the one that its `vllm_xargs` give, token by token.

No model small enough for a test speaks harmony. The model is asked all the same; what it says is put aside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Scripted(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        script = (params.extra_args or {}).get("script")
        if not script:
            return None

        def force(output: list[int], logits: Tensor) -> Tensor:
            if len(output) < len(script):
                forced = torch.full_like(logits, -torch.inf)
                forced[script[len(output)]] = 0
                return forced
            return logits

        return force
