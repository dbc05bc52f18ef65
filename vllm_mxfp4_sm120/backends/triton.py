# SPDX-License-Identifier: Apache-2.0
"""The layer in Triton, for cards without the compiled library. FP4 is decoded in registers, SwiGLU fused into a GEMM.

Five launches, whose grids depend on the number of tokens only, so a CUDA graph can hold them: route (logits only),
place (count first, when there are many pairs), gate-up + SwiGLU, down, combine. The kernels are in `triton_kernels`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.backends import triton_kernels as kernels
from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.backends.triton_kernels import triton
from vllm_mxfp4_sm120.backends.tuning import Family, Found, Rule
from vllm_mxfp4_sm120.moe import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

# Triton's interpreter (TRITON_INTERPRET=1) runs kernels on the CPU, for tests.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

# fp4's bits, moved to BF16's places, read as fp4 * 2^-126 (subnormal 0.5 included); times 2^(s - 1) that is the weight.
# 2^(s - 1) is a BF16 number for s up to 128, which is weights up to 12. An expert with larger ones has all its scales
# lowered to end there, and its sums multiplied by what they were lowered by. At the other end weights are exact down to
# s = -5: half of 2^(-5 - 127) is BF16's smallest number. Hence what is stored is s + 5.
MAX_SCALE, MIN_SCALE = 128, -5
# Tokens per pass: bounds the float32 workspace, top_k * H * 4 bytes a token, at 190 MB for GPT-OSS.
MAX_TOKENS = 4096
# Pairs that one program of `place` ranks by comparing all with all.
MAX_CHUNK = 256


@dataclass(frozen=True)
class Tiles:
    """One GEMM program's share: block_m pairs x block_n weight rows, block_k values at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        """What a rule calls it, such as "16x64x256w4s3"."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.warps}s{self.stages}"

    @classmethod
    @lru_cache
    def parse(cls, name: str) -> Tiles:
        """The way back. Raises ValueError for anything else, and for what isn't a power of two where it must be."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)w(\d+)s(\d+)", name)
        numbers = [int(number) for number in match.groups()] if match else [0]
        if any(number < 1 or number & (number - 1) for number in numbers[:4]) or numbers[-1] < 1:
            raise ValueError(f"{name} are no tiles: expected powers of two, such as 16x64x256w4s3")
        return cls(*numbers)

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "INTERPRETED": INTERPRETED,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@lru_cache
def rule_of(device: torch.device) -> Rule:
    """The tiles of a device's calls, by tokens and by pairs per expert on average. Raises ValueError as `tuning.find`.

    What is shipped was the fastest on an H100; all of it fits the 99 KB of shared memory that a block has on SM 12.x.
    """
    return tuning.say(found(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type))


def found(card: str) -> Found:
    """The rule for a card. Raises ValueError as `tuning.find`."""
    return tuning.find(card, Family.TRITON, version(), check)


def version() -> str:
    """Triton's, which its kernels' speed depends on."""
    return str(getattr(triton, "__version__", None))


def check(rule: Rule, name: str) -> None:
    """Raises ValueError for a kernel that isn't the name of `Tiles`; `name` is the rule's file."""
    for bound in rule:
        try:
            Tiles.parse(bound.kernel)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def tiles_for(rule: Rule, tokens: int, pairs_per_expert: float) -> Tiles:
    """What a rule says for so many tokens, and so many of their choices an expert on average."""
    return Tiles.parse(tuning.choose(rule, tokens, pairs_per_expert))


@dataclass(frozen=True)
class Grouped:
    """The pairs as the GEMMs take them: `order` int32 [pairs] and `table` int32 [3, tiles] of `kernels.place`."""

    order: Tensor
    table: Tensor
    tiles: Tiles


class Triton(Backend):
    """The grouped layer as Triton kernels, for every NVIDIA GPU with BF16 tensor cores."""

    name = "triton"
    capturable = True
    scale_range = (0, MAX_SCALE)  # and beyond, see why_not_weights
    # None takes what the device's rule says. `mxfp4-sm120 tune` times others.
    tiles: Tiles | None = None

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        if triton is None:
            return "Triton is not installed"
        if machine.capability is None:
            return "Triton needs an NVIDIA GPU"
        if shape.hidden_size % 32 or shape.intermediate_size % 32:
            return f"sizes {shape.hidden_size} x {shape.intermediate_size} are no multiples of 32"
        return None

    @classmethod
    def why_not_weights(cls, weights: MoEWeights) -> str | None:
        """As the base class says. Scales above MAX_SCALE are fine where one expert's blocks are that close together."""
        if super().why_not_weights(weights) is None:
            return None
        for name, (codes, scales) in weights.by_checkpoint_name().items():
            for expert, (low, high) in enumerate(_spans(codes, scales).tolist()):
                if high > mxfp4.MAX_FINITE_SCALE or high - low > MAX_SCALE - MIN_SCALE:
                    return (
                        f"{name}_scales[{expert}] are {low} to {high}, the triton backend takes up to "
                        f"{mxfp4.MAX_FINITE_SCALE}, no two in an expert more than {MAX_SCALE - MIN_SCALE} apart"
                    )
        return None

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        """The checkpoint's layout with the codes of each word rearranged, in place, an expert at a time.

        Scales are stored less MIN_SCALE, K-major so that a tile's load is contiguous, [E, K/32, N]. Where scales above
        MAX_SCALE were lowered, w13_factor and w2_factor float32 [E] say by what.
        """
        prepared = {name: tensor for name, tensor in vars(weights).items() if tensor is not None}
        for name in ("w13", "w2"):
            factor = _lower(prepared[name], prepared[f"{name}_scale"])
            if factor is not None:
                prepared[f"{name}_factor"] = factor
            prepared[name] = prepared[name].view(torch.int32)
            for words in prepared[name]:
                words.copy_(_repack(words))
        for name in ("w13_scale", "w2_scale"):
            scales = prepared[name]
            prepared[name] = scales.view(scales.shape[0], scales.shape[2], scales.shape[1])
            for scale, turned in zip(scales, prepared[name], strict=True):
                turned.copy_(scale.T.clone(memory_format=torch.contiguous_format))
        return prepared

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        if not self.shape.local_experts:
            return torch.zeros_like(x)
        x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        out = torch.empty_like(x)
        for start in range(0, x.shape[0], MAX_TOKENS):
            part = slice(start, start + MAX_TOKENS)
            grouped = self._group(topk_ids[part], expert_map)
            hidden = self._gate_up(prepared, x[part], grouped)
            down = self._down(prepared, hidden, grouped)
            kernels.combine[(len(out[part]), triton.cdiv(x.shape[1], 1024))](
                down,
                topk_ids[part],
                topk_weights[part],
                expert_map,
                out[part],
                H=x.shape[1],
                TOP_K=self.shape.top_k,
                BLOCK=1024,
                **self._experts(expert_map),
            )
        return out

    def forward_logits(
        self, prepared: Prepared, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        tokens, experts = router_logits.shape
        top_k = self.shape.top_k
        topk_ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
        topk_weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
        if tokens:
            block = 1 if tokens <= 1024 else 8
            kernels.route[(triton.cdiv(tokens, block),)](
                router_logits.contiguous(),
                topk_ids,
                topk_weights,
                tokens,
                experts,
                TOP_K=top_k,
                SLOTS=triton.next_power_of_2(top_k),
                EXPERTS=triton.next_power_of_2(experts),
                BLOCK=block,
                num_warps=1,
            )
        return self.forward(prepared, x, topk_ids, topk_weights, expert_map)

    def _experts(self, expert_map: Tensor | None) -> dict[str, int]:
        """Which ids are here, as `kernels._local_expert` asks."""
        return {"MAPPED": 0 if expert_map is None else expert_map.numel(), "LOCAL": self.shape.local_experts}

    def _group(self, topk_ids: Tensor, expert_map: Tensor | None) -> Grouped:
        """Sort the pairs by expert and cut them into tiles."""
        pairs, local = topk_ids.numel(), self.shape.local_experts
        tiles = self.tiles or tiles_for(rule_of(topk_ids.device), len(topk_ids), pairs / local)
        # An expert's last tile may be part empty, so there are at most this many; the rest of the grid leaves at once.
        most_tiles = pairs // tiles.block_m + min(local, pairs)
        experts = max(2, triton.next_power_of_2(local))
        chunk = min(MAX_CHUNK, max(16, triton.next_power_of_2(pairs)))
        chunks = triton.cdiv(pairs, chunk)
        here = self._experts(expert_map)

        order = torch.empty(pairs, dtype=torch.int32, device=topk_ids.device)
        table = torch.empty(3, most_tiles, dtype=torch.int32, device=topk_ids.device)
        counts = order
        if chunks > 1:
            counts = torch.empty(chunks, experts, dtype=torch.int32, device=topk_ids.device)
            kernels.count[(chunks,)](topk_ids, expert_map, counts, pairs, EXPERTS=experts, CHUNK=chunk, **here)
        kernels.place[(chunks,)](
            topk_ids,
            expert_map,
            counts,
            order,
            table,
            pairs,
            chunks,
            most_tiles,
            ONE_CHUNK=chunks == 1,
            EXPERTS=experts,
            CHUNK=chunk,
            BLOCK_M=tiles.block_m,
            num_warps=8 if chunk > 64 else 4,
            **here,
        )
        return Grouped(order, table, tiles)

    def _gate_up(self, prepared: Prepared, x: Tensor, grouped: Grouped) -> Tensor:
        """bf16 [pairs, I], in the order of `grouped`."""
        shape, tiles, most_tiles = self.shape, grouped.tiles, grouped.table.shape[1]
        hidden = x.new_empty(len(grouped.order), shape.intermediate_size)
        w13, w13_scale = prepared["w13"], prepared["w13_scale"]
        kernels.gate_up[(most_tiles * triton.cdiv(2 * shape.intermediate_size, tiles.block_n),)](
            x,
            w13,
            w13_scale,
            prepared.get("w13_factor"),
            prepared.get("w13_bias"),
            grouped.order,
            grouped.table,
            hidden,
            most_tiles,
            w13.stride(0),
            w13_scale.stride(0),
            H=shape.hidden_size,
            I=shape.intermediate_size,
            TOP_K=shape.top_k,
            HAS_BIAS="w13_bias" in prepared,
            HAS_FACTOR="w13_factor" in prepared,
            SWIGLU_OAI=shape.activation is Activation.SWIGLU_OAI,
            ALPHA=SWIGLU_ALPHA,
            LIMIT=SWIGLU_LIMIT,
            **tiles.options(),
        )
        return hidden

    def _down(self, prepared: Prepared, hidden: Tensor, grouped: Grouped) -> Tensor:
        """float32 [pairs, H], each pair at its own number."""
        shape, tiles, most_tiles = self.shape, grouped.tiles, grouped.table.shape[1]
        down = torch.empty(len(hidden), shape.hidden_size, dtype=torch.float32, device=hidden.device)
        w2, w2_scale = prepared["w2"], prepared["w2_scale"]
        kernels.down[(most_tiles * triton.cdiv(shape.hidden_size, tiles.block_n),)](
            hidden,
            w2,
            w2_scale,
            prepared.get("w2_factor"),
            prepared.get("w2_bias"),
            grouped.order,
            grouped.table,
            down,
            most_tiles,
            w2.stride(0),
            w2_scale.stride(0),
            H=shape.hidden_size,
            I=shape.intermediate_size,
            HAS_BIAS="w2_bias" in prepared,
            HAS_FACTOR="w2_factor" in prepared,
            **tiles.options(),
        )
        return down


def _spans(codes: Tensor, scales: Tensor) -> Tensor:
    """The least and the largest scale of each expert's blocks that aren't all zero, or 0 -> int32 [E, 2].

    codes uint8 [E, rows, K/2], scales uint8 [E, rows, K/32].
    """
    spans = []
    for code, scale in zip(codes, scales, strict=True):
        nonzero = mxfp4.nonzero_blocks(code)
        high = torch.where(nonzero, scale, 0).amax()
        spans.append(torch.stack((torch.where(nonzero, scale, high).amin(), high)))
    return torch.stack(spans).int()


def _lower(codes: Tensor, scales: Tensor) -> Tensor | None:
    """Bring each expert's scales to MAX_SCALE or below and store them less MIN_SCALE, in place.

    float32 [E]: what its sums must be multiplied by. None where no expert's were lowered: zeros may have any scale.
    """
    steps = scales.new_zeros(len(scales), dtype=torch.int32)
    if scales.numel() and int(scales.max()) > MAX_SCALE:
        steps = (_spans(codes, scales)[:, 1] - MAX_SCALE).clamp(min=0)
    for scale, step in zip(scales, steps, strict=True):
        scale.copy_((scale.int() - step).clamp(MIN_SCALE, MAX_SCALE) - MIN_SCALE)
    return torch.exp2(steps.float()) if bool(steps.any()) else None


def _repack(words: Tensor) -> Tensor:
    """int32 words of 8 codes each, in the checkpoint's order -> the same with the bits where `_decode` wants them.

    Code 2j goes to the low half and 2j + 1 to the high, so that one word operation decodes both: each half holds the
    signs of pairs 0 to 3 in bits 15, 12, 9, 14, their exponents and mantissas in bits 8-6, 5-3, 2-0, and 13, 11, 10.
    """
    packed = torch.zeros_like(words)
    for half in range(2):
        for pair, (sign_bit, value_bit) in enumerate(((15, 6), (12, 3), (9, 0), (14, 10))):
            code = words >> (8 * pair + 4 * half)
            value = (code & 7) << value_bit
            if pair == 3:  # bit 12 is taken: the high exponent bit moves one further
                value = ((code & 3) << 10) | ((code & 4) << 11)
            packed |= (((code & 8) >> 3 << sign_bit) | value) << (16 * half)
    return packed
