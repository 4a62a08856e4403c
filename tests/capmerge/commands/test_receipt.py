import json
from dataclasses import fields

import pytest
from builders.metadata import run

import capmerge
from capmerge.captions.templates import MergeOptions


def test_an_unreadable_receipt_is_an_error(source):
    """`verify` says so when OUT.capmerge.json is no receipt."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    receipt = source.with_name("out.json.capmerge.json")
    for text in (
        b"",
        b"[]",
        b"{}",
        b'{"options": 3}',
        b'{"options": {"lines": 5, "on_error": "stop"}}',
        b'{"options": {"lines": [], "on_error": "stop", "fit_family": "sd9"}}',
        b'{"options": {"lines": [], "on_error": "stop", "fit_by": "cut"}}',
        b'{"options": {"lines": [], "on_error": "stop", "layout": "diagonal"}}',
        b"\xff",
    ):
        receipt.write_bytes(text)
        assert "receipt" in run("verify", source, out, fails=1).err


def test_the_receipt_tells_how_the_output_was_made(source):
    """OUT.capmerge.json holds version, options, templates, counts and the source's fingerprint."""
    out = source.with_name("out.json")
    run(
        "rewrite",
        source,
        "-o",
        out,
        "--line",
        "{tags}, {caption}=4",
        "--line",
        "{caption}",
        "--underscores",
        "space",
        "--on-error",
        "skip",
    )
    receipt = json.loads(source.with_name("out.json.capmerge.json").read_bytes())
    assert receipt["version"] == capmerge.__version__
    assert receipt["options"]["lines"] == ["{tags}, {caption}=4", "{caption}"]
    assert receipt["options"]["underscores"] == "space"
    assert receipt["options"]["on_error"] == "skip"
    assert receipt["templates"][0] == {
        "fields": ["tags", "caption"],
        "literals": ["", ", ", ""],
        "weight": 4,
    }
    assert receipt["counts"]["records"] == receipt["counts"]["rewritten"] == 3
    assert receipt["source"]["name"] == str(source)
    assert receipt["source"]["bytes"] == source.stat().st_size
    assert len(bytes.fromhex(receipt["source"]["blake2b"])) == 16


def test_the_fingerprint_follows_the_content(source):
    """Another source has another fingerprint; the same one has the same."""
    out = source.with_name("out.json")

    def fingerprint() -> str:
        run("rewrite", source, "-o", out, "--force")
        return json.loads(source.with_name("out.json.capmerge.json").read_bytes())["source"][
            "blake2b"
        ]

    first = fingerprint()
    assert fingerprint() == first
    source.write_bytes(source.read_bytes().replace(b"no_humans", b"no_human_"))
    assert fingerprint() != first


def change_receipt(source, **changed):
    """The error of `verify` after `changed` is written into the receipt of a rewritten `source`."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out, "--force")
    path = source.with_name("out.json.capmerge.json")
    content = json.loads(path.read_bytes())
    options = content["options"] | changed.pop("options")
    path.write_text(json.dumps(content | changed | {"options": options}))
    return run("verify", source, out, fails=1).err


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("caption_lines", "dance", '"each", "join" or "first"'),
        ("layout", 5, '"lines", "concat", "concat-caption-first", "inline" or null'),
        ("on_error", "ignore", '"stop" or "skip"'),
        ("image_size", "no", "true or false or null"),
        ("allow_rewritten", 1, "true or false"),
        ("fit_tokens", True, "a whole number or null"),
        ("fit_tokens", 75.0, "a whole number or null"),
        ("prefix", None, "a string"),
        ("lines", "{tags}", "a list of strings"),
        ("lines", ["{tags}", 4], "a list of strings"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_an_error(source, name, value, expected):
    """`verify` names the option of a receipt whose value is wrong, its value and what it can be."""
    error = change_receipt(source, options={name: value})
    assert f'(the option "{name}" is {json.dumps(value)}, expected {expected}).' in error
    assert "Give the options of the rewrite instead." in error


@pytest.mark.parametrize("name", [option.name for option in fields(MergeOptions)])
def test_every_option_of_a_receipt_is_checked(source, name):
    """No merge option takes an object, whatever else its annotation allows."""
    error = change_receipt(source, options={name: {}})
    assert f'the option "{name}" is {{}}, expected ' in error


def test_an_option_of_a_later_version_names_that_version(source):
    """`verify` refuses an unknown option in words and names the version that wrote the receipt."""
    error = change_receipt(source, options={"glow": True}, version="9.1.0")
    assert 'found an option "glow", which this version does not have' in error
    assert error.strip().endswith("use the version that wrote the receipt: capmerge 9.1.0.")
    assert "__init__" not in error


def test_options_of_a_receipt_that_cannot_go_together_are_an_error(source):
    """`verify` says which file holds options that no rewrite could have had."""
    error = change_receipt(source, options={"lines": ["{tags}"], "layout": "concat"})
    assert "out.json.capmerge.json: the file is no receipt" in error
    assert "--line and --layout both say" in error
