# SPDX-License-Identifier: Apache-2.0
"""Environment variables: defaults, what is accepted, and the exact words for what is not."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mxfp4_sm120 import envs, selector


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for variable in envs.TABLE:
        monkeypatch.delenv(variable.name, raising=False)


def test_the_table_has_every_variable_once():
    names = [variable.name for variable in envs.TABLE]
    assert len(set(names)) == len(names)
    wanted = "BACKEND WEIGHTONLY GROUP_SIZE PACK_LAYOUT USE_TRITON MOE_STREAMS DISABLE_TRITON_MOE ALLOW_STUB_KERNEL"
    for short in (*wanted.split(), "FORCE_UPCAST", "BASE_GPU_ID", "DEBUG_EMPTY_CACHE", "VALIDATE_GATE", "AUTO"):
        assert getattr(envs, short).name == f"MXFP4_SM120_{short}"
        assert getattr(envs, short) in envs.TABLE
    for variable in envs.TABLE:
        assert variable.meaning and variable.kind.accepted


def test_unset_and_empty_mean_the_default(monkeypatch):
    envs.check()
    assert envs.BACKEND.get() == "auto"
    assert envs.GROUP_SIZE.get() is None
    monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", "")
    assert envs.MOE_STREAMS.get() == 1


def test_values_are_read_when_asked_for(monkeypatch):
    assert envs.FORCE_UPCAST.get() is False
    monkeypatch.setenv("MXFP4_SM120_FORCE_UPCAST", "1")
    assert envs.FORCE_UPCAST.get() is True
    monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", " 4 ")
    assert envs.MOE_STREAMS.get() == 4


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        (
            "BACKEND",
            "cutlass",
            "one of auto, flashinfer_trtllm, flashinfer_trtllm_mxfp8, native, triton, tiled, upcast",
        ),
        ("WEIGHTONLY", "yes", "0 or 1"),
        ("GROUP_SIZE", "16", "32"),
        ("PACK_LAYOUT", "high_nibble_first", "low_nibble_first"),
        ("USE_TRITON", "true", "0 or 1"),
        ("MOE_STREAMS", "0", "an integer from 1 to 32"),
        ("MOE_STREAMS", "2.5", "an integer from 1 to 32"),
        ("DISABLE_TRITON_MOE", "2", "0 or 1"),
        ("ALLOW_STUB_KERNEL", "on", "0 or 1"),
        ("FORCE_UPCAST", "-1", "0 or 1"),
        ("BASE_GPU_ID", "-1", "an integer from 0 to 1023"),
        ("DEBUG_EMPTY_CACHE", "no", "0 or 1"),
        ("VALIDATE_GATE", "01", "0 or 1"),
        ("AUTO", "auto", "0 or 1"),
    ],
)
def test_bad_values_stop_the_start(monkeypatch, name, value, accepted):
    monkeypatch.setenv(f"MXFP4_SM120_{name}", value)
    with pytest.raises(ValueError) as error:
        envs.check()
    assert str(error.value) == f"MXFP4_SM120_{name}={value!r} is not accepted: expected {accepted}"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MXFP4_SM120_BACKENDS", "BACKEND"),
        ("MXFP4_SM120_STREAMS", "MOE_STREAMS"),
        ("MXFP4_SM120_FORCEUPCAST", "FORCE_UPCAST"),
    ],
)
def test_unknown_names_stop_the_start_with_the_nearest(monkeypatch, name, nearest):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError) as error:
        envs.check()
    assert str(error.value) == f"{name} is not a variable of this plugin: did you mean MXFP4_SM120_{nearest}?"


def test_other_programs_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("MXFP4_SM121_BACKEND", "x")
    monkeypatch.setenv("VLLM_MXFP4_SM120_BACKEND", "x")
    envs.check()


def test_no_source_reads_a_variable_past_the_table(pytestconfig):
    """A misspelt name in the code would never be set by anybody: all names in the package are the table's."""
    known = {variable.name for variable in envs.TABLE}
    for path in (pytestconfig.rootpath / "vllm_mxfp4_sm120").rglob("*.py"):
        for name in re.findall(r"MXFP4_SM120_[A-Z_]+[A-Z]", path.read_text()):
            assert name in known, f"{path}: {name}"


# What an environment can hold: no NUL, bytes that aren't UTF-8 as surrogates.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(variable=st.sampled_from(envs.TABLE), text=TEXT | st.integers().map(str) | st.just("9" * 5000))
def test_any_text_is_a_value_or_one_line(variable, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable.name, text)
        try:
            envs.check()
        except ValueError as error:
            assert str(error).startswith(f"{variable.name}=") and len(str(error).splitlines()) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OPTION = st.sampled_from(["backend", "use_triton", "disable_triton_moe", "proof", "x"])


@settings(max_examples=300, deadline=None)
@given(options=JSON | st.dictionaries(OPTION, JSON | st.sampled_from(["tiled", "triton", "auto"])))
def test_any_additional_config_is_a_request_or_one_line(options):
    try:
        selector.Request.from_user(additional_config={"mxfp4_sm120": options})
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
