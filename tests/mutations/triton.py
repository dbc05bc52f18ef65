# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults in the Triton kernels, run by Triton's interpreter.

As a module, `python -m tests.mutations.triton` puts in each fault in turn and writes to standard output as JSON whether
the conformance suite noticed: it must, and not without a fault. TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from tests.conformance.cases import Case
from tests.conformance.suite import Subject
from tests.mutations.table import Mutation
from vllm_mxfp4_sm120.backends import triton, triton_kernels

PACKAGE, SUITE = "vllm_mxfp4_sm120.backends", "conformance"
GATE = "gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)"

MUTATIONS = tuple(
    Mutation(name, "triton_kernels", old, new, SUITE)
    for name, old, new in (
        ("a pair's bits from a place further", "pair1 = (word << 3)", "pair1 = (word << 4)"),
        ("scales off by one", "scales.to(tl.uint32) + 121", "scales.to(tl.uint32) + 122"),
        ("gate and up exchanged", "gate, up = tl.split(", "up, gate = tl.split("),
        ("gate not clamped", GATE, "gate = gate + 0.0"),
        ("bias of the first expert", "w13_bias + expert * N", "w13_bias + 0 * N"),
        ("pairs placed one too far", "index[None, :] < index[:, None]", "index[None, :] <= index[:, None]"),
        ("the expert map ignored", "    if MAPPED:\n", "    if MAPPED < 0:\n"),
        ("gates not normalised", "values = values / tl.sum(values, axis=1)[:, None]", "values = values * 1.0"),
    )
)
# The first shows most of them; whose map is shuffled, and what goes by logits, the others.
LAYER = Case(5, hidden_blocks=3, intermediate_blocks=2, experts=3, top_k=2, tokens=4, path="routed", bias="large")
CASES = (LAYER, replace(LAYER, local="shuffled"), replace(LAYER, path="logits"))


def built_with(mutation: Mutation, folder: Path) -> ModuleType:
    """The kernels with that fault, in a file: the interpreter reads their source."""
    source = inspect.getsource(triton_kernels)
    assert source.count(mutation.old) == 1, f"{mutation.name}: {mutation.old!r} isn't there once"
    file = folder / f"kernels{len(list(folder.iterdir()))}.py"
    file.write_text(source.replace(mutation.old, mutation.new))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_wrong() -> bool:
    """In a child, for the interpreter reads and writes wherever a kernel says."""
    child = os.fork()
    if child == 0:
        subject = Subject.named("triton")
        os._exit(any(subject.complaint(case) is not None for case in CASES))
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    noticed = {"no fault": is_wrong()}
    with tempfile.TemporaryDirectory() as folder:
        for mutation in MUTATIONS:
            triton.kernels = built_with(mutation, Path(folder))  # type: ignore[attr-defined]
            noticed[mutation.name] = is_wrong()
    print(json.dumps(noticed))


if __name__ == "__main__":
    main()
