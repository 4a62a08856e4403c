"""A record is found by the bytes of its key, whatever else holds these bytes."""

import json
import random

import pytest

from capmerge.files.source import FileSource
from capmerge.metadata import key_search
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.key_search import find_record, read_record
from capmerge.metadata.pieces import iter_pairs

KEYS = ("a/1", "b", 'q"', "\\", "\u00e9\U0001f600", "a\t", ": {", ", ", "\ud83d")


def spelled(text, rng):
    """A JSON string of the text, in which some letters are spelled as escapes."""
    if rng.random() < 0.5:
        return json.dumps(text, ensure_ascii=rng.random() < 0.5 or "\ud83d" in text)
    units = text.encode("utf-16-be", "surrogatepass").hex(" ", 2).split()
    letters = [f"\\u{unit.upper() if rng.random() < 0.5 else unit}" for unit in units]
    if len(letters) == len(text):
        letters = [
            letter if rng.random() < 0.5 or c in '"\\\t\ud83d' else "\\/" if c == "/" else c
            for c, letter in zip(text, letters, strict=True)
        ]
    return f'"{"".join(letters)}"'


def record_of(number, rng):
    """A record that holds all keys as fields and as texts, and texts that look like records."""
    nested = ", ".join(f'{spelled(key, rng)}: {{"x": {number}}}' for key in KEYS)
    texts = json.dumps([f'{{"{key}": {{' for key in KEYS[:2]] + list(KEYS[:2]))
    return f'{{"n": {number}, "in": {{{nested}}}, "texts": {texts}, "a": "}},", ": {{": 1}}'


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_the_first_record_of_a_key_is_found(tmp_path, monkeypatch, seed, kind):
    """It is the one that decoding the file finds first, in any spelling and any place."""
    monkeypatch.setattr(key_search, "BLOCK_BYTES", 512)
    rng = random.Random(seed)
    path = tmp_path / f"m.{kind}"
    keys = [rng.choice((*KEYS, f"other {n}", f"another {n}")) for n in range(12)]
    if kind == "json":
        between = rng.choice((", ", ",", ",\n  ", " ,\n"))
        members = (f"{spelled(key, rng)}: {record_of(n, rng)}" for n, key in enumerate(keys))
        text = "{" + between.join(members) + "}"
    else:
        text = "\n".join(
            f'{{"image_path": {spelled(key, rng)}, {record_of(n, rng)[1:]}'
            for n, key in enumerate(keys)
        )
    path.write_text(text, encoding="utf-8")
    with FileSource(path) as source:
        layout = read_layout(source)
        pairs = [pair for _, _, pair in iter_pairs(source, layout)]
        assert [key for key, _ in pairs] == keys
        for key in (*KEYS, "n", "in", "missing", "x"):
            start = find_record(source, layout, key)
            first = next((pair for pair in pairs if pair[0] == key), None)
            found = None if start is None else read_record(source, layout, start)
            assert found == first


def test_a_key_at_the_end_is_found_without_decoding_the_file(tmp_path, monkeypatch):
    """Only the record is decoded, and of the rest no more is counted than what is behind it."""
    path = tmp_path / "m.json"
    records = {f"k{n}": {"in": {"last": {"x": n}}, "text": '"last": {'} for n in range(3000)}
    path.write_text(json.dumps({**records, "last": {"caption": "a"}}))
    fed = []
    real = key_search.BorderCounter.feed
    monkeypatch.setattr(
        key_search.BorderCounter,
        "feed",
        lambda *given: (fed.append(len(given[1])), real(*given))[1],
    )
    with FileSource(path) as source:
        layout = read_layout(source)
        start = find_record(source, layout, "last")
        assert read_record(source, layout, start) == ("last", {"caption": "a"})
        # Every hit before it was in a record: all of them together are counted once from each end.
        assert sum(fed) <= 2.1 * path.stat().st_size
        fed.clear()
        assert find_record(source, layout, "k2999") is not None
        assert sum(fed) < 1000


@pytest.mark.parametrize("key", ["k/99999", "k\u00e9"])
def test_a_search_tells_its_progress(tmp_path, key):
    """All passes over the file together are told as one, whose offsets never go back."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps({f"k/{n}": {"tags": "t" * 40} for n in range(100_000)}))
    told = []
    with FileSource(path) as source:
        find_record(source, read_layout(source), key, told.append)
    assert told == sorted(told)
    assert len(told) > 5
    assert path.stat().st_size * 0.9 < told[-1] <= path.stat().st_size
