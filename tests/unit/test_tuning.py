# SPDX-License-Identifier: Apache-2.0
"""Whose rule is used: the user's own file before the shipped one, if it fits, and what a rule may say."""

from __future__ import annotations

import json
import logging
import math
import pwd
from pathlib import Path

import pytest
import torch

from vllm_mxfp4_sm120 import config_path, proof
from vllm_mxfp4_sm120.backends import triton, tuning
from vllm_mxfp4_sm120.backends.tiled import Tiled
from vllm_mxfp4_sm120.backends.triton import Tiles
from vllm_mxfp4_sm120.backends.tuning import Bound, Family
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.tune import gpu

pytestmark = pytest.mark.usefixtures("home")
CARD = "NVIDIA GeForce RTX 5090"
SHIPPED = tuning.read(config_path("tuning", "default.json"))


def own_file(contents: object) -> Path:
    path = tuning.user_path(CARD)
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return path


def find(family: Family = Family.NATIVE) -> tuning.Found:
    def check(rule: tuning.Rule, name: str) -> None:
        if any(bound.kernel == "no such kernel" for bound in rule):
            raise ValueError(f"{name}: no such kernel")

    return tuning.find(CARD, family, "v1", check)


def test_the_users_file_comes_first() -> None:
    assert find().path == config_path("tuning", "default.json") and find().rule == SHIPPED
    path = own_file({"library": "v1", "rule": [{"kernel": "decode"}], "triton": "v0"})
    assert find() == tuning.Found(path, (Bound("decode"),))
    assert path.name == "NVIDIA_GeForce_RTX_5090.json"
    assert find(Family.TRITON).path == config_path("tuning", "default.json") and find(Family.TRITON).ignored is None
    assert path in tuning.files()  # so that a remembered proof ends when it changes


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (
            {"library": "v0", "rule": [{"kernel": "decode"}]},
            "tuned for another version of library (v0, this is v1)",
        ),
        ({"rule": [{"kernel": "decode"}]}, "was tuned for another version of library (None, this is v1)"),
        ({"library": "v1", "rule": [{"kernel": "no such kernel"}]}, "no such kernel"),
        ({"library": "v1", "rule": [{"kernel": "decode", "tokens": 8}]}, "the last line of its rule has a bound"),
        ({"library": "v1", "rule": [{"kernel": "decode", "tokens": "8"}, {"kernel": "b"}]}, "numbers above 0"),
        ({"library": "v1", "rule": 7}, "is no rule"),
        ({"library": "v1", "rule": [{"kernel": "decode", "tokens": -8}, {"kernel": "b"}]}, "numbers above 0"),
        ({"library": "v1", "rule": [{"kernel": "decode", "tokens": math.nan}, {"kernel": "b"}]}, "numbers above 0"),
        ({"library": "v1", "rule": [{"kernel": "decode", "tokens": True}, {"kernel": "b"}]}, "numbers above 0"),
        ({"library": "v1", "rule": [{"kernel": "decode", "tokens": 10**400}, {"kernel": "b"}]}, "numbers above 0"),
        ({"library": "v1", "rule": [{"kernel": ["decode"]}]}, "expected a kernel's name"),
        ({"library": "v1", "rule": []}, "the last line of its rule has a bound"),
        ({"library": "v1", "rule": [{"kernel": "decode"}], "for": "NVIDIA H100"}, "another card (NVIDIA H100, this is"),
        ({"library": "v1", "rule": [{"kernel": "decode"}], "for": ["a\nb" * 999]}, "was tuned on another card"),
        ({"library": "v\n1" * 999, "rule": [{"kernel": "decode"}]}, "another version of library (v 1v 1"),
        ({"library": "v1", "rule": [{"kernel": "decode", "a\nb": 1}]}, "is no rule"),
        ('{"library": "v1", "rule": [{"kernel": "decode", "tokens": ' + "9" * 5000 + "}]}", "is no rule"),
        (" " * (tuning.LARGEST + 1), "bytes, expected some hundred"),
        ("\x00\xff", "is no rule"),
        ("[1]", "is no rule: it holds list, expected an object"),
        ("{", "is no rule"),
        ("[" * 100_000, "is no rule"),
    ],
)
def test_a_users_file_that_does_not_fit_is_ignored_with_one_line(
    contents: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = own_file(contents)
    found = find()
    assert found.path == config_path("tuning", "default.json")
    assert why in found.ignored and str(path) in found.ignored and found.ignored.endswith(tuning.REMEDY)
    with caplog.at_level(logging.WARNING, logger="vllm.mxfp4_sm120"):
        assert tuning.say(found) == tuning.say(find()) == SHIPPED
    assert [record.getMessage() for record in caplog.records] == [f"mxfp4_sm120: {found.ignored}"]
    assert found.ignored.isprintable() and len(found.ignored) < 600


def test_a_remembered_proof_ends_with_the_rule_it_was_made_under() -> None:
    def record() -> Path | None:
        return proof.record_path(Tiled, Machine(None, None), MoEShape(4, 4, 64, 32, 2))

    shipped = record()
    path = own_file({"library": "v1", "rule": [{"kernel": "decode"}]})
    own = record()
    path.unlink()
    path.mkdir()  # can't be read, which keeps nothing from starting
    assert shipped != own and record() == shipped
    assert find().path == config_path("tuning", "default.json")


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CONFIG_HOME": "/xdg"}, "/xdg"),
        ({"XDG_CONFIG_HOME": "relative"}, "/home/me/.config"),
        ({"XDG_CONFIG_HOME": "~/x"}, "/home/me/.config"),
        ({}, "/home/me/.config"),
        ({"HOME": "relative"}, None),
        ({"HOME": None}, None),
    ],
)
def test_where_a_users_file_lies(environment: dict, folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nowhere for a user whom the system has no home for, such as a container's: the shipped rule is used."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name, value in ({"XDG_CONFIG_HOME": "", "HOME": "/home/me"} | environment).items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    expected = folder and Path(folder, "vllm_mxfp4_sm120/tuning/NVIDIA_GeForce_RTX_5090.json")
    assert tuning.user_path(CARD) == expected and find().rule == SHIPPED and tuning.files()


def test_a_folder_that_is_a_link(home: Path) -> None:
    (home / "dotfiles").mkdir()
    (home / "config").symlink_to("dotfiles")
    path = own_file({"library": "v1", "rule": [{"kernel": "decode"}]})
    assert find().path == path and list((home / "dotfiles").rglob("*.json"))


def test_triton_takes_the_shipped_tiles() -> None:
    """Those of version 0.1.0, now data, but for 16 to 23 tokens an expert, where an H100 was faster with others."""
    rule = triton.rule_of(torch.device("cpu"))
    small, middle, large = (16, 64, 256, 4, 3), (64, 128, 128, 4, 3), (128, 128, 64, 4, 4)
    expected = {16: small, 16.1: (32, 128, 128, 4, 3), 23: (32, 128, 128, 4, 3), 23.1: middle, 64: middle, 65: large}
    assert {average: triton.tiles_for(rule, 1, average) for average in expected} == {
        average: Tiles(*tiles) for average, tiles in expected.items()
    }


def test_every_tile_has_a_name() -> None:
    for name in " ".join(gpu.TRIED.values()).split():
        assert str(Tiles.parse(name)) == name
    for wrong in ("", "16x64", "16x64x256w4s3 ", "15x64x256w4s3", "16x64x256w0s3", "decode"):
        with pytest.raises(ValueError, match="are no tiles: expected powers of two, such as 16x64x256w4s3"):
            Tiles.parse(wrong)
    with pytest.raises(ValueError, match=r"card\.json: decode are no tiles"):
        triton.check((Bound("decode"),), "card.json")
