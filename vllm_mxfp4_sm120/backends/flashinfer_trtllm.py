# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's `trtllm_fp4_block_scale_moe`: NVIDIA's own MXFP4 experts for data-centre Blackwell.

The layout is what TensorRT-LLM's kernels read: sizes padded, up before gate, rows shuffled within blocks of 32 for an
epilogue that writes transposed, scales interleaved in 128 x 4 tiles, biases in FP32. FlashInfer is imported when it's
used, not before.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from typing import Any, ClassVar

import torch
from packaging.version import Version
from torch import Tensor

from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.log import logger
from vllm_mxfp4_sm120.moe import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.routing import local_ids

# The oldest that the calls below were bound against (tests/packaging/with_flashinfer.py).
OLDEST = (0, 6, 14)
# Up to here the kernels are for SM 10.0, 10.3 and 10.7 alone (`isArchCompatible` in its trtllm_batched_gemm_runner.cu),
# although the launcher lets SM 12.x in. A newer FlashInfer gets the chance to prove itself.
LAST_WITHOUT_SM120 = (0, 7, 2)

# Multiples that the kernels want: K of both GEMMs and the output in whole tiles (vLLM pads the same).
HIDDEN_MULTIPLE = 256
INTERMEDIATE_MULTIPLE = 128
EPILOGUE_TILE_M = 128  # rows per output tile of every kernel in the family: decides the shuffle
SCALE_ROWS, SCALE_COLUMNS = 128, 4  # the tile that the tensor cores read scales in
MXFP8_ALIGNMENT = HIDDEN_MULTIPLE  # quantized activations come out padded like the weights
SWIGLU = 3  # flashinfer.ActivationType.Swiglu, alpha, beta and limit make it GPT-OSS's
TOP_K_THEN_SOFTMAX = 1  # flashinfer.RoutingMethodType.Renormalize


class FlashInferTrtllm(Backend):
    """MXFP4 weights, BF16 activations."""

    name = "flashinfer_trtllm"
    capturable = True
    mxfp8: ClassVar[bool] = False

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        if machine.family not in (100, 120):
            return f"its kernels are for SM 10.x, this is {machine.sm}"
        try:
            found = metadata.version("flashinfer-python")
        except metadata.PackageNotFoundError:
            return "FlashInfer is not installed (pip install flashinfer-python)"
        release = Version(found).release[:3]
        if release < OLDEST:
            return f"FlashInfer {found} is too old, {'.'.join(map(str, OLDEST))} or newer is needed"
        if machine.family == 120 and release <= LAST_WITHOUT_SM120:
            return f"FlashInfer {found} has these kernels for SM 10.x only, none for {machine.sm}"
        if shape.num_experts % 4 or not shape.top_k <= min(32, shape.num_experts - 1):
            return (
                f"it routes to multiples of 4 experts and up to 32 of them, not to {shape.top_k} of {shape.num_experts}"
            )
        return _import_error()

    def __init__(self, shape: MoEShape) -> None:
        super().__init__(shape)
        self.hidden_size = _round_up(shape.hidden_size, HIDDEN_MULTIPLE)
        self.intermediate_size = _round_up(shape.intermediate_size, INTERMEDIATE_MULTIPLE)

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        """Everything the call reads, made expert by expert: only one expert's padded copy exists beside the result.

        w13 uint8 [E, 2I', H'/2], w13_scale [E, 2I', H'/32], w13_bias float32 [E, 2I'], w2 uint8 [E, H', I'/2], w2_scale
        and w2_bias likewise; alpha, beta, limit float32 [E]. H' and I' are padded with zeros. Scales are E8M0 bytes
        that go by the name of float8_e4m3fn, as the call wants.
        """
        shape, device = self.shape, weights.w13.device
        experts, rows13, rows2 = shape.local_experts, 2 * self.intermediate_size, self.hidden_size
        prepared = {
            "w13": torch.empty(experts, rows13, self.hidden_size // 2, dtype=torch.uint8, device=device),
            "w13_scale": torch.empty(experts, rows13, self.hidden_size // 32, dtype=torch.uint8, device=device),
            "w2": torch.empty(experts, rows2, self.intermediate_size // 2, dtype=torch.uint8, device=device),
            "w2_scale": torch.empty(experts, rows2, self.intermediate_size // 32, dtype=torch.uint8, device=device),
        }
        order13, order2 = _row_order(rows13, device), _row_order(rows2, device)
        order13 = order13 ^ 1  # rows alternate gate, up; these kernels want up, gate: take each row's neighbour
        for name, order in (("w13", order13), ("w2", order2)):
            codes, scales = getattr(weights, name), getattr(weights, f"{name}_scale")
            for expert in range(experts):
                out = prepared[name][expert]
                out.copy_(_pad(codes[expert], out.shape)[order])
                out = prepared[f"{name}_scale"][expert]
                out.copy_(interleave_scales(_pad(scales[expert], out.shape)[order]).view(out.shape))
            logger.debug("%s_scale: %d scale columns, %d after padding", name, scales.shape[2], out.shape[1])
            prepared[f"{name}_scale"] = prepared[f"{name}_scale"].view(torch.float8_e4m3fn)
            if (bias := getattr(weights, f"{name}_bias")) is not None:
                prepared[f"{name}_bias"] = _pad(bias.float(), (experts, len(order)))[:, order].contiguous()
        if shape.activation is Activation.SWIGLU_OAI:
            for name, value in (("alpha", SWIGLU_ALPHA), ("beta", 1.0), ("limit", SWIGLU_LIMIT)):
                prepared[name] = torch.full((experts,), value, dtype=torch.float32, device=device)
        return prepared

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        from flashinfer import trtllm_fp4_block_scale_routed_moe

        # The call knows experts on other ranks by a range of ids. Any map becomes that: ours first, then the rest. What
        # isn't here gets no gate either, for without a map there is no such range.
        local = local_ids(topk_ids, self.shape.local_experts, expert_map)
        last = min(self.shape.local_experts, self.shape.num_experts - 1)
        topk_ids = torch.where(local >= 0, local, last).int()
        topk_weights = torch.where(local >= 0, topk_weights, 0)
        out = torch.empty_like(x)
        if x.shape[0]:
            trtllm_fp4_block_scale_routed_moe(
                topk_ids=(topk_ids, topk_weights.float()), **self._arguments(prepared, x, out)
            )
        return out

    def forward_logits(
        self, prepared: Prepared, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Routes inside the kernel, unless some experts live elsewhere."""
        from flashinfer import trtllm_fp4_block_scale_moe

        if expert_map is not None:
            return super().forward_logits(prepared, x, router_logits, expert_map)
        out = torch.empty_like(x)
        if x.shape[0]:
            if router_logits.dtype not in (torch.bfloat16, torch.float32):
                router_logits = router_logits.float()
            trtllm_fp4_block_scale_moe(routing_logits=router_logits.contiguous(), **self._arguments(prepared, x, out))
        return out

    def _arguments(self, prepared: Prepared, x: Tensor, out: Tensor) -> dict[str, Any]:
        """What both calls take; `out` keeps the unpadded width."""
        hidden_states, hidden_states_scale = self._activations(x)
        return {
            "routing_bias": None,
            "hidden_states": hidden_states,
            "hidden_states_scale": hidden_states_scale,
            "gemm1_weights": prepared["w13"],
            "gemm1_weights_scale": prepared["w13_scale"],
            "gemm1_bias": prepared.get("w13_bias"),
            "gemm1_alpha": prepared.get("alpha"),
            "gemm1_beta": prepared.get("beta"),
            "gemm1_clamp_limit": prepared.get("limit"),
            "gemm2_weights": prepared["w2"],
            "gemm2_weights_scale": prepared["w2_scale"],
            "gemm2_bias": prepared.get("w2_bias"),
            "output1_scale_scalar": None,
            "output1_scale_gate_scalar": None,
            "output2_scale_scalar": None,
            "num_experts": self.shape.num_experts,
            "top_k": self.shape.top_k,
            "n_group": None,
            "topk_group": None,
            "intermediate_size": self.intermediate_size,
            "local_expert_offset": 0,
            "local_num_experts": self.shape.local_experts,
            "routed_scaling_factor": None,
            "routing_method_type": TOP_K_THEN_SOFTMAX,
            "do_finalize": True,
            "activation_type": SWIGLU,
            "output": out,
        }

    def _activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x bf16 [M, H] as the kernels read it, [M, H']: BF16, or E4M3 with E8M0 scales [M, H'/32] (MXFP8)."""
        if not self.mxfp8:
            return torch.nn.functional.pad(x, (0, self.hidden_size - x.shape[1])), None
        from flashinfer import mxfp8_quantize

        values, scales = mxfp8_quantize(x, is_sf_swizzled_layout=False, alignment=MXFP8_ALIGNMENT)
        return values, scales.view(torch.float8_e4m3fn).view(x.shape[0], self.hidden_size // 32)


class FlashInferTrtllmMxfp8(FlashInferTrtllm):
    """MXFP4 weights, activations rounded to MXFP8: faster at many tokens, and less exact."""

    name = "flashinfer_trtllm_mxfp8"
    mxfp8 = True
    # E4M3 keeps 4 significant bits: 2.6e-2 of rounding at each GEMM's input.
    tolerance = 6e-2


def interleave_scales(scales: Tensor) -> Tensor:
    """uint8 [rows, columns] -> flat uint8, in tiles of 128 x 4 as the tensor cores read them.

    Row r, column c of a tile lies at 16 (r % 32) + 4 (r // 32) + c (CUTLASS' block-scaled layout). Padded with zeros to
    whole tiles, so that 90 columns become 92. What FlashInfer's `block_scale_interleave` does, but on any device.
    Raises ValueError for anything but uint8 [rows, columns].
    """
    if scales.dtype != torch.uint8 or scales.dim() != 2:
        raise ValueError(f"block scales are {scales.dtype} {list(scales.shape)}, expected uint8 [rows, columns]")
    rows, columns = _round_up(scales.shape[0], SCALE_ROWS), _round_up(scales.shape[1], SCALE_COLUMNS)
    tiles = _pad(scales, (rows, columns)).view(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def _row_order(rows: int, device: torch.device) -> Tensor:
    """int64 [rows]: which row each place of the shuffled matrix takes, from FlashInfer itself."""
    from flashinfer.fused_moe.core import get_w2_permute_indices_with_cache

    order: Tensor = get_w2_permute_indices_with_cache({}, torch.empty(rows, 1, dtype=torch.uint8), EPILOGUE_TILE_M)
    return order.to(device)


@lru_cache
def _import_error() -> str | None:
    """Why FlashInfer can't be used although it's there; None if it can. Importing it takes seconds, hence once."""
    try:
        import flashinfer
    except Exception as error:  # a broken installation raises whatever it likes
        return f"FlashInfer doesn't import: {type(error).__name__}: {error}"
    for function in ("trtllm_fp4_block_scale_moe", "trtllm_fp4_block_scale_routed_moe"):
        if not hasattr(flashinfer, function):
            return f"FlashInfer {flashinfer.__version__} has no {function}"
    return None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros below and to the right, up to `shape`."""
    rows, columns = shape[0] - tensor.shape[0], shape[1] - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, columns, 0, rows)) if rows or columns else tensor
