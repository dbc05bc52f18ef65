# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 bench` and `tune` on this GPU: few sizes, every step."""

import json

import pytest
import torch

from vllm_mxfp4_sm120.backends import tuning
from vllm_mxfp4_sm120.backends.native import Native
from vllm_mxfp4_sm120.backends.native import tuning as native_tuning
from vllm_mxfp4_sm120.bench.models import model
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.tune import gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def native():
    if reason := Native.why_not(Machine.here(), model("20b").experts):
        pytest.skip(reason)


def test_bench(native, capsys, tmp_path):
    arguments = ["--layers", "experts,qkv", "--tokens", "1,70", "--plot", str(tmp_path / "here.png")]
    assert main(["bench", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    layer, qkv = report["tables"]
    assert {"native"} <= set(layer["compared"]) and {"torch-bf16", "native-int8"} <= set(qkv["compared"])
    for table in report["tables"]:
        for row in table["rows"]:
            cells = dict(zip(table["columns"], row, strict=True))
            # A limit that is beaten is none; 10 % for clocks that change, and for weights that are in the L2 cache.
            assert all(cells[name] is None or cells[name] > 0.9 * cells[table["limits"].get(name, "limit")]
                       for name in table["compared"])  # fmt: skip
    assert (tmp_path / "here.png").stat().st_size > 10_000


def test_tune(native, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    around = gpu.around
    few = {1, 8, 9, 36, 37, 576, 577, 8192}
    monkeypatch.setattr(gpu, "around", lambda *each: [size for size in around(*each) if size.tokens in few])
    assert main(["tune", "--model", "20b", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["families"]["library"]["failed"] == {}
    card = Machine.here().name
    found = native_tuning.found(card)
    assert found.path == tuning.user_path(card) and str(found.path) == report["path"] and found.ignored is None
    # The library takes it, and answers by it.
    device = torch.device("cuda", torch.cuda.current_device())
    native_tuning.set_rule(device.index, found.rule)
    timed = gpu.OnGpu(device)(tuning.Family.NATIVE, gpu.Size("20b", 40, 32, 4), [found.rule[-1].kernel])
    assert timed.failed == {}
