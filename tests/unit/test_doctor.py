# SPDX-License-Identifier: Apache-2.0
"""`mxfp4-sm120 doctor`, here and on machines that aren't here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from machines import NO_FLASHINFER, NO_SM120, NOT_BUILT, install, machine

from vllm_mxfp4_sm120 import selector
from vllm_mxfp4_sm120.backends import registry, tuning
from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.cli import doctor, surroundings
from vllm_mxfp4_sm120.cli.__main__ import main
from vllm_mxfp4_sm120.cli.surroundings import Attention, Python
from vllm_mxfp4_sm120.platform import Machine


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("MXFP4_SM120_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(surroundings, "other_pythons", lambda: [Python("/usr/bin/python3", "0.33.0", None)])
    monkeypatch.setattr(
        surroundings, "attention", lambda: Attention("TritonAttentionBackend", {"FLASH_ATTN": "no sinks"})
    )
    selector.select.cache_clear()
    yield
    selector.select.cache_clear()


def pretend(monkeypatch, name, **installed):
    install(monkeypatch, **installed)
    monkeypatch.setattr(Machine, "here", lambda first_gpu: machine(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = type("Card", (), {"name": name, "major": 12, "minor": 0, "total_memory": 32 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (20 * 2**30, 32 * 2**30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_here(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_serve"] and report["machine"] == "cpu (cpu)" and report["gpus"] == []
    assert report["chosen"] == {"gpt-oss-20b": "tiled", "gpt-oss-120b": "tiled"}
    assert report["versions"]["torch"] == torch.__version__
    assert [backend["name"] for backend in report["backends"]] == list(registry.NAMES)
    tiled = {"name": "tiled", "automatic": True, "why_not": None, "proof": "right"}
    assert tiled in report["backends"]


def test_on_a_5090(monkeypatch, capsys):
    failing = {"native": "its process died (killed by SIGSEGV): it said nothing"}
    pretend(monkeypatch, "RTX 5090", flashinfer="0.7.2", failing=failing)
    monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", "2")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "GPU 0  RTX 5090  sm_120  32 GiB, 20.0 free" in printed
    assert f"flashinfer_trtllm       no: {NO_SM120}" in printed
    assert f"flashinfer_trtllm_mxfp8 no: {NO_SM120}" in printed
    assert "native                  no: its process died (killed by SIGSEGV): it said nothing" in printed
    assert "triton                  ready, proven" in printed
    assert "gpt-oss-20b             triton" in printed and "gpt-oss-120b            triton" in printed
    assert "MXFP4_SM120_MOE_STREAMS=2" in printed


def test_whose_rule_is_in_use(monkeypatch, capsys, tmp_path):
    pretend(monkeypatch, "RTX 5090")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shipped, own = tuning.shipped_path("RTX 5090"), tuning.user_path("RTX 5090")
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"library": library.version(), "rule": [{"kernel": "decode"}]}))
    assert main(["doctor", "--no-proof"]) == 0
    assert f"tuning        native on RTX 5090: {own}" in capsys.readouterr().out.splitlines()
    own.write_text(json.dumps({"library": "another", "rule": [{"kernel": "decode"}]}))
    assert main(["doctor", "--no-proof"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"tuning        native on RTX 5090: {shipped}" in printed
    assert any(line.startswith(f"{own} was tuned for another version of library (another, ") for line in printed)


def test_without_proof(monkeypatch, capsys):
    pretend(monkeypatch, "RTX 5090", failing={"native": "never asked"})
    assert main(["doctor", "--no-proof"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "native                  ready, not proven" in printed and "gpt-oss-20b             native" in printed
    assert f"flashinfer_trtllm       no: {NO_FLASHINFER}" in printed


def test_which_linear_answers(monkeypatch, capsys):
    """Asked of the card where a user wants to know, and of nothing else."""
    pretend(monkeypatch, "RTX 5090")
    monkeypatch.setattr(doctor.plan, "make", lambda *given: asked.append(given) or doctor.plan.Plan("no answer"))
    asked = []
    assert main(["doctor", "--no-proof"]) == 0
    assert "qkv_proj 5120x2880 bf16 torch's linear: no answer" in capsys.readouterr().out.splitlines()
    assert [(given[1].name, given[2]) for given in asked] == [("RTX 5090", False)]
    asked.clear()
    monkeypatch.setattr(doctor.plan, "why_not", lambda machine: "no library")
    assert main(["doctor", "--no-proof"]) == 0
    assert "linear layers           vLLM's own (no library)" in capsys.readouterr().out.splitlines() and not asked
    monkeypatch.setenv("MXFP4_SM120_DENSE", "off")
    assert main(["doctor", "--no-proof"]) == 0
    assert "linear layers           vLLM's own (dense is off)" in capsys.readouterr().out.splitlines() and not asked
    monkeypatch.setenv("MXFP4_SM120_DENSE", "int8")
    assert main(["doctor", "--no-proof"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert {
        f"{layer} torch's linear: no answer" for layer in ("qkv_proj 5120x2880 int8", "lm_head 201088x2880 int8")
    } < {*said}
    assert [(given[1].name, given[2]) for given in asked] == [("RTX 5090", False)]


def test_the_same_kernel_for_all(monkeypatch, capsys):
    """What vLLM is told, the doctor knows: no linear of ours, and no kernel that the number of tokens chooses."""
    pretend(monkeypatch, "RTX 5090")
    monkeypatch.setattr(doctor.plan, "make", lambda *given: pytest.fail("asked"))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    for dense, line in (
        ("bf16", f"linear layers           vLLM's own ({selector.ONE_FOR_ALL})"),
        ("int8", f"qkv_proj 5120x2880 int8 torch's linear: {selector.ONE_FOR_ALL}"),
    ):
        monkeypatch.setenv("MXFP4_SM120_DENSE", dense)
        assert main(["doctor", "--no-proof"]) == 0
        printed = capsys.readouterr().out
        assert line in printed.splitlines() and "VLLM_BATCH_INVARIANT=1" in printed.splitlines()


def test_exit_1_where_nothing_can_serve(monkeypatch, capsys):
    pretend(monkeypatch, "RTX 5090", library=None)
    monkeypatch.setenv("MXFP4_SM120_BACKEND", "native")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "gpt-oss-20b             none: see below" in printed
    assert f"gpt-oss-20b: MXFP4_SM120_BACKEND asks for a backend that can't be used: native: {NOT_BUILT}" in printed
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["can_serve"] and report["flags"]["MXFP4_SM120_BACKEND"] == "native"


def test_a_bad_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("MXFP4_SM120_BACKED", "native")
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "MXFP4_SM120_BACKEND" in said.err


def test_a_driver_without_a_torch_for_it(monkeypatch, capsys):
    monkeypatch.setattr(Machine, "here", lambda first_gpu: Machine(None, None))
    monkeypatch.setattr(doctor.platform, "driver", lambda: "580.95.05")
    assert main(["doctor"]) == 0
    assert "there is an NVIDIA driver, but torch sees no GPU: a CPU build, or CUDA_VISIBLE_DEVICES?" in (
        capsys.readouterr().out.splitlines()
    )


def test_nothing_missing_is_imported():
    """With vLLM, FlashInfer and Triton impossible to import, doctor still answers."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('vllm', 'flashinfer', 'triton')));"
        "from vllm_mxfp4_sm120.cli.__main__ import main; sys.exit(main(['doctor', '--no-proof']))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "triton                  no: Triton is not installed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_first_hours_questions(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    pretend(monkeypatch, "RTX 5090")
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "attention     TritonAttentionBackend\n              not FLASH_ATTN: no sinks" in printed
    assert "/usr/bin/python3  vLLM 0.33.0, plugin none" in printed
    assert "/usr/bin/python3 has vLLM 0.33.0 without this plugin: install it there, too" in printed
    assert "VLLM_PLUGINS=other keeps vLLM from loading this plugin: add mxfp4_sm120 to it" in printed
    assert "20.0 GiB are free on the emptiest GPU: the KV cache comes on top" in printed  # 20b
    assert "20.0 GiB are free on the emptiest GPU: too little for one rank" in printed  # 120b


def test_a_report_names_nobody(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/janedoe")
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: "janedoe")
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "secretbox")
    said = (
        "/home/janedoe/models/x.so of janedoe@secretbox with hf_abcdefghij: /srv/janedoe/env/bin/python, "
        "~/private/file\nMXFP4_SM120_CACHE_DIR=/data/team x/cache"
    )
    scrubbed = doctor.scrub(said)
    for secret in ("janedoe", "secretbox", "hf_", "/srv", "models", "private", "team"):
        assert secret not in scrubbed
    assert "x.so" in scrubbed and scrubbed.endswith("MXFP4_SM120_CACHE_DIR=<path>")
    assert main(["doctor", "--report", "--no-proof"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("### mxfp4-sm120 doctor\n\n```\n") and "gpt-oss-120b" in printed


def test_a_plugin_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(surroundings.metadata, "entry_points", lambda **which: [])
    assert "vllm-mxfp4-sm120 is not installed for" in surroundings.why_not_found()


@pytest.mark.parametrize(
    ("said", "name", "why"),
    [
        ('INFO: vLLM greets\n["FLASHINFER", {"FLASH_ATTN": "no sinks"}]', "FLASHINFER", None),
        ("[]", None, "this vLLM could not be asked"),
        ("no JSON", None, "this vLLM could not be asked"),
        ("", None, "this vLLM could not be asked"),
        (None, None, "this vLLM could not be asked"),
    ],
)
def test_which_attention(said, name, why, monkeypatch):
    """Whatever another program prints, or where it fails."""
    monkeypatch.undo()
    monkeypatch.setattr(surroundings, "_output", lambda command, seconds: said)
    found = surroundings.attention()
    assert (found.name, found.why_unknown) == (name, why)
    assert found.refused == ({"FLASH_ATTN": "no sinks"} if name else {})


def test_a_program_that_fails_or_hangs():
    for code in ("raise SystemExit(3)", "import time; time.sleep(60)", r"import os; os.write(1, b'\xff')"):
        assert surroundings._output([sys.executable, "-c", code], 0.5) is None
    assert surroundings._output(["/no/such/program"], 5) is None


def test_another_python(tmp_path, monkeypatch):
    """One that has neither, found by the first line of a script called vllm."""
    monkeypatch.undo()
    python = tmp_path / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "vllm").write_text(f"#!{python}\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    others = surroundings.other_pythons()
    assert all(other.vllm is None for other in others)
    if sys.prefix != sys.base_prefix:
        assert [other.executable for other in others] == [str(python)]
