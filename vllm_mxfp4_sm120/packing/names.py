# SPDX-License-Identifier: Apache-2.0
"""How trainers name and lay out experts that aren't packed.

- transformers, TRL: `experts.gate_up_proj` [E, H, 2I] and `experts.down_proj` [E, I, H], biases `..._proj_bias`.
- openai/gpt-oss: `mlp1_weight` [E, 2I, H], `mlp2_weight` [E, H, I].
- Unsloth: `experts.gate_up_projs.N.weight` [2I, H], `experts.down_projs.N.weight` [H, I], each with its `.bias`.
- Others: `experts.N.gate_proj.weight` and `up_proj` [I, H] apart, `w1`, `w3` and `w2` for gate, up and down.
Gate and up alternate where one tensor holds both. PEFT puts `base_model.model.` before a name, `.base_layer` into it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_mxfp4_sm120.checkpoint.config import Sizes
from vllm_mxfp4_sm120.checkpoint.names import respelled

PEFT_PREFIX = "base_model.model."
_PARTS = {
    "gate_up_proj": "gate_up",
    "gate_up_projs": "gate_up",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "down_projs": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_EXPERTS = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.mlp\.experts\.(?:(?P<before>\d{1,6})\.)?"
    r"(?P<part>" + "|".join(_PARTS) + r")(?:\.(?P<after>\d{1,6}))?(?P<kind>|\.weight|\.bias|_bias)"
)
_OPENAI = re.compile(r"\.mlp\.mlp(\d)_weight$")


@dataclass(frozen=True, order=True)
class Piece:
    """What one tensor of experts holds: `part` is gate_up, gate, up or down, `expert` None for all of them."""

    layer: int
    part: str
    expert: int | None = None
    bias: bool = False

    @property
    def projection(self) -> str:
        """The published tensor that it becomes a part of."""
        return "down_proj" if self.part == "down" else "gate_up_proj"


def part_shape(part: str, sizes: Sizes) -> tuple[int, int]:
    """[rows, K] of a part of one expert, as a linear layer has it."""
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    rows = {"gate_up": 2 * intermediate, "gate": intermediate, "up": intermediate, "down": hidden}[part]
    return rows, intermediate if part == "down" else hidden


def without_peft(name: str) -> str:
    """The name that a tensor had before PEFT wrapped the model."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").removesuffix(".base_layer")


def piece_of(name: str) -> Piece | None:
    """What an unpacked tensor of experts holds, by its name in whatever spelling; None for any other tensor."""
    name = respelled(without_peft(name))
    name = _OPENAI.sub(lambda match: f".mlp.experts.{'gate_up' if match[1] == '1' else 'down'}_proj", name)
    match = _EXPERTS.fullmatch(name)
    if match is None or (match["before"] and match["after"]):
        return None
    number = match["before"] or match["after"]
    expert = None if number is None else int(number)
    return Piece(int(match["layer"]), _PARTS[match["part"]], expert, match["kind"].endswith("bias"))
