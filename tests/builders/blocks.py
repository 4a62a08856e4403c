"""Sources and layouts for the tests of blocks and offsets."""

import json
import random

from capmerge.files.source import BytesSource
from capmerge.metadata import blocks, cuts, walk


class Watched(BytesSource):
    """Bytes that remember how far they were read, and how much of them at once."""

    def __init__(self, data):
        super().__init__("m.json", data, 0)
        self.read_to = 0
        self.largest = 0

    def window(self, start, size):
        """The bytes that are asked for."""
        window = super().window(start, size)
        self.read_to = max(self.read_to, start + len(window))
        self.largest = max(self.largest, len(window))
        return window

    def release(self, before):
        """Do nothing, because the bytes stay in memory."""


def small(monkeypatch, block_bytes, piece_bytes=None, looks=(16, 64)):
    """Set the sizes so that a block has only a few records."""
    piece_bytes = piece_bytes or max(16, block_bytes // 4)
    set_sizes(monkeypatch, block_bytes=block_bytes, piece_bytes=piece_bytes, looks=looks)


def set_sizes(monkeypatch, *, block_bytes=None, piece_bytes=None, looks=None):
    """Set the size of a block, of a piece, and of what is read to guess a cut, where given.

    Forked workers have the same sizes.
    """
    if block_bytes is not None:
        monkeypatch.setattr(cuts, "BLOCK_BYTES", block_bytes)
    if piece_bytes is not None:
        for module in (blocks, cuts, walk):
            monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    if looks is not None:
        monkeypatch.setattr(cuts, "_LOOK_AHEAD_BYTES", looks)


RECORDS = {
    f"danbooru/{i}": {
        "caption": ['"a", b: {x}', 'ends like a record },\n  "k": {', "é 😀 \\ \u2028", 'x},"y":{'][
            i % 4
        ]
        * (1 + i % 3),
        "tags": ["1girl, :},", "o_o, {", '},\n"z', "\\"][i % 4],
        "train_resolution": [64 * (i % 5), 64],
        **({"n": {"x": {}, "y": {"z": [["},", ":{"], {"a": 1}, {"b": {}}]}}} if i % 7 == 3 else {}),
        **({"},": {"},": {"": "},"}}} if i % 11 == 5 else {}),
    }
    for i in range(60)
}


INDENTED = json.dumps(RECORDS, indent=2).encode()


def mixed():
    """Records that are each laid out in another way, like a file that several programs wrote to."""
    rng = random.Random(5)
    members = [
        json.dumps(
            {key: record}, indent=rng.choice([None, None, 0, 2, 4]), ensure_ascii=rng.random() < 0.5
        )[1:-1]
        .strip()
        .encode()
        for key, record in RECORDS.items()
    ]
    text = members[0]
    for member in members[1:]:
        text += rng.choice([b",", b", ", b",\n  ", b"\n,\n", b" ,\r\n"]) + member
    return b"{\n  " + text + b"\n}"


LAYOUTS = {
    "indent 2": INDENTED,
    "indent 0": json.dumps(RECORDS, indent=0).encode(),
    "indent 1": json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(),
    "indent 4": json.dumps(RECORDS, indent=4, ensure_ascii=False).encode(),
    "indent tab": json.dumps(RECORDS, indent="\t").encode(),
    "one line": json.dumps(RECORDS).encode(),
    "compact": json.dumps(RECORDS, separators=(",", ":"), ensure_ascii=False).encode(),
    "a record a line": b"{\n"
    + b",\n".join(f"{json.dumps(k)}: {json.dumps(v)}".encode() for k, v in RECORDS.items())
    + b"\n}",
    "CRLF": INDENTED.replace(b"\n", b"\r\n"),
    "CR": INDENTED.replace(b"\n", b"\r"),
    "comma first": b"{"
    + b"\n, ".join(f"{json.dumps(k)} :\t{json.dumps(v)}".encode() for k, v in RECORDS.items())
    + b"}",
    "odd spaces": json.dumps(RECORDS, separators=(" \t,\r\n\n ", "\n:\r "))
    .encode()
    .replace(b"{", b"{ \n", 1),
    "BOM": b"\xef\xbb\xbf" + INDENTED + b"\n",
    "spaces around": b"\n \t\r\n" + INDENTED + b" \n\n\t ",
}
LAYOUTS["mixed"] = mixed()
