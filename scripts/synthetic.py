"""Generated metadata of any size for the benchmarks, of four kinds. Equal arguments, equal bytes.

- `plain`: the layout, lengths and word frequencies of a real `meta_lat.json`. A record is about
  1.17 kB, as in a file of 12 million records and 14 GB, and holds nothing that needs care.
- `mixed`: plain records with the irregularities of real data sets, by the shares in `MIXED`.
- `hostile`: records that make every fast path give up, by the shares in `HOSTILE`.
- `deceptive`: records that look like other records inside; scripts/deceptive.py has their shapes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate, islice
from json.encoder import encode_basestring, encode_basestring_ascii
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from deceptive import Shape, deceptive_records

Kind = Literal["plain", "mixed", "hostile", "deceptive"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Record: TypeAlias = dict[str, Any]

MIXED = {
    "no caption": 0.05,
    "no tags": 0.03,
    "braces or pipes in tags": 0.02,
    "lone surrogate": 0.0005,
    # The shares above are of all records, those below of the captions.
    "several lines": 0.35,
    "curly quotes": 0.30,
    "non-Latin text": 0.10,
}
HOSTILE = {
    "braces and pipes": 0.5,
    "long caption": 0.1,
    "equal lines": 0.2,
    "stand-in characters": 0.1,
    "nested objects": 0.3,
}
"""Shares of the records of each kind that have each property."""

# fmt: off
_SYLLABLES = (
    "ka", "ri", "no", "ta", "shi", "mo", "el", "an", "dor", "vel", "is", "um", "tra", "pe", "lin",
    "gor", "sa", "be", "ton", "ur", "mi", "cha", "fle", "wo", "nd", "re", "il", "os",
)
# fmt: on
_RESOLUTIONS = [[832, 1216], [1216, 832], [1024, 1024], [896, 1152], [1152, 896], [768, 1344]]
_MARKED_TAGS = (":|", "|_|", ";|", "||_||", ":{", ":}", "{}", "re:{zero}")
_GROUPS = ("{red|blue}", "{a|{b|c}}", "{{x|y}}", "|}", "{|", "}}{{|", "{}|", '|"},', "|{\\")
_STAND_INS = ("\u2985{|", "\u2985\u2985{{|}}", "}|\u2986}", "|\u2986}} \u2985")
"""U+2985 and U+2986, which sd-scripts puts for doubled braces, right beside braces."""
# First and last letter, and what stands between words: Cyrillic, Greek, Arabic, hiragana, Han,
# Hangul.
_SCRIPTS = (
    ("\u0430", "\u044f", " "),
    ("\u03b1", "\u03c9", " "),
    ("\u0627", "\u064a", " "),
    ("\u3042", "\u3093", ""),
    ("\u4e00", "\u5fff", ""),
    ("\uac00", "\ud7a3", " "),
)


class Corpus:
    """Words and tags with Zipf's frequencies, and plain records made of them.

    `typographic` is the share of the captions whose apostrophes and dashes are typographic ones.
    """

    def __init__(
        self, seed: int = 0, words: int = 60_000, tags: int = 30_000, typographic: float = 0.3
    ) -> None:
        self._random = random.Random(seed)
        self._words = [self._word() for _ in range(words)]
        self._tags = [self._tag() for _ in range(tags)]
        self._word_weights = list(accumulate(1 / (rank + 3) for rank in range(words)))
        self._tag_weights = list(accumulate(1 / (rank + 3) for rank in range(tags)))
        self._typographic = typographic
        self._sentences = [self._sentence() for _ in range(20_000)]

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield keys and records without end."""
        rng = self._random
        number = 0
        while True:
            caption = " ".join(rng.choices(self._sentences, k=rng.randint(2, 6)))
            if rng.random() < self._typographic:
                caption = caption.replace("'", "\u2019").replace(" - ", " \u2014 ")
            tags = ", ".join(
                rng.choices(self._tags, cum_weights=self._tag_weights, k=rng.randint(15, 40))
            )
            record = {
                "caption": caption,
                "tags": tags,
                "train_resolution": rng.choice(_RESOLUTIONS),
            }
            yield f"danbooru/{1_000_000 + number}", record
            number += 1

    def _word(self) -> str:
        return "".join(
            self._random.choices(_SYLLABLES, k=self._random.choice((1, 2, 2, 2, 3, 3, 4)))
        )

    def _tag(self) -> str:
        tag = "_".join(self._word() for _ in range(self._random.choice((1, 1, 2, 2, 2, 3))))
        return f"{tag}_({self._word()})" if self._random.random() < 0.1 else tag

    def _sentence(self) -> str:
        words = self._random.choices(
            self._words, cum_weights=self._word_weights, k=self._random.randint(8, 25)
        )
        place = self._random.randrange(len(words))
        words[place] += self._random.choice((",", ",", "'s", " -", ""))
        return " ".join(words).capitalize() + "."


def records_of(kind: Kind = "plain", seed: int = 0) -> Iterator[tuple[str, Record]]:
    """Yield keys and records of a kind without end. The keys of all kinds are the same."""
    if kind == "plain":
        yield from Corpus(seed).records()
        return
    if kind == "deceptive":
        yield from deceptive_records(seed)
        return
    change = {"mixed": _mix, "hostile": _harden}[kind]
    # Its own generator, so that the plain records below do not depend on what is changed in them.
    rng = random.Random(f"{kind} {seed}")
    for key, record in Corpus(seed, typographic=0).records():
        change(record, rng)
        yield key, record


def _mix(record: Record, rng: random.Random) -> None:
    """Give a plain record the properties of `MIXED` by chance, in place."""
    if rng.random() < MIXED["no caption"]:
        del record["caption"]
    else:
        caption = record["caption"]
        if rng.random() < MIXED["several lines"]:
            line_break = rng.choice((".\n", ".\n\n"))
            caption = caption.replace(". ", line_break, rng.randint(1, 5))
        if rng.random() < MIXED["curly quotes"]:
            caption = "\u201c" + caption.replace("'", "\u2019").replace(".", ".\u201d", 1)
        if rng.random() < MIXED["non-Latin text"]:
            caption += " " + rng.choice(_foreign_sentences())
        record["caption"] = caption
    drawn = rng.random()
    if drawn < MIXED["no tags"]:
        del record["tags"]
    elif drawn < MIXED["no tags"] + MIXED["braces or pipes in tags"]:
        record["tags"] = f"{rng.choice(_MARKED_TAGS)}, {record['tags']}"
    if rng.random() < MIXED["lone surrogate"]:
        # The first half of an emoji, as programs leave it that cut a text after so many letters.
        field = "caption" if "caption" in record else "tags"
        record[field] = record.get(field, "") + "\ud83d"


def _harden(record: Record, rng: random.Random) -> None:
    """Give a plain record the properties of `HOSTILE` by chance, in place."""
    caption, tags = record["caption"], record["tags"]
    if rng.random() < HOSTILE["long caption"]:
        # 10 to 90 sentences, on one line or on so many lines that their weights must be rounded.
        sentences = caption.split(". ") * rng.randint(5, 15)
        rng.shuffle(sentences)
        caption = rng.choice((". ", ".\n")).join(sentences)
    if rng.random() < HOSTILE["braces and pipes"]:
        marks = rng.choices(_GROUPS, k=3)
        if rng.random() < HOSTILE["stand-in characters"] / HOSTILE["braces and pipes"]:
            marks[0] = rng.choice(_STAND_INS)
        caption = f"{caption.replace('. ', f' {marks[0]}. ', 3)} {marks[0]}{marks[1]}"
        tags = f"{marks[0]}, {tags.replace(', ', f', {marks[2]}, ', 3)}"
    if rng.random() < HOSTILE["equal lines"]:
        # Lines equal to each other, or to the line of the tags.
        caption = rng.choice((f"{caption}\n{caption}\n{caption}", f"{tags}\n{caption}", tags))
    record["caption"], record["tags"] = caption, tags
    if rng.random() < HOSTILE["nested objects"]:
        record["regions"] = rng.choice(_nested_objects())


@cache
def _foreign_sentences() -> list[str]:
    """2,000 sentences of made-up words, each in one script other than Latin."""
    rng = random.Random("non-Latin")
    vocabularies = [
        (
            [
                "".join(chr(rng.randint(ord(first), ord(last))) for _ in range(rng.randint(2, 6)))
                for _ in range(1000)
            ],
            between,
        )
        for first, last, between in _SCRIPTS
    ]
    sentences = []
    for _ in range(2000):
        words, between = rng.choice(vocabularies)
        sentences.append(between.join(rng.choices(words, k=rng.randint(4, 15))) + ".")
    return sentences


@cache
def _nested_objects() -> list[Record]:
    """64 objects of 5 to 25 objects that look like records to a program that searches for them."""
    rng = random.Random("nested")
    return [
        {
            f"danbooru/{number}": {
                "caption": "".join(rng.choices(_SYLLABLES, k=8)) + ' },\n  "a": {',
                "tags": ":},",
                "box": {"x": rng.randint(0, 999), "y": rng.randint(0, 999), "score": rng.random()},
                "children": [{}, {"label": "".join(rng.choices(_SYLLABLES, k=3))}],
            }
            for number in range(rng.randint(5, 25))
        }
        for _ in range(64)
    ]


def write_metadata(
    path: Path,
    size_bytes: int,
    layout: str = "indent2",
    seed: int = 0,
    records: int | None = None,
    kind: Kind = "plain",
) -> None:
    """Write a file of about `size_bytes`, of at most so many `records`.

    `layout` is indent2, indent4 (raw UTF-8), indent0, compact, or jsonl.
    """
    _write(path, islice(records_of(kind, seed), records), size_bytes, layout)


def write_deceptive(path: Path, size_bytes: int, shape: Shape, layout: str = "indent2") -> None:
    """Write a file of about `size_bytes` of deceptive records of one shape."""
    _write(path, deceptive_records(0, shape), size_bytes, layout)


def write_huge_record(
    path: Path, size_bytes: int, record_bytes: int = 300_000, every: int = 10_000
) -> None:
    """Write a file of plain records, indent=2, with one of `record_bytes` in each `every`."""

    def records() -> Iterator[tuple[str, Record]]:
        for number, (key, record) in enumerate(records_of()):
            if number % every == every // 2:
                caption = record["caption"] + " "
                record["caption"] = caption * (record_bytes // (len(caption) - 1))
            yield key, record

    _write(path, records(), size_bytes, "indent2")


def _write(path: Path, records: Iterable[tuple[str, Record]], size_bytes: int, layout: str) -> None:
    """Write records until they are `size_bytes` letters together."""
    dumps: dict[str, Callable[[str, Record], str]] = {
        "indent2": lambda key, record: _indented(key, record, 2, encode_basestring_ascii),
        "indent4": lambda key, record: _indented(key, record, 4, encode_basestring),
        "indent0": lambda key, record: json.dumps({key: record}, indent=0)[2:-2],
        "compact": lambda key, record: json.dumps({key: record})[1:-1],
        "jsonl": lambda key, record: json.dumps({"image_path": key, **record}),
    }
    opening, separator, closing = {
        "indent2": ("{\n", ",\n", "\n}"),
        "indent4": ("{\n", ",\n", "\n}"),
        "indent0": ("{\n", ",\n", "\n}"),
        "compact": ("{", ", ", "}"),
        "jsonl": ("", "\n", "\n"),
    }[layout]
    dump = dumps[layout]
    written = 0
    # Raw UTF-8 cannot hold a lone surrogate; `backslashreplace` writes it as JSON's own escape.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(opening)
        for key, record in records:
            text = dump(key, record)
            file.write(separator + text if written else text)
            written += len(text) + len(separator)
            if written >= size_bytes:
                break
        file.write(closing)


def _indented(key: str, record: Record, indent: int, encoded: Callable[[str], str]) -> str:
    """The lines of one record, as `json.dump(..., indent=indent)` writes them into an object.

    Texts go to the C encoder, which `json` does not use with `indent`: a third of the time.
    """
    outer, inner = " " * indent, " " * (2 * indent)
    fields = []
    for name, value in record.items():
        if isinstance(value, str):
            text = encoded(value)
        else:
            text = json.dumps(value, indent=indent, ensure_ascii=encoded is encode_basestring_ascii)
            text = text.replace("\n", f"\n{inner}")
        fields.append(f"{inner}{encoded(name)}: {text}")
    return f"{outer}{encoded(key)}: {{\n" + ",\n".join(fields) + f"\n{outer}}}"


def kinds_of(text: str) -> tuple[Kind, ...]:
    """The kinds that a command line's `--kinds plain,mixed` asks for."""
    kinds = tuple(kind for kind in KINDS if kind in text.split(","))
    unknown = [word for word in text.split(",") if word not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown kind {unknown[0]!r}, expected some of {','.join(KINDS)}"
        )
    return kinds
