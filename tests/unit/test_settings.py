# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults, what is accepted, what contradicts, and the exact words for it."""

import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_mxfp4_sm120 import selector, settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for variable in settings.TABLE:
        monkeypatch.delenv(variable.name, raising=False)


def test_the_table_has_every_variable_once():
    names = [variable.name for variable in settings.TABLE]
    assert len(set(names)) == len(names)
    wanted = "BACKEND WEIGHTONLY GROUP_SIZE PACK_LAYOUT USE_TRITON MOE_STREAMS DISABLE_TRITON_MOE ALLOW_STUB_KERNEL"
    for short in (*wanted.split(), "FORCE_UPCAST", "BASE_GPU_ID", "DEBUG_EMPTY_CACHE", "VALIDATE_GATE", "AUTO"):
        assert getattr(settings, short).name == f"MXFP4_SM120_{short}"
        assert getattr(settings, short) in settings.TABLE
    for variable in settings.TABLE:
        assert variable.meaning and variable.kind.accepted


def test_unset_and_empty_mean_the_default(monkeypatch):
    settings.check()
    assert settings.BACKEND.get() == "auto"
    assert settings.GROUP_SIZE.get() is None
    monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", "")
    assert settings.MOE_STREAMS.get() == 1


def test_values_are_read_when_asked_for(monkeypatch):
    assert settings.FORCE_UPCAST.get() is False
    monkeypatch.setenv("MXFP4_SM120_FORCE_UPCAST", "1")
    assert settings.FORCE_UPCAST.get() is True
    monkeypatch.setenv("MXFP4_SM120_MOE_STREAMS", " 4 ")
    assert settings.MOE_STREAMS.get() == 4


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
        settings.check()
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
        settings.check()
    assert str(error.value) == f"{name} is not a variable of this plugin: did you mean MXFP4_SM120_{nearest}?"


def test_other_programs_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("MXFP4_SM121_BACKEND", "x")
    monkeypatch.setenv("VLLM_MXFP4_SM120_BACKEND", "x")
    settings.check()


def test_no_source_reads_a_variable_past_the_table(pytestconfig):
    """A misspelt name in the code would never be set by anybody: all names in the package are the table's."""
    known = {variable.name for variable in settings.TABLE}
    for path in (pytestconfig.rootpath / "vllm_mxfp4_sm120").rglob("*.py"):
        for name in re.findall(r"MXFP4_SM120_[A-Z_]+[A-Z]", path.read_text()):
            assert name in known, f"{path}: {name}"


# What an environment can hold: no NUL, bytes that aren't UTF-8 as surrogates.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@hypothesis_settings(max_examples=300)
@given(variable=st.sampled_from(settings.TABLE), text=TEXT | st.integers().map(str) | st.just("9" * 5000))
def test_any_text_is_a_value_or_one_line(variable, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable.name, text)
        try:
            settings.check()
        except ValueError as error:
            assert str(error).startswith(f"{variable.name}=") and len(str(error).splitlines()) == 1


CONTRADICTIONS = [  # variables, --additional-config, --moe-backend -> the one line
    ({"USE_TRITON": "1"}, {"use_triton": False}, None,
     "--additional-config mxfp4_sm120 use_triton is false and MXFP4_SM120_USE_TRITON=1 says otherwise; "
     "keep one of them"),
    ({"USE_TRITON": "0"}, {"use_triton": True}, None,
     "--additional-config mxfp4_sm120 use_triton is true and MXFP4_SM120_USE_TRITON=0 says otherwise; "
     "keep one of them"),
    ({"DISABLE_TRITON_MOE": "1"}, {"disable_triton_moe": False}, None,
     "--additional-config mxfp4_sm120 disable_triton_moe is false and MXFP4_SM120_DISABLE_TRITON_MOE=1 says "
     "otherwise; keep one of them"),
    ({"PROOF": "1"}, {"proof": False}, None,
     "--additional-config mxfp4_sm120 proof is false and MXFP4_SM120_PROOF=1 says otherwise; keep one of them"),
    ({"BACKEND": "native"}, {"backend": "tiled"}, None,
     "contradicting backends: --additional-config mxfp4_sm120 backend says tiled, MXFP4_SM120_BACKEND says native; "
     "keep one of them"),
    ({"WEIGHTONLY": "1"}, {"backend": "upcast"}, None,
     "contradicting backends: --additional-config mxfp4_sm120 backend says upcast, MXFP4_SM120_WEIGHTONLY says not "
     "upcast; keep one of them"),
    ({}, {"use_triton": True, "disable_triton_moe": True}, None,
     "--additional-config mxfp4_sm120 use_triton asks for triton and --additional-config mxfp4_sm120 "
     "disable_triton_moe forbids it; keep one of them"),
    ({"DISABLE_TRITON_MOE": "1"}, {}, "triton",
     "--moe-backend asks for triton and MXFP4_SM120_DISABLE_TRITON_MOE forbids it; keep one of them"),
    ({"USE_TRITON": "1", "BACKEND": "native"}, {}, None,
     "MXFP4_SM120_USE_TRITON asks for triton and MXFP4_SM120_BACKEND for native; keep one of them"),
    ({"ACTIVATION": "off"}, {"activation": "mxfp4x2"}, None,
     "--additional-config mxfp4_sm120 activation is mxfp4x2 and MXFP4_SM120_ACTIVATION=off says otherwise; keep one of "
     "them"),
    ({"ACTIVATION": "mxfp4x3"}, {}, "triton",
     "MXFP4_SM120_ACTIVATION asks for mxfp4x3, which only native has, and --moe-backend for triton; keep one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "options", "moe_backend", "line"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_an_error(monkeypatch, variables, options, moe_backend, line):
    for name, value in variables.items():
        monkeypatch.setenv(f"MXFP4_SM120_{name}", value)
    with pytest.raises(ValueError) as error:
        selector.Request.from_user(moe_backend, {"mxfp4_sm120": options})
    assert str(error.value) == line


def test_settings_that_agree_are_none(monkeypatch):
    for name, value in {"USE_TRITON": "1", "DISABLE_TRITON_MOE": "0", "PROOF": "0", "BACKEND": "auto"}.items():
        monkeypatch.setenv(f"MXFP4_SM120_{name}", value)
    options = {"use_triton": True, "disable_triton_moe": False, "proof": False, "backend": "triton"}
    request = selector.Request.from_user("triton", {"mxfp4_sm120": options, "another plugin": 1})
    assert request == selector.Request("triton", "--moe-backend", prefer_triton=True, proof=False)


def test_an_engines_own_settings_hold_for_it_alone(monkeypatch):
    options = {"mxfp4_sm120": {"proof": False, "use_triton": True}}
    assert selector.Request.from_user(None, options) == selector.Request(prefer_triton=True, proof=False)
    assert selector.Request.from_user() == selector.Request()
    assert [setting.key for setting in settings.TABLE if setting.in_json] == [
        "backend", "use_triton", "disable_triton_moe", "dense", "activation", "proof"
    ]  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OPTION = st.sampled_from(["backend", "use_triton", "disable_triton_moe", "dense", "activation", "proof", "x"])


@hypothesis_settings(max_examples=300)
@given(options=JSON | st.dictionaries(OPTION, JSON | st.sampled_from(["tiled", "triton", "auto"])))
def test_any_additional_config_is_a_request_or_one_line(options):
    try:
        selector.Request.from_user(additional_config={"mxfp4_sm120": options})
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
