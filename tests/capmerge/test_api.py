"""The Python interface, as a program uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders.paths import EXAMPLE_METADATA

import capmerge
from capmerge.errors import DataError, UsageError


def test_importing_the_package_loads_no_sub_package():
    """`import capmerge` loads nothing of the package and nothing heavy, and names its interface."""
    code = (
        "import sys, capmerge\n"
        "print(sorted(name for name in sys.modules if name.startswith('capmerge.')))\n"
        "print('orjson' in sys.modules, 'numpy' in sys.modules, 'typer' in sys.modules)\n"
        "print(set(capmerge.__all__) <= set(dir(capmerge)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False False False", "True"]


def test_every_public_name_is_there_and_documented():
    """Each name of the interface can be imported, has a docstring, and functions are typed."""
    for name in capmerge.__all__:
        found = getattr(capmerge, name)
        assert found.__doc__, name
        assert "return" in getattr(found, "__annotations__", {}) or isinstance(found, type), name
    with pytest.raises(AttributeError, match="no attribute 'rewrite_flie'"):
        capmerge.rewrite_flie  # noqa: B018
    assert (Path(capmerge.__file__).parent / "py.typed").exists()


def test_a_type_checker_sees_the_types(tmp_path):
    """A program that uses the interface wrongly is found by mypy, and a right one passes."""
    right = "import capmerge\nn: list[int] = capmerge.count_tokens(['a'], family='sdxl')\n"
    wrong = "import capmerge\ncapmerge.rewrite_file('a.json', 'b.json', on_error='ignore')\n"
    for text, fails in ((right, 0), (wrong, 1)):
        program = tmp_path / "program.py"
        program.write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == fails, done.stdout
    assert 'Argument "on_error"' in done.stdout


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_is_rewritten_verified_and_read(tmp_path, jobs):
    """The functions do together what the commands do."""
    target = tmp_path / "out.jsonl"
    merge = capmerge.MergeOptions(layout="concat")
    outcome = capmerge.rewrite_file(EXAMPLE_METADATA, target, merge, jobs=jobs, index=True)
    assert outcome.tally.records == 213
    assert capmerge.verify_files(EXAMPLE_METADATA, target).records == 213
    assert capmerge.verify_files(EXAMPLE_METADATA, target, jobs=2).records == 213
    assert Path(f"{target}.index").exists()
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    read = dict(capmerge.iter_records(target))
    assert list(read) == [line["image_path"] for line in lines]
    assert all("capmerge" in record for record in read.values())


def test_what_goes_wrong_is_an_error_of_the_package(tmp_path):
    """Mistakes raise errors that say what to do, and leave what is there."""
    target = tmp_path / "out.json"
    target.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        capmerge.rewrite_file(EXAMPLE_METADATA, str(target))
    assert target.read_text() == "mine"
    with pytest.raises(UsageError, match="no such file"):
        next(capmerge.iter_records(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": {"tags": "x"},\n "b": nonsense}')
    records = capmerge.iter_records(broken)
    with pytest.raises(DataError, match=r"broken\.json, byte"):
        list(records)
    stray = tmp_path / "stray.jsonl"
    stray.write_text('{"image_path": "a", "tags": "x"}\n7\n')
    with pytest.raises(DataError, match=r"stray\.jsonl, byte 33"):
        list(capmerge.iter_records(stray))


def test_records_are_those_of_json(tmp_path):
    """Values come as Python's json reads them, whatever they are."""
    records = {"a": {"tags": "x", "n": 10**30, "f": float("inf")}, "b": None, "c": {"t": "\ud83d"}}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(records, indent=2))
    assert dict(capmerge.iter_records(path)) == records


def test_tokens_are_counted_by_family():
    """The counts are CLIP's own; SD 2 takes each "!" for a token of its own."""
    assert capmerge.count_tokens(["a red hat", "", "!!!"]) == [3, 0, 1]
    assert capmerge.count_tokens(iter(["!!!"]), family="sd2") == [3]
    with pytest.raises(TypeError, match="single string"):
        capmerge.count_tokens("a red hat")


def test_the_line_is_the_one_that_training_draws():
    """A draw depends on its arguments alone, and follows the weights."""
    drawn = {
        capmerge.draw_line("x\ny", f"{n}", seed=1, epoch=0, weights=[0, 3]).text for n in range(20)
    }
    assert drawn == {"y"}
    assert capmerge.draw_line("x\ny", "k", seed=1, epoch=5) == capmerge.draw_line(
        "x\ny", "k", seed=1, epoch=5
    )


def test_rejects_are_expected_where_the_rewrite_left_them(tmp_path):
    """`on_error` goes with `merge`: without "skip", a rejected record is an error."""
    source, target = tmp_path / "meta.json", tmp_path / "out.json"
    source.write_text(json.dumps({"a": {"tags": "x"}, "b": {"tags": ["y"]}}, indent=2))
    merge = capmerge.MergeOptions()
    capmerge.rewrite_file(source, target, merge, on_error="skip")
    for asked in ({}, {"merge": merge, "on_error": "skip"}):
        assert capmerge.verify_files(source, target, **asked).rejected == 1
    with pytest.raises(DataError):
        capmerge.verify_files(source, target, merge)
