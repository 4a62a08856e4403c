"""Many keys as one string of bytes, so that they can be kept on disk and read back in order."""

from collections.abc import Iterable, Iterator

END = b"\xff"
"""The byte behind every key, which is no byte of UTF-8."""


def key_bytes(key: str) -> bytes:
    """The bytes of a key, by which keys are compared; a lone surrogate has three of them."""
    return key.encode("utf-8", "surrogatepass")


def key_text(key: bytes) -> str:
    """The key that `key_bytes` made these bytes of."""
    return key.decode("utf-8", "surrogatepass")


def joined_keys(keys: list[str]) -> bytes:
    """The bytes of all keys, each with `END` behind it."""
    text = "\0".join((*keys, ""))
    if text.count("\0") == len(keys):
        return key_bytes(text).replace(b"\0", END)
    return b"".join(key_bytes(key) + END for key in keys)


def split_keys(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The keys in the bytes that `joined_keys` made, some at a time; `parts` may cut them."""
    begun: list[bytes] = []
    for part in parts:
        end, *keys = part.split(END)
        begun.append(end)
        if keys:
            yield [b"".join(begun), *keys[:-1]]
            begun = keys[-1:]
