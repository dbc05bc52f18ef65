# SPDX-License-Identifier: Apache-2.0
"""What lies in a checkpoint's folder that isn't one: refused on one line that names the file, without waiting."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.faults.damage import a_layer_more, both, file_of, in_place_of, index_of, second_shard
from tests.faults.table import SERVED, Row, parametrize
from tests.support.checkpoints import INDEX, SHARD, read_experts

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4792272488\n"

FILES = [
    Row(
        "a layer too many",
        a_layer_more(2),
        "holds 3 layers, but num_hidden_layers is 2",
    ),
    Row("a layer too many, with a gap", a_layer_more(5), "holds a layer 5, but num_hidden_layers is 2"),
    Row("no config", lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    Row("config is no JSON", file_of("config.json", '{"model_type": '), "config.json: not JSON"),
    Row("config is no text", file_of("config.json", b"\xff\xfe\x00"), "config.json: not JSON"),
    Row("config is a list", file_of("config.json", "[]"), "config.json: holds list, expected a JSON object"),
    Row("config nested deeply", file_of("config.json", '{"a":' * 100_000), "config.json: nested too deeply"),
    Row("config of lists nested deeply", file_of("config.json", "[" * 100_000), "config.json: nested too deeply"),
    Row(
        "config with a number of a million digits",
        file_of("config.json", '{"a": ' + "1" * 1_000_000 + "}"),
        "config.json: not JSON",
    ),
    Row("config with a key twice", file_of("config.json", '{"a": 1, "a": 2}'), "config.json: 'a' stands there twice"),
    Row(
        "config is a git-lfs pointer",
        file_of("config.json", LFS),
        "config.json: a git-lfs pointer, expected the file itself; run git lfs pull",
    ),
    Row("config is a pipe", in_place_of("config.json", os.mkfifo), "config.json: not a regular file"),
    Row("config is a folder", in_place_of("config.json", os.mkdir), "config.json: not a regular file"),
    Row(
        "config is endless",
        in_place_of("config.json", lambda p: p.symlink_to("/dev/zero")),
        "config.json: not a regular file",
    ),
    Row("config is huge", lambda d: os.truncate(d / "config.json", 1 << 33), "config.json: 8589934592 bytes, expected"),
    Row("no weights", lambda d: [(d / INDEX).unlink(), (d / SHARD).unlink()], "no *.safetensors here"),
    Row("no folder", shutil.rmtree, "no such directory, expected one that holds a checkpoint"),
    Row("index is no JSON", file_of(INDEX, "{"), f"{INDEX}: not JSON"),
    Row("index is a pipe", in_place_of(INDEX, os.mkfifo), f"{INDEX}: not a regular file"),
    Row("index is a git-lfs pointer", file_of(INDEX, LFS), f"{INDEX}: a git-lfs pointer"),
    Row("index without a map", file_of(INDEX, "{}"), f"{INDEX}: weight_map is None, expected an object"),
    Row(
        "index with a list for a map",
        file_of(INDEX, '{"weight_map": ["a"]}'),
        "weight_map is ['a'], expected an object",
    ),
    Row(
        "index with a number for a file",
        index_of(lm_head__weight=1),
        "the file of lm_head.weight is 1, expected the name",
    ),
    Row(
        "index with a list for a file",
        index_of(lm_head__weight=[SHARD]),
        f"the file of lm_head.weight is ['{SHARD}'], expected the name",
    ),
    Row(
        "index with null for a file",
        index_of(lm_head__weight=None),
        "the file of lm_head.weight is None, expected the name",
    ),
    Row(
        "index out of the folder",
        index_of(lm_head__weight="../model.safetensors"),
        "is '../model.safetensors', expected the name",
    ),
    Row(
        "index to the root",
        index_of(lm_head__weight="/etc/model.safetensors"),
        "is '/etc/model.safetensors', expected the name",
    ),
    Row(
        "index to a folder below",
        index_of(lm_head__weight="original/model.safetensors"),
        "expected the name of a *.safetensors",
    ),
    Row(
        "index to another kind of file",
        index_of(lm_head__weight="pytorch_model.bin"),
        "is 'pytorch_model.bin', expected the name",
    ),
    Row(
        "index with a line break",
        index_of(lm_head__weight="a\nb.safetensors"),
        "is 'a\\nb.safetensors', expected the name",
    ),
    Row("index with a long name", index_of(lm_head__weight="a" * 9000 + ".safetensors"), "aaaa..., expected the name"),
    Row(
        "index to a missing shard",
        index_of(lm_head__weight="gone.safetensors"),
        "gone.safetensors: no such file, expected a shard",
    ),
    Row(
        "index with a tensor that no shard holds",
        index_of(ghost=SHARD),
        f"says that ghost lies in {SHARD}, which doesn't hold it",
    ),
    Row(
        "index with a tensor twice",
        file_of(INDEX, f'{{"weight_map": {{"a": "{SHARD}", "a": "x.safetensors"}}}}'),
        "'a' stands there twice",
    ),
    Row("a tensor in two shards", second_shard, "holds model.norm.weight, which"),
    Row(
        "no index and a second model",
        both(lambda d: (d / INDEX).unlink(), lambda d: shutil.copy(d / SHARD, d / "z.safetensors")),
        "z.safetensors: holds lm_head.weight, which",
    ),
    Row("no index", lambda d: (d / INDEX).unlink(), SERVED),
    Row("shard is empty", file_of(SHARD, b""), f"{SHARD}: cut short or damaged at 0 bytes"),
    Row("shard is cut", lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 1000), "cut short or damaged at"),
    Row(
        "shard is a git-lfs pointer",
        file_of(SHARD, LFS),
        f"{SHARD}: a git-lfs pointer, expected the file itself; run git lfs pull",
    ),
    Row("shard is a pipe", in_place_of(SHARD, os.mkfifo), f"{SHARD}: not a regular file"),
    Row("shard is a device", in_place_of(SHARD, lambda p: p.symlink_to("/dev/zero")), f"{SHARD}: not a regular file"),
    Row("shard is a folder", in_place_of(SHARD, os.mkdir), f"{SHARD}: not a regular file"),
    Row(
        "shard is a link to nothing",
        in_place_of(SHARD, lambda p: p.symlink_to("../../blobs/gone")),
        f"{SHARD}: points to ../../blobs/gone",
    ),
    Row(
        "shard is a link to itself",
        in_place_of(SHARD, lambda p: p.symlink_to(SHARD)),
        f"{SHARD}: too many levels of symbolic links",
    ),
    Row("shard with a huge header", file_of(SHARD, b"\xff" * 8 + b"{}"), "cut short or damaged at 10 bytes"),
    Row("shard with a header of zeros", file_of(SHARD, bytes(4096)), "cut short or damaged at 4096 bytes"),
    Row(
        "shard with a header nested deeply",
        file_of(SHARD, (1 << 20).to_bytes(8, "little") + b'{"a":' * 209_715 + b" "),
        "cut short",
    ),
    Row(
        "shard with offsets that overlap",
        lambda d: file_of(
            SHARD,
            b"".join(
                (
                    len(
                        h := json.dumps(
                            {n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}
                        ).encode()
                    ).to_bytes(8, "little"),
                    h,
                    bytes(4),
                )
            ),
        )(d),
        "cut short",
    ),
    Row("shard that is a pickle", file_of(SHARD, b"PK\x03\x04" + bytes(1000)), "cut short or damaged"),
]


@pytest.mark.usefixtures("no_hang")
@parametrize(FILES)
def test_folder(row: Row, copy: Path, sound: Path) -> None:
    row.damage(copy)
    row.check(lambda: read_experts(copy), read_experts(sound))
