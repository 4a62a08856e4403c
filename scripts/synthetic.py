"""Generated metadata of any size for the benchmarks: the layout, lengths and word frequencies of a real `meta_lat.json`.

A record is about 1.17 kB, as in a file of 12 million records and 14 GB. Same arguments, same bytes.
"""

import json
import random
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

_SYLLABLES = (
    *(
        "ka",
        "ri",
        "no",
        "ta",
        "shi",
        "mo",
        "el",
        "an",
        "dor",
        "vel",
        "is",
        "um",
        "tra",
        "pe",
        "lin",
        "gor",
        "sa",
        "be",
    ),
    *("ton", "ur", "mi", "cha", "fle", "wo", "nd", "re", "il", "os"),
)
_RESOLUTIONS = [[832, 1216], [1216, 832], [1024, 1024], [896, 1152], [1152, 896], [768, 1344]]


class Corpus:
    """Words and tags with Zipf's frequencies, and records made of them."""

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

    def records(self, start: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and records, without end."""
        rng = self._random
        number = start
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


def write_metadata(
    path: Path, size_bytes: int, layout: str = "indent2", seed: int = 0, records: int | None = None
) -> None:
    """Write about `size_bytes`, at most so many `records`, in `layout`: indent2, indent4 (raw UTF-8), compact, or jsonl."""
    dump = {
        "indent2": lambda pair: json.dumps(dict([pair]), indent=2)[2:-2],
        "indent4": lambda pair: json.dumps(dict([pair]), indent=4, ensure_ascii=False)[2:-2],
        "compact": lambda pair: json.dumps(dict([pair]))[1:-1],
        "jsonl": lambda pair: json.dumps({"image_path": pair[0], **pair[1]}),
    }[layout]
    opening, separator, closing = {
        "indent2": ("{\n", ",\n", "\n}"),
        "indent4": ("{\n", ",\n", "\n}"),
        "compact": ("{", ", ", "}"),
        "jsonl": ("", "\n", "\n"),
    }[layout]
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(opening)
        for pair in islice(Corpus(seed).records(), records):
            text = dump(pair)
            file.write(separator + text if written else text)
            written += len(text) + len(separator)
            if written >= size_bytes:
                break
        file.write(closing)


def write_huge_record(
    path: Path, size_bytes: int, record_bytes: int = 300_000, every: int = 10_000
) -> None:
    """As `write_metadata`, indent=2, with one record of `record_bytes` in each `every`."""
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write("{\n")
        for number, (key, record) in enumerate(Corpus().records()):
            if number % every == every // 2:
                record["caption"] = (record["caption"] + " ") * (
                    record_bytes // len(record["caption"])
                )
            text = json.dumps({key: record}, indent=2)[2:-2]
            file.write(",\n" + text if written else text)
            written += len(text) + 2
            if written >= size_bytes:
                break
        file.write("\n}")
