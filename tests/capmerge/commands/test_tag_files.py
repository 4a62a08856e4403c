import pytest

from capmerge.commands.tag_files import read_drop_tags, read_replace_tags
from capmerge.errors import UsageError


def test_files_are_read_line_by_line(tmp_path):
    """Line breaks of any system, a byte order mark and blank lines are all taken."""
    path = tmp_path / "tags.txt"
    path.write_bytes("\ufefflong hair\r\n\r\n#compass\n \n日本 \u2028x".encode())
    assert read_drop_tags(path) == ("long hair", "#compass", "日本 \u2028x")
    path.write_bytes(b"a\tb\r\n c \t d, e \r")
    assert read_replace_tags(path) == ("a\tb", " c \t d, e ")


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "found no line with a tag"),
        (b"\n \n", "found no line with a tag"),
        (b"a\n\nb, c\n", "line 3: found a comma"),
        (b"a\tb", "line 1: found a tab"),
        (b"a\n\xff", "byte 2: this is not UTF-8"),
        ("a".encode("utf-16"), "not UTF-8"),
        (b"x" * ((1 << 24) + 1), "longer than 16,777,216 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, phrase):
    """A message names the file, and the line or byte where it is wrong."""
    path = tmp_path / "tags.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_drop_tags(path)
    assert str(error.value).startswith(str(path))
    assert phrase in str(error.value)


def test_the_line_of_a_wrong_replacement_is_named(tmp_path):
    """A line without a tab is told with its number."""
    path = tmp_path / "tags.txt"
    path.write_text("a\tb\nc d\n")
    with pytest.raises(UsageError, match="line 2: found 0 tabs"):
        read_replace_tags(path)
