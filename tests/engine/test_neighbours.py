# SPDX-License-Identifier: Apache-2.0
"""Other models, and a vLLM that lacks a name this plugin needs."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vllm_mxfp4_sm120
from tests.engine.conftest import EAGER, ENV, ONE_PROCESS
from tests.support import warm
from tests.support.neighbours import make_neighbours

PACKAGE = Path(vllm_mxfp4_sm120.__file__).parent
# Without these not even a refusal can be registered: one logged line is all.
NOTHING_TO_REFUSE_WITH = ("QUANTIZATION_METHODS", "QuantizationConfig", "register_quantization_config")


def vllm_symbols() -> list[tuple[str, str]]:
    """(module, name) of everything that the package imports from vLLM.

    But for the kernels that `mxfp4-sm120 bench` times ours beside: without one, its column has a line that says so.
    """
    found = set()
    for file in set(PACKAGE.rglob("*.py")) - set((PACKAGE / "bench").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    return sorted(found)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A process in which the plugin has not been loaded, and what it logs; afterwards as before."""
    from vllm import plugins
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("vllm.mxfp4_sm120"), "handlers", [handler])
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm_mxfp4_sm120"]:
        monkeypatch.delitem(sys.modules, name)
    names = quantization.QUANTIZATION_METHODS
    methods, configs = list(names), dict(MODELS_CONFIG_MAP)
    custom = dict(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG)
    names[:] = [name for name in methods if name != "mxfp4_sm120"]
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.clear()
    yield lines
    names[:] = methods
    MODELS_CONFIG_MAP.update(configs)
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.update(custom)


def asked_by_name(model: Path, name: str = "mxfp4_sm120") -> str:
    """How vLLM refuses to configure an engine."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError) as caught:
        EngineArgs(model=str(model), quantization=name, load_format="dummy").create_engine_config()  # type: ignore[arg-type]
    return str(caught.value.errors()[0]["ctx"]["error"]) if hasattr(caught.value, "errors") else str(caught.value)


@pytest.mark.parametrize(("module", "name"), vllm_symbols(), ids=lambda value: str(value).rpartition(".")[2])
def test_a_symbol_is_gone(
    module: str, name: str, fresh: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import plugins

    home = importlib.import_module(module)
    found = vars(home).get("__getattr__")
    if found is not None:  # what is made when it is asked for isn't, then

        def missing(wanted: str) -> object:
            if wanted == name:
                raise AttributeError(wanted)
            return found(wanted)

        monkeypatch.setattr(home, "__getattr__", missing)
    gone = vars(home).get(name)
    monkeypatch.delitem(vars(home), name, raising=False)
    with monkeypatch.context() as patch:
        if isinstance(gone, ModuleType):  # else it would be found again, where all modules are
            patch.setitem(sys.modules, f"{module}.{name}", None)
        plugins.load_general_plugins()
    assert len(fresh) == 1 and name in fresh[0] and "0.32" in fresh[0], fresh
    assert fresh[0].isprintable()
    for back in (("__getattr__", found), (name, gone)):
        home.__dict__.update([back] if back[1] is not None else [])
    if name not in NOTHING_TO_REFUSE_WITH:
        refusal = asked_by_name(tiny)
        assert refusal in fresh[0] and name in refusal


@pytest.mark.parametrize("version", ["dev", "0.31.0", "0.99"])
def test_another_vllm(version: str, fresh: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    vllm.plugins.load_general_plugins()
    assert len(fresh) == 1 and f"is off with vLLM {version}: it was written for vLLM >= 0.32, < 0.34" in fresh[0]
    assert "vllm_mxfp4_sm120.quantization.vllm_symbols" not in sys.modules
    assert asked_by_name(tiny, "mxfp4-sm120") in fresh[0]


def test_another_vllm_on_request(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "dev")
    monkeypatch.setenv("MXFP4_SM120_ANY_VLLM", "1")
    vllm.plugins.load_general_plugins()
    assert fresh == []
    assert "mxfp4_sm120" in vllm.model_executor.layers.quantization.QUANTIZATION_METHODS


def test_a_bad_variable_is_one_warning(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import plugins

    monkeypatch.setenv("MXFP4_SM120_TYPO", "1")
    plugins.load_general_plugins()
    assert len(fresh) == 1 and "MXFP4_SM120_TYPO is not a variable of this plugin" in fresh[0]


def test_other_models_answer_the_same(tmp_path: Path) -> None:
    """Without the plugin, with it, and with it broken: the same tokens and log-probabilities."""
    folders = make_neighbours(tmp_path)
    broken = "vllm.model_executor.models.gpt_oss:GptOssForCausalLM"  # which these models don't need
    answers, logs = [], []
    for name, env, arguments in (
        ("without", {"VLLM_PLUGINS": ""}, []),
        ("healthy", {"MXFP4_SM120_DENSE": "int8"}, []),
        ("broken", {}, ["--without", broken]),
    ):
        result = tmp_path / f"{name}.json"
        log = tmp_path / f"{name}.log"
        environment = {**ENV, **ONE_PROCESS, **EAGER, **env}
        warm.run("tests.engine.neighbours", result, *folders.values(), *arguments, environment=environment, log=log)
        answers.append(json.loads(result.read_text()))
        logs.append(log.read_text())
    assert answers[0].keys() == folders.keys()
    assert answers[0] == answers[1] == answers[2]
    assert ["is off with vLLM" in log for log in logs] == [False, False, True]
