# SPDX-License-Identifier: Apache-2.0
"""Every deliberate fault in the native kernels is caught by the conformance suite on their emulator."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.conformance.cases import Case
from tests.conformance.emulated import emulated_native
from tests.conformance.suite import TOLERANCE, Subject
from tests.kernels.emulated import configs as table
from tests.kernels.emulated import dense, dense_configs
from tests.kernels.emulated_fp4 import EmulatedFp4
from tests.kernels.test_emulated import inputs
from tests.kernels.test_fp4_emulated import reference_on_terms
from tests.mutations.kernels import MUTATIONS, build_with_faults, switch_on
from tests.mutations.table import Mutation
from tests.support.layers import random_weights
from vllm_mxfp4_sm120 import terms as fp4_terms
from vllm_mxfp4_sm120.dense.int8 import Int8Weights
from vllm_mxfp4_sm120.moe import MoEShape

# A few small layers with what is odd: every kind of fault shows in one of them.
LAYER = Case(5, hidden_blocks=3, intermediate_blocks=4, experts=5, top_k=3, tokens=8, path="routed")
CASES = [
    replace(LAYER, local="shuffled", scales="rows", bias="large"),
    replace(LAYER, ids="repeated int32"),
    replace(LAYER, ids="out of range int32"),
    replace(LAYER, routing="equal logits", path="logits"),
    replace(LAYER, x="large and tiny tokens", path="logits"),
    replace(LAYER, x="NaN", tokens=7),
    replace(LAYER, experts=2, top_k=1, tokens=41, scales="rows", bias="none"),
    replace(LAYER, experts=1, top_k=1, tokens=140, hidden_blocks=10, intermediate_blocks=2),
]
# Of the dispatch table: both forms of the decode kernel, tiles of 4 and of 8 warps.
CONFIGS = {"decode": (0, 1), "grouped": (2, 7), "common": (0, 2)}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_with_faults(tmp_path_factory.mktemp("faults"))


def linear_layer_is_wrong(library: ctypes.CDLL) -> bool:
    """INT8: more tokens and rows than a block takes; enough blocks for K to be in parts; a queue, two passes."""
    draw = torch.Generator().manual_seed(0)
    names = dense_configs(library)
    for tokens, rows, multiprocessors, name in (
        *((70, 150, 2, "int8_128x64"), (10, 48, 32, "int8_128x64")),
        (8, 48, 1, "int8_rows40_tokens8"),
    ):
        x, weight = (torch.randn(count, 64 * 9, generator=draw).bfloat16() for count in (tokens, rows))
        encoded = Int8Weights.quantize(weight)
        library.emulate(multiprocessors, True, 0)
        try:
            out = dense(library, names.index(name), x, encoded.codes, encoded.scales, None)
        except AssertionError:  # read before it was there
            return True
        right = x.double() @ encoded.decode(dtype=torch.float64).T
        if not (out.double() - right).norm() <= TOLERANCE["native"] * right.norm():
            return True
    return False


def fp4_layer_is_wrong(library: ctypes.CDLL) -> bool:
    """Three terms, tokens of two m16 tiles a warp, K of one step and a half; the last token has a NaN."""
    shape, tokens, config, terms = MoEShape(2, 2, 96, 96, 2), 40, 0, 3
    weights, (x, logits) = random_weights(shape, "cpu"), inputs(shape, tokens, 0)
    x[-1, 40] = torch.nan
    right = reference_on_terms(weights, x[:-1], logits[:-1], shape, None, terms)
    of_x = fp4_terms.split(x, terms)
    layer = EmulatedFp4(library, shape, weights)
    for multiprocessors in (1, 3):  # a block has several work tiles, and: all begin at once
        library.emulate(multiprocessors, True, 0)
        workspace = layer.workspace(tokens)
        try:
            out = layer(x, logits, config, workspace=workspace)
            found = layer.terms(workspace, tokens, terms, activations=False)
            layer.terms(workspace, tokens, terms, activations=True)
        except AssertionError:  # read before it was there; or something lies beyond K
            return True
        if not (all(map(torch.equal, found, of_x)) and out[-1].isnan().all()):
            return True
        if not (out[:-1].double() - right).norm() <= TOLERANCE["native"] * right.norm():
            return True
    return False


def moe_layer_is_wrong(library: ctypes.CDLL, configs: tuple[int, ...]) -> bool:
    for config in configs:
        # Few blocks, so that each has much to do, three at least; copies as late as they may be.
        library.emulate(1 if config in CONFIGS["grouped"] else 3, True, 0)
        subject = Subject("faulty", emulated_native(library, only=config), TOLERANCE["native"])
        most = [*table(library).values()][config]
        if any(subject.complaint(case) is not None for case in CASES if case.tokens <= most):
            return True
    return False


# By the folder of kernels/csrc that has the fault.
CHECKS: dict[str, Callable[[ctypes.CDLL], bool]] = {
    "dense": linear_layer_is_wrong,
    "fp4": fp4_layer_is_wrong,
    **{folder: partial(moe_layer_is_wrong, configs=configs) for folder, configs in CONFIGS.items()},
}


def is_wrong(library: ctypes.CDLL, mutation: Mutation | None, folder: str) -> bool:
    """In a child, for the emulator ends the process where all threads wait for each other."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # it would print where, as of a crash: to pytest's own copy of stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        switch_on(library, mutation)
        os._exit(CHECKS[folder](library))
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_is_caught(library: ctypes.CDLL, mutation: Mutation) -> None:
    assert is_wrong(library, mutation, mutation.module.split("/")[0])


@pytest.mark.parametrize("folder", sorted(CHECKS.keys() - {"common"}))
def test_no_fault_is_no_fault(library: ctypes.CDLL, folder: str) -> None:
    assert not is_wrong(library, None, folder)
