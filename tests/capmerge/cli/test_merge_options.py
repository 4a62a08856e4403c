import dataclasses
import itertools
import json
import re
import subprocess

import pytest
from builders.metadata import COMMAND, as_indent_2, run

from capmerge.captions.templates import MergeOptions

FLAGS = {
    "lines": "--line",
    "fit_tokens": "--fit",
    "fit_by": "--fit",
    "fit_family": "--family",
}
"""The options whose names are not those of their fields in `MergeOptions`."""
BOTH = {
    "k": {
        "tags": "long_hair, ^_^",
        "caption": "One {a|b}\n\nTwo",
        "artist": "{w}\n x",
        "rating": ["safe", " ", "{q}"],
        "missing": " ",
    }
}
TAG_FILES = {"drop.txt": "Long Hair\nno_such_tag\n", "replace.txt": "^ ^\t:), {smile|a}\n"}


@pytest.mark.parametrize(
    ("options", "caption", "mark"),
    [
        ([], "long_hair, ^_^\nlong_hair, ^_^\nOne {{a|b}}\nTwo", "ttcc"),
        (["--layout", "lines"], "long_hair, ^_^\nlong_hair, ^_^\nOne {{a|b}}\nTwo", "ttcc"),
        (["--layout", "concat"], "long_hair, ^_^, One {{a|b}}\nlong_hair, ^_^, Two", "bb"),
        (
            ["--layout", "concat-caption-first"],
            "One {{a|b}}, long_hair, ^_^\nTwo, long_hair, ^_^",
            "bb",
        ),
        (
            ["--layout", "inline", "--caption-lines", "join"],
            "long_hair, ^_^\nOne {{a|b}} Two",
            "tc",
        ),
        (
            ["--line", "{tags}=2", "--line", "x {caption}"],
            "long_hair, ^_^\n" * 4 + "x One {{a|b}}\nx Two",
            "ttttcc",
        ),
        (
            ["--line", "{tags}=2", "--line", "x {caption}", "--weights", "field"],
            "long_hair, ^_^\nx One {{a|b}}\nx Two",
            "tcc",
        ),
        (["--caption-lines", "join"], "long_hair, ^_^\nOne {{a|b}} Two", "tc"),
        (["--caption-lines", "first"], "long_hair, ^_^\nOne {{a|b}}", "tc"),
        (
            ["--underscores", "space", "--caption-lines", "first"],
            "long hair, ^_^\nOne {{a|b}}",
            "tc",
        ),
        (["--caption-wildcards", "--caption-lines", "first"], "long_hair, ^_^\nOne {a|b}", "tc"),
        (
            ["--tags-prefix", "tags: ", "--layout", "concat-caption-first"],
            "One {{a|b}}, tags: long_hair, ^_^\nTwo, tags: long_hair, ^_^",
            "bb",
        ),
        (["--drop-tags", "drop.txt", "--caption-lines", "first"], "^_^\nOne {{a|b}}", "tc"),
        (
            ["--replace-tags", "replace.txt", "--caption-lines", "first"],
            "long_hair, :), {{smile|a}}\nOne {{a|b}}",
            "tc",
        ),
        (
            ["--line", "by {artist}: {tags}=3", "--line", "{rating}", "--line", "{missing}=9"],
            "by {{w}} x: long_hair, ^_^\n" * 3 + "safe, {{q}}",
            "bbbc",
        ),
        (
            ["--prefix", "{p} ", "--suffix", " s", "--caption-lines", "first"],
            "{{p}} long_hair, ^_^ s\n{{p}} One {{a|b}} s",
            "tc",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_option_reaches_the_captions_and_verify(tmp_path, options, caption, mark):
    """Every merge option does what the table of options says, and verify proves it."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2(BOTH))
    for name, text in TAG_FILES.items():
        (tmp_path / name).write_text(text)
    options = [str(tmp_path / word) if word in TAG_FILES else word for word in options]
    run("rewrite", path, "-o", out, *options)
    record = json.loads(out.read_bytes())["k"]
    assert record["caption"] == caption
    assert record["capmerge"] == mark
    assert "tags" not in record
    assert ("capmerge_weights" in record) == ("field" in options)
    run("verify", path, out)
    if options:
        (tmp_path / "o.json.capmerge.json").unlink()
        run("verify", path, out, *options)


def help_of(command: str) -> dict[str, str]:
    """The text that `--help` shows for each option of a command, by the option's first name."""
    shown = run(command, "--help").out.decode().partition("Options:\n")[2]
    options = re.split(r"^  (?=-)", shown, flags=re.MULTILINE)[1:]
    return {re.split(r"[ ,]", option)[0]: " ".join(option.split()) for option in options}


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        ("verify", set()),
        ("stats", {"--image-size", "--allow-rewritten"}),
        ("preview", {"--on-error", "--allow-rewritten"}),
    ],
)
def test_each_command_offers_the_merge_options_of_one_list(command, left_out):
    """A command has the merge options of `rewrite` with the same help, except those left out."""
    ruled = {field.name for field in dataclasses.fields(MergeOptions)}
    merging = {
        *(f"--{name.replace('_', '-')}" for name in ruled - FLAGS.keys()),
        *FLAGS.values(),
        "--on-error",
    }
    offered, stated = help_of(command), help_of("rewrite")
    assert merging <= stated.keys()
    assert merging & offered.keys() == merging - left_out
    for name in merging - left_out:
        assert offered[name] == stated[name]


def test_every_merge_option_reaches_the_receipt(tmp_path):
    """All merge options given at once are in the receipt; --layout cannot go with --line."""
    source, out = tmp_path / "m.json", tmp_path / "o.json"
    source.write_bytes(as_indent_2(BOTH))
    (tmp_path / "drop.txt").write_text("a\n\nb_c\n")
    (tmp_path / "replace.txt").write_text("d\te\n")
    options = {
        "lines": ["--line", "{tags}=2", "--line", "{caption}"],
        "weights": ["--weights", "field"],
        "caption_lines": ["--caption-lines", "join"],
        "underscores": ["--underscores", "space"],
        "caption_wildcards": ["--caption-wildcards"],
        "prefix": ["--prefix", "p "],
        "suffix": ["--suffix", " s"],
        "tags_prefix": ["--tags-prefix", "t: "],
        "drop_tags": ["--drop-tags", tmp_path / "drop.txt"],
        "replace_tags": ["--replace-tags", tmp_path / "replace.txt"],
        "image_size": ["--no-image-size"],
        "caption_field": ["--caption-field", "text"],
        "tags_field": ["--tags-field", "words"],
        "lists": ["--lists"],
        "allow_rewritten": ["--allow-rewritten"],
        "fit": ["--fit", "20", "trim", "--family", "sd2"],
        "on_error": ["--on-error", "skip"],
    }
    run("rewrite", source, "-o", out, *itertools.chain.from_iterable(options.values()))
    assert json.loads((tmp_path / "o.json.capmerge.json").read_bytes())["options"] == {
        "layout": None,
        "lines": ["{tags}=2", "{caption}"],
        "weights": "field",
        "caption_lines": "join",
        "underscores": "space",
        "caption_wildcards": True,
        "prefix": "p ",
        "suffix": " s",
        "image_size": False,
        "allow_rewritten": True,
        "fit_tokens": 20,
        "fit_by": "trim",
        "fit_family": "sd2",
        "caption_field": "text",
        "tags_field": "words",
        "lists": True,
        "tags_prefix": "t: ",
        "drop_tags": ["a", "b_c"],
        "replace_tags": ["d\te"],
        "on_error": "skip",
    }


def test_inline_is_one_line(tmp_path):
    """--layout inline writes one wildcard, and no braces round a single alternative."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"a": {"tags": "t", "caption": "one\ntwo"}, "b": {"tags": "t"}}))
    run("rewrite", path, "-o", out, "--layout", "inline")
    assert {key: record["caption"] for key, record in json.loads(out.read_bytes()).items()} == {
        "a": "{t|t|one|two}",
        "b": "t",
    }
    run("verify", path, out)


def test_field_weights_are_exact(tmp_path):
    """--weights field stores the exact smallest whole numbers, without a limit."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"k": {"tags": "t", "caption": "c"}}))
    run(
        "rewrite",
        path,
        "-o",
        out,
        "--weights",
        "field",
        "--line",
        "{tags}=2000",
        "--line",
        "{caption}=2",
    )
    assert json.loads(out.read_bytes())["k"] == {
        "caption": "t\nc",
        "capmerge_weights": [1000, 1],
        "capmerge": "tc",
    }
    run("verify", path, out)


def test_max_record_limits_the_longest_record(tmp_path):
    """A record over --max-record is an error that names the option; a larger limit reads it."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(
        as_indent_2(
            {"a": {"caption": "x"}, "large": {"caption": "x" * 3_000_000}, "z": {"caption": "y"}}
        )
    )
    error = run("rewrite", path, "-o", out, "--max-record", str(1 << 21), fails=1).err
    assert "--max-record" in error
    assert 'record "large"' in error or "byte 41" in error
    run("rewrite", path, "-o", out)
    assert list(json.loads(out.read_bytes())) == ["a", "large", "z"]


@pytest.mark.parametrize("command", ["rewrite", "dry run"])
def test_a_deeply_nested_value_goes_through(tmp_path, command):
    """A value as deep as json.load reads it is kept, or refused with a message."""
    path = tmp_path / "m.json"
    path.write_text('{"k": {"caption": "c", "deep": ' + "[" * 600 + "]" * 600 + "}}")
    options = ["--dry-run", "1"] if command == "dry run" else ["-o", "-"]
    done = subprocess.run([*COMMAND, "rewrite", path, *options], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1)


def test_tags_and_fields_are_told_alike_for_any_jobs(tmp_path):
    """Any number of jobs gives the same bytes and counts; all that was left out is told."""
    path = tmp_path / "m.json"
    records = {
        f"{number}": {
            "tags": ["solo, 1girl, kitty", "Solo", "a_b", "x, {Kitty}"][number % 4],
            "caption": ["One.", "", "Two {a|b}\nlines"][number % 3],
            **({"artist": "w"} if number % 5 else {}),
        }
        for number in range(60_000)
    }
    path.write_bytes(as_indent_2(records))
    (tmp_path / "drop.txt").write_text("SOLO\nno_such\n")
    (tmp_path / "replace.txt").write_text("kitty\tcat\nnothing\tx\n")
    tags = ["--drop-tags", tmp_path / "drop.txt", "--replace-tags", tmp_path / "replace.txt"]
    options = [*tags, "--line", "{artist}: {tags}", "--line", "{caption}=2"]
    receipts, shown = [], ""
    for jobs in (1, 2):
        out = tmp_path / f"o{jobs}.json"
        shown = run("rewrite", path, "-o", out, "-j", jobs, *options).out.decode()
        receipts.append(json.loads(out.with_name(f"{out.name}.capmerge.json").read_bytes()))
    assert (tmp_path / "o1.json").read_bytes() == (tmp_path / "o2.json").read_bytes()
    assert receipts[0] == receipts[1]
    counts = receipts[0]["counts"]
    assert counts["dropped_tags"] == {"SOLO": 30_000}
    assert counts["replaced_tags"] == {"kitty": 15_000}
    assert counts["all_tags_dropped"] == 15_000
    assert counts["lacking_fields"] == {"artist": 12_000}
    for told in (
        '"artist" were left out for 12,000 records',
        '--drop-tags dropped 30,000 tags: "SOLO" (30,000).',
        '--drop-tags had nothing to drop for 1 of its 2 tags: "no_such".',
        '--replace-tags replaced 15,000 tags: "kitty" (15,000).',
        '--replace-tags had nothing to replace for 1 of its 2 tags: "nothing".',
        "--drop-tags left no tags in 15,000 records.",
    ):
        assert f"{told}\n" in shown or told in shown
    counted = run("stats", path, *options, "--force")
    assert '"SOLO" (30,000)' in counted.err
    assert '"artist" were left out for 12,000 records' in counted.err
    for file in ("drop.txt", "replace.txt"):
        (tmp_path / file).unlink()
    run("verify", path, tmp_path / "o1.json")


def test_a_preview_shows_what_became_of_tags_and_templates(tmp_path):
    """The preview names dropped and replaced tags, and the fields that a record lacks."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2({"k": {"tags": "Solo, kitty, a"}, "l": {"tags": "a"}}))
    (tmp_path / "drop.txt").write_text("solo")
    (tmp_path / "replace.txt").write_text("kitty\tcat")
    tags = ["--drop-tags", tmp_path / "drop.txt", "--replace-tags", tmp_path / "replace.txt"]
    shown = run("preview", path, *tags, "--line", "{tags}", "--line", "{artist}").out.decode()
    assert "  dropped by --drop-tags: solo\n" in shown
    assert "  replaced by --replace-tags: kitty\n" in shown
    assert shown.count("  templates left out that name a missing field: artist\n") == 2
    assert '"caption": "cat, a"' in shown
    assert shown.count("dropped by") == 1
