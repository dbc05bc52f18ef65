# SPDX-License-Identifier: Apache-2.0
"""Remembered proofs: a cache in whatever state never keeps a server from starting, and only trusted records count."""

import errno
import fcntl
import json
import logging
import os
import pwd
import threading
import time

import faulty
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_mxfp4_sm120 import drafts, proof
from vllm_mxfp4_sm120.moe import MoEShape
from vllm_mxfp4_sm120.platform import Machine
from vllm_mxfp4_sm120.proof import record as records

CPU = Machine(None, None)
GPT_OSS = MoEShape(32, 32, 2880, 2880, 4)
RIGHT, WRONG = proof.Proof(None), proof.Proof("wrong numbers")


@pytest.fixture(autouse=True)
def solved(tmp_path, monkeypatch, caplog):
    """A cache, and a child that always finds the same; the list counts the proofs."""
    caplog.set_level(logging.INFO)
    proofs = []

    def solve(*arguments):
        proofs.append(arguments)
        return WRONG

    monkeypatch.setattr(proof, "solve_in_child", solve)
    monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MXFP4_SM120_PROOF_SECONDS", raising=False)
    records._say.cache_clear()
    return proofs


def ask():
    return proof.why_not(faulty.Good, CPU, GPT_OSS)


def path():
    return proof.record_path(faulty.Good, CPU, GPT_OSS)


def failing(monkeypatch, name, number, module=os):
    def raises(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, raises)


def said(caplog):
    lines = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line for line in lines)
    return lines


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("what", ["mkdir", "replace", "fchmod"])
def test_a_cache_that_cannot_be_written(what, number, monkeypatch, solved, caplog):
    failing(monkeypatch, what, number)
    assert ask() == ask() == "wrong numbers"
    assert len(solved) == 2
    (line,) = said(caplog)
    assert os.strerror(number) in line and "MXFP4_SM120_CACHE_DIR" in line
    if (folder := path().parent).exists():
        assert [entry.suffix for entry in folder.iterdir()] == [".lock"]  # no draft


def test_a_full_disk(monkeypatch, solved, caplog):
    failing(monkeypatch, "mkstemp", errno.ENOSPC, drafts.tempfile)
    assert ask() == "wrong numbers" and len(said(caplog)) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.EACCES])
def test_a_cache_without_locks(number, monkeypatch, solved):
    """As on a network's disk, or where the lock is another user's: nothing waits, the answer is remembered."""
    monkeypatch.setenv("MXFP4_SM120_PROOF_SECONDS", "1")
    failing(monkeypatch, "flock", number, fcntl)
    assert ask() == "wrong numbers" and "remembered" in ask()
    assert len(solved) == 1


def test_a_known_answer_needs_no_lock_and_no_writing(monkeypatch, solved, caplog):
    proof.remember(path(), RIGHT)
    with FileLock(path().with_suffix(".lock")):
        for name in ("mkdir", "replace"):
            failing(monkeypatch, name, errno.EROFS)
        assert ask() is None
    assert not solved and not said(caplog)


def test_a_file_where_a_directory_should_be(tmp_path, monkeypatch, solved, caplog):
    (tmp_path / "file").write_text("in the way")
    for place in ("file", "file/below"):
        monkeypatch.setenv("MXFP4_SM120_CACHE_DIR", str(tmp_path / place))
        assert ask() == "wrong numbers"
    assert (tmp_path / "file").read_text() == "in the way" and len(said(caplog)) == 2


def test_no_home_directory(monkeypatch, solved, caplog):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("MXFP4_SM120_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert proof.cache_dir() is None and proof.forget() == 0
    assert ask() == ask() == "wrong numbers" and len(solved) == 2
    assert len(said(caplog)) == 1 and "no home directory" in said(caplog)[0]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"MXFP4_SM120_CACHE_DIR": "~/proofs of mine"}, "/home/me/proofs of mine"),
        ({"MXFP4_SM120_CACHE_DIR": "/srv/cache", "XDG_CACHE_HOME": "/xdg"}, "/srv/cache"),
        ({"MXFP4_SM120_CACHE_DIR": "~no such user/cache"}, None),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/vllm_mxfp4_sm120"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/vllm_mxfp4_sm120"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/vllm_mxfp4_sm120"),
        ({"HOME": "relative"}, None),
    ],
)
def test_the_folder(environment, folder, monkeypatch):
    for name, value in ({"MXFP4_SM120_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"} | environment).items():
        monkeypatch.setenv(name, value)
    assert proof.cache_dir() == (folder and records.Path(folder))


def test_a_config_map(tmp_path, monkeypatch, solved):
    """Kubernetes: records are symbolic links into a folder that is itself one."""
    proof.remember(path(), RIGHT)
    name, folder = path().name, path().parent
    (folder / "..2026").mkdir()
    (folder / name).rename(folder / "..2026" / name)
    (folder / "..data").symlink_to("..2026")
    (folder / name).symlink_to(f"..data/{name}")
    assert ask() is None and not solved


def damage_owner(record):
    os.chown(record, 12345, -1)


def damage_folder_owner(record):
    os.chown(record.parent, 12345, -1)


def link_elsewhere(record):
    elsewhere = record.parents[2] / "others"
    elsewhere.mkdir()
    record.rename(elsewhere / "r")
    elsewhere.chmod(0o1777)
    record.symlink_to(elsewhere / "r")


@pytest.mark.parametrize(
    ("damage", "who"),
    [
        (lambda record: record.chmod(0o666), "others may write"),
        (lambda record: record.chmod(0o664), "others may write"),
        (lambda record: record.parent.chmod(0o775), "others may write"),
        (lambda record: record.parent.chmod(0o1777), "others may write"),
        (lambda record: record.parents[1].chmod(0o777), "others may write"),
        (damage_owner, "another user (12345)"),
        (damage_folder_owner, "another user (12345)"),
        (link_elsewhere, "others may write"),
    ],
)
def test_what_others_could_have_written_is_not_trusted(damage, who, solved, caplog):
    if os.geteuid() != 0 and "another" in who:
        pytest.skip("needs root")
    proof.remember(path(), RIGHT)
    assert ask() is None and not solved
    damage(path())
    assert ask() == "wrong numbers" and len(solved) == 1
    assert len(said(caplog)) == 1 and who in said(caplog)[0]


def test_a_bad_record_in_a_good_folder_is_replaced(solved):
    proof.remember(path(), RIGHT)
    path().chmod(0o666)
    assert ask() == "wrong numbers"
    assert "remembered" in ask() and path().stat().st_mode & 0o777 == 0o644
    assert path().parent.stat().st_mode & 0o022 == 0


def test_written_under_any_umask(solved):
    before = os.umask(0)
    try:
        assert ask() == "wrong numbers" and "remembered" in ask()
    finally:
        os.umask(before)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 5000, '{"final": true}', '{"reason": 5}', '{"reason": "a\\nb"}'])
def test_a_torn_record_is_no_record(text, solved):
    proof.remember(path(), RIGHT)
    path().write_text(text)
    assert proof.recall(path()) is None


def test_a_pipe_or_a_folder_is_no_record():
    path().parent.mkdir(parents=True)
    os.mkfifo(path())
    assert proof.recall(path()) is None
    path().unlink()
    path().mkdir()
    assert proof.recall(path()) is None
    assert ask() == "wrong numbers"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["reason", "final", "x"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_bytes_are_a_proof_or_none(content):
    record = path()
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_bytes(content)
    known = proof.recall(record)
    if known is not None:
        assert json.loads(content)["reason"] == known.reason and known.final


def test_waiting_is_said_and_ends(monkeypatch, solved, caplog):
    monkeypatch.setenv("MXFP4_SM120_PROOF_SECONDS", "1")
    monkeypatch.setattr(records, "PATIENCE", 0.2)
    path().parent.mkdir(parents=True)
    start = time.monotonic()
    with FileLock(path().with_suffix(".lock")):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(60)
    assert time.monotonic() - start > 0.9 and len(solved) == 1
    assert said(caplog) == [
        "waiting for another process's proof of good, at most 1 s",
        "another process's proof of good took more than 1 s: not waiting any longer",
    ]


def test_who_waits_takes_the_others_answer(solved):
    path().parent.mkdir(parents=True)
    with FileLock(path().with_suffix(".lock")):
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask()))
        thread.start()
        time.sleep(0.3)
        proof.remember(path(), RIGHT)
    thread.join(60)
    assert answers == [None] and not solved


def test_forget_says_what_it_cannot_remove(monkeypatch):
    proof.remember(path(), RIGHT)
    failing(monkeypatch, "unlink", errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        proof.forget()
