import json

from builders.metadata import run

import capmerge


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
