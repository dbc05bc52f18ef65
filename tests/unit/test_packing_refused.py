# SPDX-License-Identifier: Apache-2.0
"""What pack and unpack refuse: tensors that are missing, that come twice, or that don't fit config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import edit_tensors, write_small
from vllm_mxfp4_sm120 import packing

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, Tensor]
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def drop(*names: str) -> Callable[[State], object]:
    return lambda state: [state.pop(name) for name in names]


def put(name: str, tensor: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: tensor})


def four_experts(state: State) -> None:
    del state[GATE_UP]
    state.update({f"{GATE_UP}s.{expert}.weight": torch.zeros(96, 128) for expert in range(4)})


BAD: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (drop(GATE_UP, "lm_head.weight"), r"lm_head.weight .* missing; .*gate_up_proj \(gate_up of 3 experts"),
    "shape": (put(GATE_UP, torch.zeros(3, 96, 64)), r"gate_up_proj is F32 \[3, 96, 64\], expected BF16 \[3, 96, 128\]"),
    "integers": (put(GATE_UP, torch.zeros(3, 96, 128).int()), r"gate_up_proj is I32"),
    "NaN": (put(GATE_UP, torch.full((3, 96, 128), torch.nan)), r"NaN or Inf .*gate_up_proj of expert 0"),
    "twice": (put("layers.1.mlp.experts.gate_up_proj", torch.zeros(3, 96, 128)), "are the same tensor"),
    "twice, not of the experts": (put("layers.0.mlp.router.bias", torch.zeros(3)), "are the same tensor"),
    "two ways round": (put(GATE_UP, torch.zeros(3, 128, 96)), r"some experts' weights lie as \[K, rows\] and some as"),
    "one expert of three": (
        lambda state: state.update({f"{GATE_UP}s.1.weight": state.pop(GATE_UP)[1]}),
        r"gate_up_proj \(gate_up\) of experts 0, 2 missing",
    ),
    "router's shape": (
        put("model.layers.0.mlp.router.bias", torch.zeros(4)),
        r"router.bias is F32 \[4\], expected BF16",
    ),
    "lora inside": (put("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(1)), "merge it"),
    "4 bits": (put("model.layers.0.self_attn.q_proj.weight.absmax", torch.zeros(1)), "another quantization"),
    "four experts of three": (four_experts, r"gate_up_projs.3.weight found, expected 3 experts"),
    "floats beside codes": (
        lambda state: state.update(
            {f"{GATE_UP}_blocks": torch.zeros(3, 128, 3, 16).byte(), f"{GATE_UP}_scales": torch.zeros(3, 128, 3).byte()}
        ),
        r"gate_up_proj and .*gate_up_proj_blocks are the same weights, expected one of them",
    ),
    "layers": (put("model.layers.7.mlp.experts.down_proj", torch.zeros(1)), "layer 7 found, expected 2 layers"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_does_not_fit_is_refused(fault: str, tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    packing.unpack(tmp_path / "model", tmp_path / "bf16")
    change, message = BAD[fault]
    edit_tensors(tmp_path / "bf16", change)
    with pytest.raises(ValueError, match=message) as caught:
        packing.pack(tmp_path / "bf16", tmp_path / "packed")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("packed*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{GATE_UP}_scales"), r"gate_up_proj_scales \(U8 \[3, 128, 3\]\) missing"),
        (put(f"{GATE_UP}_blocks", torch.zeros(3, 128, 2, 16).byte()), r"_blocks is U8 \[3, 128, 2, 16\], expected U8"),
    ],
)
def test_packed_experts_that_do_not_fit_are_refused(change, message: str, tmp_path: Path) -> None:
    write_small(tmp_path / "model")
    edit_tensors(tmp_path / "model", change)
    for convert in (packing.pack, packing.unpack):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "model", tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
