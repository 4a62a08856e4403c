"""Files read as one: the bytes are those of `cat`, at any offset, and a change is an error."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.errors import DataError
from capmerge.files.chained import ChainedSource, read_link

MARK = b"\xef\xbb\xbf"
CONTENTS = st.lists(
    st.sampled_from([b"", b"\n", MARK, MARK + b"a\n", b"ab", b"abc\ndef", b"abc\n", b"x" * 40]),
    max_size=6,
)


def chain_of(folder, contents):
    """Return a chain of files with these contents."""
    paths = [folder / f"{number:04d}.jsonl" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return ChainedSource(folder, [read_link(path) for path in paths])


def joined(contents):
    """Return what the chain should hold, written down from its description."""
    texts = [content.removeprefix(MARK) for content in contents]
    text = b""
    for number, part in enumerate(texts):
        is_last = number == len(texts) - 1
        text += part
        if part and not part.endswith(b"\n") and not is_last:
            text += b"\n"
    return text


@given(contents=CONTENTS, start=st.integers(0, 260), size=st.integers(0, 260))
def test_any_window_is_that_of_the_joined_bytes(tmp_path_factory, contents, start, size):
    """Byte order marks are left out, and the last lines of files end where another follows."""
    with chain_of(tmp_path_factory.mktemp("chain"), contents) as chain:
        expected = joined(contents)
        assert chain.total_bytes == len(expected)
        assert chain.window(start, size) == expected[start : start + size]
        again = pickle.loads(pickle.dumps(chain))
        assert again.window(0, 10**6) == chain.reopener()().window(0, 10**6) == expected


@given(contents=CONTENTS)
def test_each_offset_leads_to_its_byte_in_a_file(tmp_path_factory, contents):
    """`place_of` names the file and the offset in it; an end that was added is at its end."""
    folder = tmp_path_factory.mktemp("chain")
    with chain_of(folder, contents) as chain:
        for offset, byte in enumerate(joined(contents)):
            name, place = chain.place_of(offset)
            data = (folder / name).read_bytes()
            assert (data[place] if place < len(data) else ord("\n")) == byte


def test_many_files_and_many_threads(tmp_path):
    """More files than stay open at a time are read by threads at once."""
    contents = [f"line {number}\n".encode() * 7 for number in range(300)]
    expected, rng = joined(contents), random.Random(5)
    starts = [rng.randrange(len(expected)) for _ in range(4000)]
    with chain_of(tmp_path, contents) as chain, ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda start: chain.window(start, 50), starts)
        assert list(found) == [expected[start : start + 50] for start in starts]


@pytest.mark.parametrize("change", ["longer", "shorter", "replaced", "removed"])
def test_a_change_of_a_file_is_named(tmp_path, change):
    """A file that is not the one that was opened ends the work with its name."""
    chain = chain_of(tmp_path, [b"first\n", b"second\n", b"third\n"])
    path = tmp_path / "0001.jsonl"
    chain.check_unchanged()
    if change == "removed":
        path.unlink()
    elif change == "replaced":
        (tmp_path / "other").write_bytes(b"another")
        (tmp_path / "other").replace(path)
    else:
        path.write_bytes(b"sec" if change == "shorter" else b"second\nand more\n")
    with pytest.raises(DataError, match=r"0001\.jsonl: the file changed while it was read\. Run"):
        chain.check_unchanged()
    if change in {"shorter", "removed"}:
        with pytest.raises(DataError, match=r"0001\.jsonl: "):
            chain.window(0, 100)


def test_an_error_at_an_offset_names_the_file(tmp_path):
    """What is wrong in a file is told with its own offset."""
    chain = chain_of(tmp_path, [b"one\n", MARK + b"two\n"])
    with pytest.raises(DataError) as error, chain:
        raise DataError(chain.name, 5, "key", "found that.", "Do this.")
    assert str(error.value) == f'{tmp_path}/0001.jsonl, byte 4, record "key": found that. Do this.'
    assert chain.is_file(tmp_path / "0000.jsonl")
    assert not chain.is_file(tmp_path / "none")
