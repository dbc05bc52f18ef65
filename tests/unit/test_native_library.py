# SPDX-License-Identifier: Apache-2.0
"""Which CUDA library is loaded, and where `mxfp4-sm120 build` puts it."""

import argparse
import os
import stat

import pytest

from vllm_mxfp4_sm120.backends.native import library
from vllm_mxfp4_sm120.cli import build

BLACKWELL = (12, 0)

# What `mxfp4-sm120 build` runs, for a machine with these cards and all tools.
KERNELS = """
def cards():
    return {cards}
def missing(for_cards):
    return []
def build(output, for_cards):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"for {{for_cards}}")
    output.chmod(0o666)
"""


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A package with sources and without a library, and an empty cache directory."""
    (tmp_path / "sources" / "csrc").mkdir(parents=True)
    (tmp_path / "sources" / "csrc" / "ops.cpp").write_text("one")
    (tmp_path / "package").mkdir()
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "sources", lambda: tmp_path / "sources")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "package" / "_native.so")
    return tmp_path


def put(path, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    path.write_text("code")
    path.chmod(mode)
    return path


def run(tmp_path, monkeypatch, cards, writable=True, everything=False):
    (tmp_path / "sources" / "setup.py").write_text(KERNELS.format(cards=cards))
    monkeypatch.setattr(build.os, "access", lambda path, mode: writable)
    return build.run(argparse.Namespace(all=everything)).tell(as_json=False)


def test_what_was_built_for_this_card_comes_before_the_packages():
    assert library.find(BLACKWELL) is None and library.find(None) is None
    package = put(library.LIBRARY)
    assert library.find(BLACKWELL) == package
    built = put(library.cache_path(BLACKWELL))
    assert library.find(BLACKWELL) == built
    assert library.find((9, 0)) == library.find(None) == package  # homes are shared between machines


def test_other_sources_want_another_library(places):
    put(library.cache_path(BLACKWELL))
    (places / "sources" / "csrc" / "ops.cpp").write_text("another op")
    assert library.cached(BLACKWELL) is None


def link(path):
    path.rename(path.with_name("real.so"))
    path.symlink_to(path.with_name("real.so"))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.chmod(0o664), "others may write"),
        (lambda path: path.chmod(0o646), "others may write"),
        (lambda path: path.parent.chmod(0o777), "others may write"),
        (lambda path: path.parents[1].chmod(0o775), "others may write"),
        (lambda path: os.chown(path, 12345, -1), "belongs to another user"),
        (lambda path: os.chown(path.parent, 12345, -1), "belongs to another user"),
        (link, "is no regular file"),
    ],
)
def test_what_others_could_have_written_is_not_loaded(damage, why):
    path = put(library.cache_path(BLACKWELL))
    try:
        damage(path)
    except PermissionError:
        pytest.skip("only root gives files away")
    with pytest.raises(PermissionError, match=f"{why}.*no code is loaded from there"):
        library.find(BLACKWELL)


def test_build_goes_into_the_package(places, monkeypatch, capsys):
    older = put(library.cache_path(BLACKWELL))
    assert run(places, monkeypatch, ["12.0"]) == 0
    assert library.LIBRARY.read_text() == "for ['12.0']" and not older.exists()
    assert capsys.readouterr().out == f"compiling for 12.0\nbuilt {library.LIBRARY}\n"
    assert run(places, monkeypatch, [], everything=True) == 0
    assert library.LIBRARY.read_text() == "for None"


def test_build_goes_into_the_cache_where_the_package_is_not_ours(places, monkeypatch):
    assert run(places, monkeypatch, ["9.0", "12.0"], writable=False) == 0
    assert not library.LIBRARY.exists()
    for capability in ((9, 0), BLACKWELL):
        found = library.find(capability)  # trusted, though the compiler's umask let everybody write it
        assert found.read_text() == "for ['9.0', '12.0']" and stat.S_IMODE(found.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("cards", "writable", "everything", "why"),
    [
        ([], True, False, "no NVIDIA GPU from sm_80 on is here: --all compiles for every card"),
        ([], False, True, "can't be written, and there is no cache directory or no GPU to build for it"),
    ],
)
def test_build_says_why_it_does_not(places, monkeypatch, cards, writable, everything, why):
    with pytest.raises(RuntimeError, match=why):
        run(places, monkeypatch, cards, writable, everything)


@pytest.mark.parametrize("tool", ["pip", "uv", None])
@pytest.mark.parametrize("status", [0, 1])
def test_build_fetches_what_is_missing(tool, status, tmp_path, monkeypatch):
    """Apart from the environment's packages; by pip, else uv, else by nobody."""
    commands = []
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: tool if tool == "pip" else None)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/uv" if tool == "uv" else None)
    monkeypatch.setattr(
        build.subprocess,
        "run",
        lambda command, check: commands.append(command) or argparse.Namespace(returncode=status),
    )
    monkeypatch.setattr(build.sys, "path", [])
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, "before")
    build.fetch([], tmp_path)
    assert not commands
    if tool is None or status:
        why = "neither pip nor uv is here to fetch cmake" if tool is None else "cmake could not be installed"
        with pytest.raises(RuntimeError, match=f"{why}.*: put nvcc and cmake on PATH"):
            build.fetch(["cmake"], tmp_path)
        return
    build.fetch(["cmake"], tmp_path)
    [command] = commands
    assert command[-4:] == ["--quiet", "--target", str(tmp_path), "cmake"]
    assert command[:2] == ([build.sys.executable, "-m"] if tool == "pip" else ["/bin/uv", "pip"])
    assert os.environ["PATH"] == f"{tmp_path}/bin:before" and os.environ["PYTHONPATH"] == f"{tmp_path}:before"


def test_build_leaves_nothing_where_others_may_write(places, monkeypatch):
    (places / "cache").mkdir()
    (places / "cache").chmod(0o777)
    with pytest.raises(RuntimeError, match=r"others may write .*MXFP4_SM120_CACHE_DIR names another"):
        run(places, monkeypatch, ["12.0"], writable=False)
    assert not list((places / "cache").rglob("*.so"))
