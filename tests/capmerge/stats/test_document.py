import json
import re
import subprocess
import sys

import pytest
from builders.metadata import as_indent_2, make_records
from builders.paths import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers

from capmerge.captions.templates import MergeOptions
from capmerge.commands.stats import MeasureOptions, measure
from capmerge.files.source import open_source
from capmerge.stats.collector import Tokenizers
from capmerge.stats.document import percent

PAGE = (ROOT / "docs" / "stats.md").read_text(encoding="utf-8")
KINDS = {
    "text": [str],
    "whole": [int],
    "mean": [int, float],
    "share": [float],
    "object": [dict],
    "list": [list],
    "null": [type(None)],
    "lengths": [dict],
    "limit": [dict],
}


def rows_of(title):
    """Return the rows of the table after `title` in the page, as types by key."""
    table = PAGE.split(title, 1)[1].split("|---|---|---|", 1)[1].split("\n\n", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, re.MULTILINE))


def documented():
    """Return every path that the page names with its type, shared tables at each place of use."""
    named = {}
    parts = {"lengths": rows_of("*lengths* is an object"), "limit": rows_of("*limit* is an object")}
    for path, kind in rows_of("# `<stem>.stats.json`").items():
        named[path] = kind
        named |= {f"{path}.{name}": of_part for name, of_part in parts.get(kind, {}).items()}
    return named


def paths_of(value, at=""):
    """Yield every path of a document with its value; the items of a list share one path."""
    if at:
        yield at, value
    if isinstance(value, dict) and at not in ("options", "literals"):
        for name, inner in value.items():
            yield from paths_of(inner, f"{at}.{name}" if at else name)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):
                yield from paths_of(inner, f"{at}[]")


def document_of(path, records, **options):
    """Return the document of some records, as it is read back from its file."""
    path.write_bytes(as_indent_2(records))
    with open_source(str(path)) as source:
        return json.loads(json.dumps(measure(source, MeasureOptions(**options))))


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Return documents that together hold every key: empty, full, with a T5, and past bounds."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path, records = tmp_path / "m.json", make_records(60)
    found = [
        document_of(path, {}),
        document_of(
            path, records, merge=MergeOptions(lines=("{tags}", "{caption}", "{tags}, {caption}"))
        ),
        document_of(
            path,
            {"a": {"tags": "cat, " * 900}, "b": {"caption": "a cat, " * 9}},
            tokenizers=Tokenizers("sd3", str(tmp_path / "tokenizer.json")),
        ),
        document_of(
            path,
            {"a": {"caption": "a {b|c d}"}},
            merge=MergeOptions(caption_wildcards=True, lines=("{caption}",), fit_tokens=9),
        ),
    ]
    monkeypatch.setattr("capmerge.stats.counts.BoundedCounter.counts", None)
    return [*found, document_of(path, records)]


def test_every_key_is_named_with_its_type(documents):
    """The page names exactly the keys of real documents, each with the type of its values."""
    named = documented()
    containers = {
        path[: match.start()] for path in named for match in re.finditer(r"\[\]|\.", path)
    }
    containers |= {path[: match.end()] for path in named for match in re.finditer(r"\[\]", path)}
    seen = set()
    for document in documents:
        for path, value in paths_of(document):
            assert path in named or path in containers, path
            if path not in named:
                continue
            seen.add(path)
            assert type(value) in [
                kind for name in named[path].split(" or ") for kind in KINDS[name]
            ], (path, value)
            if named[path] == "share":
                assert 0 <= value <= 1, path
    assert seen == named.keys()


def test_the_same_keys_are_always_there(documents):
    """A figure without a value is null, so that the keys do not depend on the file."""
    for document in documents:
        assert document.keys() == documents[0].keys()
        for name in ("records", "lengths", "styles", "advice", "wildcards", "duplicates"):
            assert document[name].keys() == documents[0][name].keys()
        assert document["styles"]["both"].keys() - {"share"} == document["lengths"]["lines"].keys()


def test_the_example_of_the_page_runs(tmp_path):
    """The program shown on the page reads a document and prints a share."""
    document = document_of(
        tmp_path / "m.json", {"a": {"caption": "cat " * 200}, "b": {"caption": "cat"}}
    )
    (tmp_path / "meta_lat.stats.json").write_text(json.dumps(document))
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "50.00% of what is drawn is longer than 100 tokens\n"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100.0 %"),
        (1e-9, "under 0.01 %"),
        (0.0123, "1.23 %"),
        (0.5, "50.0 %"),
        (0.99999, "over 99.9 %"),
        (0.0999999, "10.00 %"),
    ],
)
def test_percent_is_never_rounded_to_nothing_or_everything(share, text):
    """A share has few digits; a small one does not read as 0 %, nor a large one as 100 %."""
    assert percent(share) == text
