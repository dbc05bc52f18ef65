# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults in the checkpoint's reader, its checks and its writer, and the test that catches each.

As a module, `python -m tests.mutations.checkpoint` puts in each fault in turn, runs its test, and writes to standard
output as JSON which tests failed: every one must, and none without a fault.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutations.table import Mutation

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_mxfp4_sm120.checkpoint"
READ_BACK = "tests/unit/test_checkpoint.py::test_what_is_written_is_read_back"
LAYOUT = "tests/unit/test_checkpoint.py::test_the_layout_is_the_published_one"
FOLDER = "tests/faults/test_tensor_faults.py::test_a_folder"
OTHER = "tests/faults/test_tensor_faults.py::test_any_other_source"
CONFIG = "tests/faults/test_config_faults.py::test_config"
FILES = "tests/faults/test_file_faults.py::test_folder"


BYTES = "return tensor.view(torch.uint8).reshape(expected.shape)"
MUTATIONS = (
    Mutation(
        "another layer's tensor",
        "read",
        "self.tensors[name]\n",
        "self.tensors[name.replace('s.1', 's.0')]\n",
        READ_BACK,
    ),
    Mutation("high nibble first", "tensors", BYTES, BYTES.replace("8)", "8).bitwise_right_shift(4)"), READ_BACK),
    Mutation("scales off by one", "tensors", BYTES, f"{BYTES} + (len(expected.shape) == 3)", READ_BACK),
    Mutation(
        "scales of the next block", "tensors", BYTES, f"{BYTES}.roll(len(expected.shape) == 3, dims=-1)", READ_BACK
    ),
    Mutation("rows turned around", "tensors", BYTES, f"{BYTES}.flip(1)", READ_BACK),
    Mutation(
        "biases dropped",
        "tensors",
        "return tensor.to(torch.bfloat16)",
        "return torch.zeros_like(tensor).bfloat16()",
        READ_BACK,
    ),
    Mutation("w13 written as w2", "read", '"gate_up_proj": (weights.w13,', '"gate_up_proj": (weights.w2,', LAYOUT),
    Mutation("NaN scales pass", "read", "weights.scale_outside()", "pass", f"{FOLDER}[a-scale-of-255]"),
    Mutation("shapes pass", "tensors", "found.shape in shapes", "True", f"{FOLDER}[scales-of-half-of-the-rows]"),
    Mutation(
        "shapes pass as they load",
        "tensors",
        "            check_tensor(name,",
        "            (name,",
        f"{OTHER}[scales-of-half-of-the-rows]",
    ),
    Mutation(
        "dtypes pass", "tensors", "found.dtype in SAME_NUMBERS[expected.dtype]", "True", f"{FOLDER}[float-scales]"
    ),
    Mutation("a missing tensor passes", "tensors", "    if absent:", "    if len(absent) > 1:", f"{FOLDER}[no-q_proj]"),
    Mutation(
        "the first missing tensor alone is said",
        "tensors",
        "listed(absent)",
        "absent[0]",
        f"{FOLDER}[all-missing-are-said]",
    ),
    Mutation(
        "q, k and v all from the first rows", "tensors", "        start = end\n", "", f"{OTHER}[openai's-own-names]"
    ),
    Mutation(
        "fused rows unsplit",
        "tensors",
        "tensor[slice(*info.rows)] if info.rows else tensor",
        "tensor",
        f"{OTHER}[openai's-own-names]",
    ),
    Mutation(
        "a tensor comes twice", "tensors", "if name in seen:", "if False:", f"{OTHER}[two-spellings-of-one-tensor]"
    ),
    Mutation("tied lm_head forgotten", "tensors", "yield LM_HEAD, part", "pass", f"{OTHER}[lm_head-tied,-absent]"),
    Mutation(
        "Inf passes",
        "tensors",
        ".isfinite().all(dim=1)",
        ".isnan().logical_not().all(dim=1)",
        f"{OTHER}[Inf-in-lm_head.weight]",
    ),
    Mutation(
        "NaN in a layer's experts passes", "read", "        finite.finish()\n", "", f"{FOLDER}[F32-bias-beyond-BF16]"
    ),
    Mutation(
        "Unsloth's router unknown", "names", r"(?:gate|router\.linear)", "(?:gate)", f"{FOLDER}[Unsloth's-router]"
    ),
    Mutation(
        "an adapter passes",
        "names",
        r"^base_model\.|\.lora_",
        r"^base_model\.x|\.lora__",
        f"{FOLDER}[a-LoRA-adapter-beside-the-weights]",
    ),
    Mutation("any swiglu_limit passes", "config", "or value != key.served", "or False", f"{CONFIG}[swiglu_limit]"),
    Mutation(
        "windows on odd layers", "config", "layer % 2 == 0", "layer % 2 == 1", f"{CONFIG}[windows-on-the-other-layers]"
    ),
    Mutation(
        "top-k unbounded",
        "config",
        "if sizes.top_k > sizes.num_experts:",
        "if False:",
        f"{CONFIG}[more-experts-a-token-than-there-are]",
    ),
    Mutation("a path in the index", "headers", 'and "/" not in file', "", f"{FILES}[index-to-a-folder-below]"),
    Mutation(
        "the last of two shards wins", "headers", "if name in tensors:", "if False:", f"{FILES}[a-tensor-in-two-shards]"
    ),
    Mutation(
        "the index isn't compared",
        "headers",
        "if file not in unread and",
        "if False and",
        f"{FILES}[index-with-a-tensor-that-no-shard-holds]",
    ),
    Mutation("all tensors in the first shard", "write", "names[i] for t, i", "names[0] for t, i", READ_BACK),
)


class Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package from changed source."""

    def __init__(self, mutation: Mutation) -> None:
        self.name = f"{PACKAGE}.{mutation.module}"
        self.path = ROOT.joinpath(*PACKAGE.split("."), f"{mutation.module}.py")
        source = self.path.read_text()
        assert mutation.old in source, f"{mutation.name}: {mutation.old!r} isn't in {self.path}"
        self.source = source.replace(mutation.old, mutation.new)

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, origin=str(self.path)) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


@contextlib.contextmanager
def put_in(mutation: Mutation) -> Iterator[None]:
    finder = Faulty(mutation)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def fails(*tests: str) -> bool:
    """Whether the tests fail, the package and they being imported anew."""
    for name, module in list(sys.modules.items()):
        of_tests = str(getattr(module, "__file__", None)).startswith(f"{ROOT / 'tests'}/")
        if name.startswith(PACKAGE) or (of_tests and not name.startswith(("tests.mutations", "__main__"))):
            del sys.modules[name]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), out.getvalue()
    return code == pytest.ExitCode.TESTS_FAILED


def main() -> None:
    failed = {"no fault": fails(*{mutation.caught_by for mutation in MUTATIONS})}
    for mutation in MUTATIONS:
        with put_in(mutation):
            failed[mutation.name] = fails(mutation.caught_by)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
