# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes how many tokens: rules measured on a card, where they are looked for, and which one is used.

A card's own file in the user's config directory, as `mxfp4-sm120 tune` writes it, comes before what is shipped in
configs/tuning. It holds for the kernels that it was measured with: of any others it says nothing. A rule names kernels,
each of which gives the right answer; the worst that a wrong one can do is to be slow.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.cache import user_folder
from vllm_mxfp4_sm120.log import logger

LARGEST = 1 << 20  # bytes of a file; they have some hundred
REMEDY = "run mxfp4-sm120 tune again, or remove it"


class Family(StrEnum):
    """Whose kernels a rule is about, by the key of their version in a file."""

    NATIVE = "library"
    FP4 = "fp4"  # the library's too, beside its BF16 kernels together
    TRITON = "triton"

    @property
    def key(self) -> str:
        """Of the rule in a file."""
        return "rule" if self is Family.NATIVE else f"{self.value}_rule"


@dataclass(frozen=True)
class Bound:
    """One line of a rule: the kernel for up to so many tokens, and so many per expert on average."""

    kernel: str
    tokens: float = math.inf
    tokens_per_expert: float = math.inf

    def holds(self, tokens: float, tokens_per_expert: float) -> bool:
        return tokens <= self.tokens and tokens_per_expert <= self.tokens_per_expert

    def as_json(self) -> dict[str, str | float]:
        """Without the bounds that it doesn't have."""
        return {name: value for name, value in vars(self).items() if value != math.inf}


Rule = tuple[Bound, ...]


@dataclass(frozen=True)
class Found:
    """The rule in use and its file; `ignored` says why the user's own file isn't used, if there is one."""

    path: Path
    rule: Rule
    ignored: str | None = None


def file_name(card: str) -> str:
    return re.sub(r"\W+", "_", card) + ".json"


def user_path(card: str) -> Path | None:
    """Where `mxfp4-sm120 tune` puts a card's file; None for a user without a home directory."""
    folder = user_folder("XDG_CONFIG_HOME", "~/.config")
    return folder and folder / "tuning" / file_name(card)


def shipped_path(card: str) -> Path:
    """configs/tuning/<the card's name>.json, or default.json where nobody has tuned for it."""
    path = config_path("tuning", file_name(card))
    return path if path.exists() else path.with_name("default.json")


def read(path: Path, family: Family = Family.NATIVE) -> Rule:
    """{"rule": [{"kernel": "...", "tokens": 8}, {"kernel": "...", "tokens_per_expert": 24}, {"kernel": "..."}]}.

    The first line that holds is taken. Raises ValueError where a line says anything else, or the last one leaves
    some calls out.
    """
    return _rule(_contents(path), family, path)


def find(card: str, family: Family, version: str, check: Callable[[Rule, str], None]) -> Found:
    """The rule for a card: the user's if it was measured with this version of the kernels, else what is shipped.

    `check(rule, file's name)` raises ValueError for a kernel that doesn't exist. Raises ValueError for a shipped file
    that is damaged; a user's is ignored, as one of another card is.
    """
    own, ignored = find_own(card, family, version, check)
    if own is not None:
        return own
    shipped = shipped_path(card)
    rule = read(shipped, family)
    check(rule, shipped.name)
    return Found(shipped, rule, ignored)


def find_own(
    card: str, family: Family, version: str, check: Callable[[Rule, str], None]
) -> tuple[Found | None, str | None]:
    """The user's rule for a card, and why it isn't used if there is one; as `find` takes them."""
    path = user_path(card)
    try:
        if path is None or not path.is_file():
            return None, None
        contents = _contents(path)
        its_card, its_version = contents.get("for", card), contents.get(family)
        if family.key not in contents:
            return None, None  # it says nothing of these kernels
        if its_card != card:
            return None, f"{path} was tuned on another card ({_short(its_card)}, this is {card}): {REMEDY}"
        if its_version != version:
            versions = f"{_short(its_version)}, this is {version}"
            return None, f"{path} was tuned for another version of {family} ({versions}): {REMEDY}"
        rule = _rule(contents, family, path)
        check(rule, path.name)
        return Found(path, rule), None
    except (OSError, ValueError) as error:
        return None, f"{path} can't be used: {_short(error)}: {REMEDY}"


def written(path: Path | None, card: str) -> dict[str, Any]:
    """What a user's file says, {} where there is none. Raises OSError; ValueError for no rule, or another card's."""
    if path is None or not path.exists():
        return {}
    contents = _contents(path)
    if (its_card := contents.get("for", card)) != card:
        raise ValueError(f"{path.name} is for another card ({_short(its_card)}, this is {card})")
    return contents


def say(found: Found) -> Rule:
    """The rule of what was found; that a user's file is ignored is said once in a process."""
    if found.ignored is not None:
        warn(found.ignored)
    return found.rule


def choose(rule: Rule, tokens: float, tokens_per_expert: float) -> str:
    """The kernel of the first line that holds, as kernels/csrc/rules.cpp takes it."""
    return next(bound.kernel for bound in rule if bound.holds(tokens, tokens_per_expert))


def files() -> list[Path]:
    """All that exist, shipped and the user's."""
    folders = [config_path("tuning")]
    if (own := user_path("")) is not None:
        folders.append(own.parent)
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


def _short(said: object) -> str:
    """One line of a log, whatever a file holds."""
    text = " ".join(str(said).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _contents(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path.name} is no rule: {size} bytes, expected some hundred")
    try:
        contents = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not text, or a number of thousands of digits
        raise ValueError(f"{path.name} is no rule: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path.name} is no rule: it holds {type(contents).__name__}, expected an object")
    return contents


def _rule(contents: dict[str, Any], family: Family, path: Path) -> Rule:
    try:
        rule = tuple(Bound(**entry) for entry in contents[family.key])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path.name} is no rule: {error}") from error
    for bound in rule:
        numbers = (bound.tokens, bound.tokens_per_expert)
        # An integer may be larger than any float, in which form the library gets it.
        fit = all(type(each) in (int, float) and (0 < each < 1e18 or each == math.inf) for each in numbers)
        if not isinstance(bound.kernel, str) or not fit:
            raise ValueError(f"{path.name} is no rule: expected a kernel's name and numbers above 0, found {bound}")
    if not rule or rule[-1] != Bound(rule[-1].kernel):
        raise ValueError(f"{path.name}: the last line of its rule has a bound, expected a kernel for all other calls")
    return rule


@cache
def warn(why: str) -> None:
    """Once in a process."""
    logger.warning("mxfp4_sm120: %s", why)
