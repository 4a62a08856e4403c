import pytest
from builders.blocks import LAYOUTS, RECORDS, Watched, set_sizes

from capmerge.metadata.blocks import read_layout
from capmerge.metadata.walk import walk


def test_walked_records_have_true_offsets():
    """A walk gives the byte offsets where each record starts and ends."""
    data = '\ufeff{ "é": {"a": "😀"} ,\r\n"b\\u0041":[1, {}],"c":{} } \n'.encode()
    source = Watched(data)
    found = list(walk(source, read_layout(source), read_layout(source).first))
    assert [record.key for record in found] == ["é", "bA", "c"]
    values = [data[record.start : record.value_end].decode() for record in found]
    assert values == ['"é": {"a": "😀"}', '"b\\u0041":[1, {}]', '"c":{}']
    assert [record.last for record in found] == [False, False, True]
    assert [record.next_start for record in found] == [found[1].start, found[2].start, len(data)]
    assert found[-1].end == len(data)


@pytest.mark.parametrize("piece_bytes", [1, 7, 64])
def test_a_walk_in_small_windows_is_the_same(piece_bytes, monkeypatch):
    """Windows that cut records, numbers, escapes and characters anywhere give the same records."""
    for data in (LAYOUTS["mixed"], LAYOUTS["odd spaces"], LAYOUTS["compact"]):
        source = Watched(data)
        layout = read_layout(source)
        set_sizes(monkeypatch, piece_bytes=1 << 20)
        expected = list(walk(source, layout, layout.first))
        set_sizes(monkeypatch, piece_bytes=piece_bytes)
        assert list(walk(source, layout, layout.first)) == expected
        assert [record.key for record in expected] == list(RECORDS)


@pytest.mark.parametrize("value", ["1.5e+16", "-1E-300", "1.25"])
def test_a_window_may_end_inside_a_bare_number(value, monkeypatch):
    """A record that is a number is read whole, wherever a window ends."""
    data = f'{{"a": {value}, "b": {value}}}'.encode()
    for size in range(1, len(data)):
        set_sizes(monkeypatch, piece_bytes=size)
        source = Watched(data)
        assert [record.key for record in walk(source, read_layout(source), 1)] == ["a", "b"]


@pytest.mark.parametrize("size", range(1, 40))
def test_a_window_may_end_anywhere(size, monkeypatch):
    """A window may end inside an escape, a number, a literal or a character."""
    set_sizes(monkeypatch, piece_bytes=size)
    value = '[-1.5e+10, NaN, -Infinity, true, null, "\\u00e9\\\\ 😀"]'
    data = f'{{"k\\ud83d\\ude00é": {{"a": {value}}}, "b": {{"\\n": 12}}}}'.encode()
    source = Watched(data)
    assert [record.key for record in walk(source, read_layout(source), 1)] == ["k😀é", "b"]
