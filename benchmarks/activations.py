# SPDX-License-Identifier: Apache-2.0
"""What a GPT-OSS's experts see: ranges, outlier columns and tails of the activations that enter their two products.

    python benchmarks/activations.py --json activations.json
    python benchmarks/activations.py DIR --text book.txt --json activations.json --samples samples.safetensors

For studies of number formats. transformers computes the checkpoint (`quality_logits.load_transformers`), and hooks see,
layer by layer and token by token, two tensors: `gate_up` [tokens, H], what the router and gate_up_proj get, and `down`
[tokens * top_k, I], what down_proj gets behind SwiGLU, a row for each expert that a token chose. For each:

- absmax, rms, and percentiles of |x| over all values, as multiples of the rms;
- kurtosis of all values: 3 for a normal distribution, more with heavier tails;
- block ratio: largest |x| of 32 neighbours over their rms (1 to 5.66), median and 99th percentile: how far a scale that
  fits the largest of them is from the others;
- outlier columns: those whose rms is more than 6 times the median column's, each with its ratio.

`--samples` keeps the tensors themselves for the first tokens, in BF16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality import SMALL, versions, windows_of
from quality_logits import load_transformers, replace_inputs
from torch import Tensor, nn

BLOCK = 32
PERCENTILES = (50, 90, 99, 99.9, 99.99)
OUTLIER = 6.0  # times the median column; LLM.int8() calls a value of 6 an outlier where most are below 1
MOST_OUTLIERS = 32  # that are listed


def statistics(x: Tensor) -> dict[str, Any]:
    """Of x [rows, columns], any floating dtype, columns a multiple of 32."""
    values = x.double()
    square = values.square()
    rms = float(square.mean().sqrt())
    if not rms:
        return {"rows": len(x), "columns": x.shape[1], "absmax": 0.0, "rms": 0.0}
    sizes = percentiles(values.abs(), (*PERCENTILES, 100))
    blocks = values.unflatten(1, (-1, BLOCK))
    ratio = blocks.abs().amax(-1) / blocks.square().mean(-1).sqrt()
    ratio = ratio[ratio.isfinite()]  # a block of zeros has none
    centred = values - values.mean()
    columns = square.mean(0).sqrt()
    times = columns / columns.median()
    order = times.argsort(descending=True)
    outliers = order[times[order] > OUTLIER]
    return {
        "rows": len(x),
        "columns": x.shape[1],
        "absmax": sizes.pop("100"),
        "rms": rms,
        "percentiles_in_rms": {name: size / rms for name, size in sizes.items()},
        "kurtosis": float(centred.pow(4).mean() / centred.square().mean().square()),
        "block_ratio": percentiles(ratio, (50, 99)),
        "largest_column": float(times[order[0]]),
        "outlier_columns": {int(column): float(times[column]) for column in outliers[:MOST_OUTLIERS]},
    }


def percentiles(values: Tensor, of: Sequence[float]) -> dict[str, float]:
    """By their names. torch.quantile takes no more than 16 million values."""
    ordered = values.flatten().sort().values
    return {f"{p:g}": float(ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]) for p in of}


def watch(model: nn.Module, see: Callable[[int, str, Tensor], None]) -> None:
    """Call `see(layer, "gate_up" or "down", x [rows, columns])` with what enters the products, from now on."""

    def change(layer: int, product: str, x: Tensor) -> Tensor:
        see(layer, product, x.flatten(0, -2))
        return x

    for index, layer in enumerate(model.model.layers):
        replace_inputs(layer.mlp.experts, partial(change, index))


@torch.inference_mode()
def record(model: Any, windows: list[list[int]]) -> dict[str, Tensor]:
    """{"layers.N.gate_up": [tokens, H], "layers.N.down": [tokens * top_k, I]} in BF16 on the CPU."""
    from rich.progress import track

    seen: dict[str, list[Tensor]] = defaultdict(list)
    watch(model, lambda layer, name, x: seen[f"layers.{layer}.{name}"].append(x.bfloat16().cpu()))
    for window in track(windows, description="windows"):
        model(torch.tensor([window], device=model.device), use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def show(layers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "absmax", "rms", "99.9 % (rms)", "kurtosis", "block ratio", "largest column", "outlier columns")
    for name, figures in layers.items():
        if not figures["rms"]:
            continue
        cells = [figures["absmax"], figures["rms"], figures["percentiles_in_rms"]["99.9"], figures["kurtosis"]]
        cells += [figures["block_ratio"]["50"], figures["largest_column"]]
        table.add_row(
            name.removeprefix("layers."), *(f"{cell:.3g}" for cell in cells), str(len(figures["outlier_columns"]))
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SMALL / "checkpoint"), help="default: the small model")
    parser.add_argument("--text", type=Path, default=SMALL / "heldout.txt", help="UTF-8 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at most (default %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens computed together (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="the activations, as safetensors")
    parser.add_argument("--sample-rows", type=int, default=1024, help="of each tensor (default %(default)s)")
    given = parser.parse_args()
    try:
        windows = windows_of(given.model, given.text.read_text(), given.window, given.tokens)
    except (ValueError, OSError) as error:
        sys.exit(f"activations: {error}")
    seen = record(load_transformers(given.model, device=given.device), windows)
    layers = {name: statistics(x) for name, x in sorted(seen.items())}
    show(layers)
    if given.json:
        about = {
            "model": given.model,
            "text": given.text.name,
            "tokens": sum(map(len, windows)),
            "versions": versions(),
        }
        given.json.write_text(json.dumps({**about, "layers": layers}, indent=1) + "\n")
    if given.samples:
        from safetensors.torch import save_file

        save_file({name: x[: given.sample_rows].contiguous() for name, x in seen.items()}, given.samples)


if __name__ == "__main__":
    main()
