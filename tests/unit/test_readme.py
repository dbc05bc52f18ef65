"""The README says what the code does, where that can be checked."""

from pathlib import Path

import pytest

from vllm_mxfp4_sm120 import envs

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("variable", envs.TABLE, ids=lambda variable: variable.name)
def test_every_variable_has_its_row(variable: envs.Variable) -> None:
    default = variable.default
    if isinstance(default, bool):
        default = int(default)
    default = "" if default is None else default
    assert f"| `{variable.name}` | {default} | {variable.meaning} |\n" in README.read_text()
