# SPDX-License-Identifier: Apache-2.0
"""How exact activations are as a sum of FP4 terms, beside other formats (`formats.py`). All simulated on a CPU.

    python benchmarks/fp4_terms.py                                             # about a minute
    python benchmarks/fp4_terms.py --only rules --rows 256 --json docs/data    # a table for the documentation

- `activations`: the relative error of the values themselves, against the BF16 values that a format is given (BF16's own
  is against the values before);
- `rules`: the same of three terms, by the rule that gives a term its scale;
- `layer`: the relative error of an experts layer's output, rounded to BF16 as kernels do, against float64 that rounds
  nothing but the layer's input, which is in BF16; and how many times BF16's error that is;
- `model`: the small model in float32 but for what enters its experts' products: its next token's distribution against
  the same model that rounds nothing, on held-out text.

Distributions: normal, Student's t with 3 degrees of freedom, normal with every 97th channel 30 times as large, products
of two normals, and what enters the small model's products. That has no outlier channels, as GPT-OSS has; "small model,
outliers" is the same function with every 97th channel of gate_up's inputs 32 times as large and its weights a 32nd.
Layers are of transformers' GptOssExperts: two random experts of gpt-oss-20b's sizes, and the small model's six layers.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from formats import FORMATS, Format, Formats, bf16, named
from fp4_tables import Table
from quality import SMALL, compare, targets, versions, windows_of
from quality_logits import load_transformers, replace_inputs
from torch import Tensor, nn

from vllm_mxfp4_sm120 import mxfp4
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.proof.problem import random_weights

HIDDEN = 2880  # gpt-oss-20b's, the intermediate size too
CHANNEL, RANDOM_OUTLIER, MODEL_OUTLIER = 97, 30.0, 32.0  # a power of two can be taken out again without an error
LAYER_FORMATS = [*FORMATS, "mxfp4x3,mxfp4x4", "mxfp4x4,mxfp4x3"]


@dataclass(frozen=True)
class Rule:
    """How a term's scale comes from what the terms before it left over.

    The smallest power of two s with largest <= `limit` * s; or the scale before over `ratios`, for the second term and
    those after it. Of the scales 2^steps * s the one whose rest is the smallest; `together`: after the last term.
    """

    name: str
    limit: float
    ratios: tuple[int, ...] = ()
    steps: tuple[int, ...] = (0,)
    together: bool = False

    def rest(self, x: Tensor, terms: int) -> Tensor:
        """Float64 [..., K] -> what is left after so many terms [..., K]."""
        return self._rest(x.unflatten(-1, (-1, mxfp4.BLOCK)), list(range(terms)), None).flatten(-2)

    def _rest(self, rest: Tensor, terms: list[int], before: Tensor | None) -> Tensor:
        if not terms:
            return rest
        if before is not None and terms[0] <= len(self.ratios):
            scale = before - int(math.log2(self.ratios[terms[0] - 1]))
        else:
            mantissa, exponent = torch.frexp(rest.abs().amax(-1, keepdim=True) / self.limit)
            scale = exponent - (mantissa == 0.5).int() + mxfp4.SCALE_BIAS
        tried = [rest - nearest(rest, scale + step) for step in self.steps]
        if self.together:
            return least([self._rest(each, terms[1:], scale) for each in tried])
        return self._rest(least(tried), terms[1:], scale)


def nearest(x: Tensor, scale: Tensor) -> Tensor:
    """The values of a term with E8M0 `scale` [..., 1] for x [..., 32], float64."""
    scale = scale.clamp(0, mxfp4.MAX_FINITE_SCALE).to(torch.uint8)
    return mxfp4.dequantize(mxfp4.encode(x, scale), scale, torch.float64)


def least(rests: list[Tensor]) -> Tensor:
    """Of several [..., 32], block by block the one with the smallest sum of squares."""
    stacked = torch.stack(rests)
    chosen = stacked.square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return stacked.take_along_dim(chosen, 0)[0]


NEIGHBOURS = (-1, 0, 1)
RULES = (
    Rule("largest <= 6 s, for each term", 6),
    Rule("**largest <= 7 s, for each term**", 7),
    Rule("largest <= 8 s, for each term", 8),
    Rule("best of 3 scales, for each term", 7, steps=NEIGHBOURS),
    Rule("best of 27 triples of scales", 7, steps=NEIGHBOURS, together=True),
    *(Rule(f"7 s, then s/{a}, s/{a * b}", 7, (a, b)) for a, b in ((4, 4), (4, 8), (8, 4), (8, 8))),
    Rule("7 s, then s/8, then 7 s again", 7, (8,)),
)


@dataclass(frozen=True)
class Given:
    rows: int  # of random activations
    tokens: int  # of the held-out text
    seed: int = 0

    @property
    def machine(self) -> str:
        return f"simulated on a CPU, torch {versions()['torch']}"


def random_activations(rows: int, seed: int) -> dict[str, Tensor]:
    """Float64 [rows, 2880]."""
    draw = partial(torch.randn, rows, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    outliers = draw()
    outliers[:, ::CHANNEL] *= RANDOM_OUTLIER
    chi_square = draw().square() + draw().square() + draw().square()
    return {
        "normal": draw(),
        "t(3)": draw() / (chi_square / 3).sqrt(),
        "outliers": outliers,
        "product": draw() * draw(),
    }


def with_outliers(formats: Formats) -> Formats:
    """The formats where every 97th channel of gate_up's inputs is 32 times as large, and its weights a 32nd."""

    def gate_up(x: Tensor) -> Tensor:
        times = channel_factors(x)
        return formats["gate_up"](x * times) / times

    return {**formats, "gate_up": gate_up}


def channel_factors(x: Tensor) -> Tensor:
    """[K], 32 for every 97th channel and 1 for the others."""
    factors = torch.ones_like(x[0])
    factors[::CHANNEL] = MODEL_OUTLIER
    return factors


class SmallModel:
    """transformers' model in float32, whose experts' inputs are given `formats`, if there are any."""

    def __init__(self, tokens: int) -> None:
        path = str(SMALL / "checkpoint")
        self.model = load_transformers(path, "float32")
        self.windows = windows_of(path, (SMALL / "heldout.txt").read_text(), min(tokens, 1024), tokens)
        self.formats: Formats = {}
        self.calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
        self.seen: dict[str, list[Tensor]] = {"gate_up": [], "down": []}
        self.watching = True
        for layer in self.model.model.layers:
            experts = layer.mlp.experts
            experts.register_forward_pre_hook(self.watch)
            replace_inputs(experts, self.change)
        self.right = self.logits({})
        self.watching = False

    def watch(self, experts: nn.Module, given: tuple[Tensor, ...]) -> None:
        if self.watching:
            self.calls.append((experts, given))

    def change(self, product: str, x: Tensor) -> Tensor:
        if self.watching:
            self.seen[product].append(x.double())
        return self.formats[product](x) if self.formats else x

    @torch.inference_mode()
    def logits(self, formats: Formats) -> Tensor:
        self.formats = formats
        return torch.cat([self.model(torch.tensor([window])).logits[0, :-1] for window in self.windows])

    def activations(self) -> dict[str, Tensor]:
        """Float64 [rows, K], of all layers."""
        gate_up, down = torch.cat(self.seen["gate_up"]), torch.cat(self.seen["down"])
        return {"gate_up": gate_up, "gate_up, outliers": gate_up * channel_factors(gate_up), "down": down}


small_model = cache(SmallModel)


def relative(error: Tensor, right: Tensor) -> float:
    return float(error.norm() / right.norm())


def percent(error: float) -> str:
    return f"{100 * error:.3g} %" if 100 * error >= 0.1 else f"{100 * error:.2g} %"


def activations(given: Given) -> Table:
    data = random_activations(given.rows, given.seed) | small_model(given.tokens).activations()

    def error(name: str, format_: Format, x: Tensor) -> str:
        x, right = (x, x) if name == "bf16" else (bf16(x), bf16(x))
        return percent(relative(format_(x) - right, right))

    rows = [[name, *(error(name, format_, x) for x in data.values())] for name, format_ in FORMATS.items()]
    return Table("Relative error of activations", given.machine, "activations", ["format", *data], rows)


def rules(given: Given) -> Table:
    data = random_activations(given.rows, given.seed) | small_model(given.tokens).activations()
    rows = []
    for rule in RULES:
        errors = [relative(rule.rest(bf16(x)[: given.rows], 3), bf16(x)[: given.rows]) for x in data.values()]
        rows.append([rule.name, *map(percent, [*errors, max(errors)])])
    what = "Relative error of three FP4 terms, by the rule for their scales"
    return Table(what, given.machine, "rules", ["scale s", *data, "worst"], rows)


@dataclass
class Layer:
    """Layers and what they were given, of which errors are taken together as the layers' mean."""

    calls: list[tuple[nn.Module, tuple[Tensor, ...]]]  # in float64; hidden states, expert ids, gates
    outliers: bool = False

    @torch.inference_mode()
    def outputs(self, formats: Formats) -> Iterator[Tensor]:
        for experts, given in self.calls:
            changed = copy.copy(experts)  # hooks are of the copy; the weights are shared
            changed._forward_pre_hooks = type(experts._forward_pre_hooks)()
            chosen = with_outliers(formats) if self.outliers else formats
            replace_inputs(changed, partial(apply, chosen))
            yield changed(*given)


def apply(formats: Formats, product: str, x: Tensor) -> Tensor:
    return formats[product](x)


EXACT: Formats = {"gate_up": bf16, "down": lambda x: x}


def layers(given: Given) -> Iterator[tuple[str, Layer]]:
    """By name."""
    experts = random_experts(given.seed)
    rows = max(1, given.rows // 4)
    ids, gates = torch.tensor([[0, 1]]).expand(rows, 2), torch.tensor([[0.6, 0.4]]).expand(rows, 2)
    for name, x in random_activations(rows, given.seed).items():
        yield name, Layer([(experts, (x, ids, gates))])
    calls = [(double(experts), (x.double(), *rest)) for experts, (x, *rest) in small_model(given.tokens).calls]
    yield "small model", Layer(calls)
    yield "small model, outliers", Layer(calls, outliers=True)


def random_experts(seed: int) -> nn.Module:
    """Two, of gpt-oss-20b's sizes and the proof's weights, in float64."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    weights = random_weights(MoEShape(2, 2, HIDDEN, HIDDEN, top_k=2), "cpu", seed)
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=2)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config).double()
    state = {
        "gate_up_proj": mxfp4.dequantize(weights.w13, weights.w13_scale, torch.float64).mT,
        "gate_up_proj_bias": weights.w13_bias,
        "down_proj": mxfp4.dequantize(weights.w2, weights.w2_scale, torch.float64).mT,
        "down_proj_bias": weights.w2_bias,
    }
    experts.load_state_dict(state)
    return experts


def double(experts: nn.Module) -> nn.Module:
    """A copy in float64, without hooks."""
    made = type(experts)(experts.config).double()
    made.load_state_dict(experts.state_dict())
    return made


def layer(given: Given) -> Table:
    cells: dict[str, list[str]] = {name: [name] for name in LAYER_FORMATS}
    columns = ["format"]
    for column, each in layers(given):
        columns.append(column)
        right = list(each.outputs(EXACT))
        errors = {}
        for name in LAYER_FORMATS:
            found = each.outputs(named(name))
            parts = [relative(bf16(out) - exact, exact) for out, exact in zip(found, right, strict=True)]
            errors[name] = sum(parts) / len(parts)
            cells[name].append(f"{percent(errors[name])} ({errors[name] / errors['bf16']:.2f})")
    what = "Relative error of an experts layer's output (and how many times BF16's)"
    return Table(what, given.machine, "layer", columns, list(cells.values()))


def model(given: Given) -> Table:
    small = small_model(given.tokens)
    tokens = targets(small.windows)
    rows = []
    for name in LAYER_FORMATS:
        row = [name]
        for change in (named(name), with_outliers(named(name))):
            figures = compare(small.right, small.logits(change), tokens)
            row += [f"{figures.kl_mean:.1e}", f"{figures.perplexity_change:+.2%}", f"{figures.equal_greedy:.2%}"]
        rows.append(row)
    columns = ["mean KL (nats)", "perplexity", "equal greedy tokens"]
    columns = ["format", *columns, *(f"{column}, outliers" for column in columns)]
    what = f"The small model's next token, {len(tokens)} of held-out text, perplexity {figures.perplexity_a:.3f}"
    return Table(what, given.machine, "model", columns, rows)


TABLES: dict[str, Callable[[Given], Table]] = {
    "activations": activations,
    "rules": rules,
    "layer": layer,
    "model": model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES), help="these tables (default: all)")
    parser.add_argument("--rows", type=int, default=64, help="of random activations, a quarter in layers (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of held-out text (%(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FOLDER", help="each table as fp4-NAME.json, as docs/data has them"
    )
    arguments = parser.parse_args()
    if arguments.rows < 1 or arguments.tokens < 3:
        sys.exit(f"fp4_terms: --rows {arguments.rows} --tokens {arguments.tokens}, expected at least 1 and 3")
    torch.manual_seed(0)
    for name in arguments.only:
        found = TABLES[name](Given(arguments.rows, arguments.tokens))
        found.show(f"{found.what}\n{found.where}")
        if arguments.json:
            command = (
                f"python benchmarks/fp4_terms.py --only {name} --rows {arguments.rows} --tokens {arguments.tokens}"
            )
            replace(found, command=command).write(arguments.json, name)


if __name__ == "__main__":
    main()
