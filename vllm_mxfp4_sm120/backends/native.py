# SPDX-License-Identifier: Apache-2.0
"""The CUDA library of kernels/: the fastest backend, on every NVIDIA GPU from sm_80.

Weights lie as `native_layout` says.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mxfp4_sm120 import config_path, envs
from vllm_mxfp4_sm120.backends.base import Backend, Prepared
from vllm_mxfp4_sm120.backends.native_layout import MAX_SCALE, MIN_SCALE, check_scales, tile_experts
from vllm_mxfp4_sm120.moe import Activation, MoEShape, MoEWeights
from vllm_mxfp4_sm120.platform import Machine

# Where kernels/build.sh and `pip install` put it.
LIBRARY = Path(__file__).parents[1] / "_native.so"

# Of the kernels: lists of experts and chosen experts are kept in registers and shared memory of these sizes.
MAX_EXPERTS = 256
MAX_TOP_K = 8
# The longest row that the kernel for few tokens holds in registers, and that the others are tested with.
MAX_SIZE = 7168

# More are computed in parts: longer ones are no faster, and the workspace stays bounded (6 MB, and 46 KB a token of
# gpt-oss-20b).
MOST_TOKENS = 8192

# For more tokens the router is a GEMM library's business; kernels/csrc/moe.h says the same.
ROUTER_MAX_TOKENS = 64

# Of `moe_layer`: the kernels that configs/tuning/ says.
BY_RULE = -1


class Native(Backend):
    """Grouped kernels that decode MXFP4 in registers, from router logits to output in one to four launches."""

    name = "native"
    capturable = True
    has_router = True
    scale_range = (MIN_SCALE, MAX_SCALE)

    @classmethod
    def why_not(cls, machine: Machine, shape: MoEShape) -> str | None:
        if not LIBRARY.exists():
            return "the CUDA library isn't built: run kernels/build.sh, or install this package where nvcc is"
        try:
            architectures = load()
        except (OSError, RuntimeError) as error:
            return f"{LIBRARY.name} can't be used: {error}"
        if architectures == "stub":
            return None
        if machine.capability is None:
            return "it needs an NVIDIA GPU"
        if not covers(architectures, machine.capability):
            major, minor = machine.capability
            return (
                f"{LIBRARY.name} is built for {architectures}, not for {machine.sm}: "
                f"build it with TORCH_CUDA_ARCH_LIST={major}.{minor} kernels/build.sh"
            )
        for name, size in (("hidden", shape.hidden_size), ("intermediate", shape.intermediate_size)):
            if size % 32 or not 32 <= size <= MAX_SIZE:
                return f"{name} size {size} isn't a multiple of 32 up to {MAX_SIZE}"
        if shape.num_experts > MAX_EXPERTS:
            return f"{shape.num_experts} experts are more than {MAX_EXPERTS}"
        if shape.top_k > MAX_TOP_K:
            return f"{shape.top_k} experts per token are more than {MAX_TOP_K}"
        return None

    def __init__(self, shape: MoEShape) -> None:
        super().__init__(shape)
        load()  # where a proof runs, nobody has asked why_not

    def prepare(self, weights: MoEWeights) -> dict[str, Tensor]:
        """Tiles of codes and scales, in place where `weights` came from `MoEWeights.empty`. Raises ValueError first."""
        check_scales(weights.w13, weights.w13_scale, "w13")
        check_scales(weights.w2, weights.w2_scale, "w2")
        prepared = {
            "w13": tile_experts(weights.w13, weights.w13_scale, "w13"),
            "w2": tile_experts(weights.w2, weights.w2_scale, "w2"),
        }
        if weights.w13_bias is not None:
            prepared["w13_bias"] = weights.w13_bias.contiguous()
        if weights.w2_bias is not None:
            prepared["w2_bias"] = weights.w2_bias.contiguous()
        return prepared

    def forward(
        self,
        prepared: Prepared,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        if topk_ids.dtype == torch.int64:  # no id may come into range by being narrowed
            topk_ids = topk_ids.clamp(-1, self.shape.num_experts)
        ids, gates = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
        return self._layer(prepared, x, None, ids, gates, expert_map)

    def forward_logits(
        self, prepared: Prepared, x: Tensor, router_logits: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        if router_logits.dtype not in (torch.bfloat16, torch.float32):
            router_logits = router_logits.float()
        return self._layer(prepared, x, router_logits.contiguous(), None, None, expert_map)

    def router_logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mxfp4_sm120.router_logits(x, weight, bias)

    def _layer(
        self,
        prepared: Prepared,
        x: Tensor,
        router_logits: Tensor | None,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        expert_map: Tensor | None,
    ) -> Tensor:
        return torch.ops.mxfp4_sm120.moe_layer(
            x.contiguous(),
            prepared["w13"],
            prepared["w2"],
            prepared.get("w13_bias"),
            prepared.get("w2_bias"),
            router_logits,
            topk_ids,
            topk_weights,
            None if expert_map is None else expert_map.to(torch.int32),
            self.shape.num_experts,
            self.shape.top_k,
            self.shape.activation is Activation.SWIGLU_OAI,
            BY_RULE,
        )


def load() -> str:
    """Load the library, once per process; the GPUs it was built for as CMake writes them ("90-real 120-virtual").

    Raises OSError where it can't be loaded, RuntimeError for a stub that MXFP4_SM120_ALLOW_STUB_KERNEL doesn't allow.
    """
    architectures = _load()
    if architectures == "stub" and not envs.ALLOW_STUB_KERNEL.get():
        raise RuntimeError(
            f"it is a stub without GPU code: run kernels/build.sh, or set {envs.ALLOW_STUB_KERNEL.name}=1 to get zeros"
        )
    return architectures


@lru_cache
def _load() -> str:
    torch.ops.load_library(LIBRARY)
    torch.library.register_fake("mxfp4_sm120::moe", _fake_moe)
    torch.library.register_fake("mxfp4_sm120::router", _fake_moe)
    layer = _define_layer()
    torch.library.register_fake("mxfp4_sm120::moe_layer", _fake_moe_layer, lib=layer)
    torch.library.register_fake("mxfp4_sm120::router_logits", _fake_router_logits, lib=layer)
    architectures = torch.ops.mxfp4_sm120.architectures()
    if architectures == "stub":
        warnings.warn(f"{LIBRARY} is a stub: its output is zeros, never an answer", stacklevel=2)
    return architectures


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Can a library built for `architectures` run on a GPU of `capability`?

    Machine code runs on its own and later minors of its major, PTX on everything later; "120a" on 12.0 alone, and
    "120f" on its family: CUDA C++ Programming Guide, compute capabilities.
    """
    for text in architectures.split():
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", text)
        if match is None:
            continue
        built, variant, kind = (int(match[1]), int(match[2])), match[3], match[4]
        if variant == "a":
            runs = capability == built
        elif variant == "f" or kind == "-real":
            runs = capability[0] == built[0] and capability >= built
        else:
            runs = capability >= built
        if runs:
            return True
    return False


@dataclass(frozen=True)
class Limit:
    """One line of a card's rule: the configuration for up to so many tokens, and so many per expert on average."""

    config: int
    tokens: float
    tokens_per_expert: float


@lru_cache
def tuned(card: str) -> tuple[Limit, ...]:
    """The card's rule, configs/tuning/<card's name>.json, smallest first; default.json where nobody has tuned for it.

    {"rule": [{"kernel": "...", "tokens": 8}, {"kernel": "...", "tokens_per_expert": 24}, {"kernel": "..."}]}; kernels
    by their names in `launch_table`. Raises ValueError for any other.
    """
    path = config_path("tuning", re.sub(r"\W+", "_", card) + ".json")
    if not path.exists():
        path = path.with_name("default.json")
    names = [line.split()[0] for line in torch.ops.mxfp4_sm120.launch_table().splitlines()]
    entries = json.loads(path.read_text())["rule"]
    for entry in entries:
        if entry["kernel"] not in names:
            raise ValueError(f"{path.name}: {entry['kernel']} is not a kernel of {LIBRARY.name}: {', '.join(names)}")
    return limits(entries, names)


def limits(entries: list[dict[str, Any]], names: list[str]) -> tuple[Limit, ...]:
    """A rule's entries, each kernel as its place in `names`."""
    everything = float("inf")
    return tuple(
        Limit(names.index(entry["kernel"]), entry.get("tokens", everything), entry.get("tokens_per_expert", everything))
        for entry in entries
    )


def choose(rule: tuple[Limit, ...], tokens: int, tokens_per_expert: float) -> int:
    """The first configuration whose limits hold; the first of all without a rule."""
    held = (limit.config for limit in rule if tokens <= limit.tokens and tokens_per_expert <= limit.tokens_per_expert)
    return next(held, 0)


@lru_cache
def _rule(device: torch.device) -> tuple[Limit, ...]:
    if device.type != "cuda" or load() == "stub":
        return ()  # nothing will run
    return tuned(torch.cuda.get_device_name(device))


# The library's `moe` takes its workspace and output from the caller. `moe_layer` is what is called: it brings both, so
# that torch.compile and CUDA graphs see one functional op.

_ARGUMENTS = (
    "Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor? router_logits, Tensor? topk_ids, "
    "Tensor? topk_weights, Tensor? expert_map, int num_experts, int top_k, bool swiglu_oai, int config"
)


@lru_cache
def _define_layer() -> torch.library.Library:
    library = torch.library.Library("mxfp4_sm120", "FRAGMENT")
    library.define(f"moe_layer({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.define(
        "router_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
    # One implementation for all devices: on a CPU the library says that it needs CUDA.
    library.impl("moe_layer", _moe_layer, "CompositeExplicitAutograd")
    library.impl("router_logits", _router_logits, "CompositeExplicitAutograd")
    return library


def _moe_layer(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    router_logits: Tensor | None,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    expert_map: Tensor | None,
    num_experts: int,
    top_k: int,
    swiglu_oai: bool,
    config: int,
) -> Tensor:
    out = torch.empty_like(x)
    if config == BY_RULE:
        config = choose(_rule(x.device), x.shape[0], x.shape[0] * top_k / num_experts)
    # At least what one token needs, and for a power of two of tokens: then workspaces together are at most twice the
    # largest (but for 6 MB in each), however the token count grows.
    tokens = min(1 << max(x.shape[0] - 1, 0).bit_length(), MOST_TOKENS)
    bytes_needed = _workspace_bytes(tokens, x.shape[-1], w2.shape[-2] * 32, w2.shape[0], top_k)
    workspace = _workspace(x.device, bytes_needed)
    for begin in range(0, max(x.shape[0], 1), MOST_TOKENS):
        part = slice(begin, begin + MOST_TOKENS)
        torch.ops.mxfp4_sm120.moe(
            x[part],
            w13,
            w2,
            w13_bias,
            w2_bias,
            None if router_logits is None else router_logits[part],
            None if topk_ids is None else topk_ids[part],
            None if topk_weights is None else topk_weights[part],
            expert_map,
            workspace,
            num_experts,
            top_k,
            swiglu_oai,
            config,
            out[part],
        )
    return out


def _router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] > ROUTER_MAX_TOKENS:
        return torch.nn.functional.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.mxfp4_sm120.router(x.contiguous(), weight, bias, out)
    return out


def _fake_router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_moe_layer(x: Tensor, *arguments) -> Tensor:
    return torch.empty_like(x)


def _fake_moe(*arguments) -> None:
    return None


@lru_cache
def _workspace_bytes(*sizes: int) -> int:
    return torch.ops.mxfp4_sm120.workspace_bytes(*sizes)


# A device's workspaces, the last the largest. All layers share it: they run one after the other. Outgrown ones are
# kept, since CUDA graphs captured with them will write there.
_workspaces: dict[torch.device, list[Tensor]] = {}


def _workspace(device: torch.device, bytes_needed: int) -> Tensor:
    """Zeroed once, of at least `bytes_needed`. Raises RuntimeError rather than allocate inside a CUDA graph capture."""
    kept = _workspaces.setdefault(device, [])
    have = kept[-1].numel() if kept else 0
    if have < bytes_needed:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the native kernels' workspace has {have} bytes and this CUDA graph needs {bytes_needed}: "
                "run the layer once with as many tokens before capturing"
            )
        kept.append(torch.zeros(bytes_needed, dtype=torch.uint8, device=device))
    return kept[-1]
