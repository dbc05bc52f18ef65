# SPDX-License-Identifier: Apache-2.0
"""The text that this model learned: novels and the World English Bible, out of three Debian packages.

    apt-get download r-cran-janeaustenr r-cran-tokenizers sword-text-web
    for deb in *.deb; do dpkg-deb -x $deb packages; done
    python models/gpt-oss-small/corpus.py packages .run/corpus

writes `train.txt`, `heldout.txt`, the tokenizer that is trained on the first, and both as arrays of its token ids.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Six novels of Jane Austen, and Moby-Dick: R's packages keep each as a vector of lines.
NOVELS = {
    "r-cran-janeaustenr": "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "r-cran-tokenizers": "usr/lib/R/site-library/tokenizers/data/Rdata.rdb",
}
BIBLE = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
PARAGRAPH = re.compile(r'<(?:div [^>]*sID="[^"]*"[^>]*type="(?:paragraph|x-p)"|div type="(?:paragraph|x-p)"|p)[^>]*>')

VOCABULARY = 2560
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>")
END_OF_TEXT = SPECIAL_TOKENS[1]
# A piece is some pages of one book. One in 60 is held out: the model is judged by text that it never saw.
PIECE_CHARACTERS, HELD_OUT_EVERY = 6000, 60
# Typographic quotes, dashes and spaces as ASCII writes them; underscores, which mark emphasis, go.
ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "_": None,
    }
)


def r_strings(database: Path) -> Iterator[list[str]]:
    """Every character vector in R's lazy-load database.

    An object is a length, big-endian, and so many bytes of zlib; inside, R's serialization, version 2 or 3: a string is
    a word of flags whose low byte is 9, its length, and its bytes.
    """
    data, at = database.read_bytes(), 0
    while at + 6 < len(data):
        if data[at + 4 : at + 6] != b"\x78\x9c":
            return
        stream = zlib.decompressobj()
        value = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        version = struct.unpack_from(">i", value, 2)[0]
        start = 14 if version == 2 else 18 + struct.unpack_from(">i", value, 14)[0]
        flags, count = struct.unpack_from(">ii", value, start)
        if flags & 255 == 16:  # a vector of strings
            yield list(_vector(value, start + 8, count))


def _vector(value: bytes, at: int, count: int) -> Iterator[str]:
    for _ in range(count):
        length = struct.unpack_from(">i", value, at + 4)[0]
        yield value[at + 8 : at + 8 + max(length, 0)].decode("utf-8", "replace")
        at += 8 + max(length, 0)


def novels(packages: Path) -> Iterator[str]:
    """Each novel, a paragraph a line."""
    for database in NOVELS.values():
        for lines in r_strings(packages / database):
            paragraphs = "\n".join(lines).split("\n\n")
            yield "\n".join(filter(None, (" ".join(paragraph.split()) for paragraph in paragraphs)))


def bible(packages: Path) -> Iterator[str]:
    """Each book of the World English Bible: a compressed block of the SWORD module, less its markup and footnotes."""
    for testament in ("ot", "nt"):
        index = (packages / BIBLE / f"{testament}.bzs").read_bytes()
        blocks = (packages / BIBLE / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            text = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
            text = re.sub(r"<(note|title)\b.*?</\1>", " ", text, flags=re.DOTALL)
            text = PARAGRAPH.sub("\n", text)
            lines = (" ".join(line.split()) for line in re.sub(r"<[^>]+>", "", text).split("\n"))
            yield "\n".join(filter(None, lines))


def pieces(book: str) -> Iterator[str]:
    """The book in pieces of whole paragraphs."""
    piece: list[str] = []
    for paragraph in book.translate(ASCII).split("\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > PIECE_CHARACTERS:
            yield "\n".join(piece) + "\n"
            piece = []
    if piece:
        yield "\n".join(piece) + END_OF_TEXT


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE: it can write any text, and it learned English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.replace(END_OF_TEXT, "\n").split("\n"), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="where the Debian packages were unpacked")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    everything = [piece for book in (*novels(args.packages), *bible(args.packages)) for piece in pieces(book)]
    texts = {
        "train": "".join(piece for i, piece in enumerate(everything) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2),
        "heldout": "".join(everything[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]),
    }
    tokenizer = train_tokenizer(texts["train"])
    tokenizer.save(str(args.output / "tokenizer.json"))
    figures = {}
    for name, text in texts.items():
        tokens = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
        (args.output / f"{name}.txt").write_text(text)
        np.save(args.output / f"{name}.npy", tokens)
        figures[name] = {"characters": len(text), "tokens": len(tokens)}
    (args.output / "corpus.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
