"""The tensors of `.safetensors` files, read and written one at a time.

The bytes are read, not mapped: mapped pages would count as memory of the run beside the weights
that are made of them, and a file that is mapped can be neither replaced nor safely overwritten.
Source of the layout: the README of safetensors.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from capmerge.errors import OutputError, printable
from capmerge.files.atomic import AtomicFile, Buffer
from trainer.config.model_file import ModelFile
from trainer.errors import ModelError

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""The types of weights that are read and written."""

HASH_KEY = "modelspec.hash_sha256"
_PART_BYTES = 1 << 24
_NO_HASH = "0x" + "0" * 64


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing sides of 1, by which a convolution differs from a matrix."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def open_model_file(path: Path) -> FileIO:
    """The file, opened to be read without a buffer; raises `ModelError` when it cannot be."""
    try:
        return FileIO(path)
    except OSError as error:
        raise ModelError(
            f"{printable(str(path))}: {error.strerror}, expected a model. Check model.path and the "
            "permissions of the file."
        ) from error


class ReadTensors:
    """Reads tensors of any number of files, which stay open inside its context."""

    def __init__(self) -> None:
        self._opened: dict[Path, FileIO] = {}
        self._closing = ExitStack()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; what is read later opens its file again."""
        self._closing.close()
        self._opened.clear()

    def read_again(self, file: ModelFile, name: str) -> Tensor:
        """As `read`, but in memory that the next call uses again.

        A new tensor for each would leave holes between those that are made of them: with SDXL,
        they were a fifth of the weights.
        """
        stored = file.tensors[name]
        size = stored.end - stored.start
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._fill(self._scratch[:size], file, name)

    def read(self, file: ModelFile, name: str) -> Tensor:
        """The tensor of that name, on the CPU and in the type of the file.

        Raises `ModelError` when its type is not in `DTYPES`, or the file has become shorter.
        """
        stored = file.tensors[name]
        return self._fill(torch.empty(stored.end - stored.start, dtype=torch.uint8), file, name)

    def _fill(self, buffer: Tensor, file: ModelFile, name: str) -> Tensor:
        """The tensor of that name, made of the bytes of `buffer`, which are read."""
        stored = file.tensors[name]
        if stored.dtype not in DTYPES:
            raise ModelError(
                f"{printable(str(file.path))}: {printable(name)} is stored as {stored.dtype}, "
                f"expected one of {', '.join(DTYPES)}. Use the file that this one was made of."
            )
        rest = memoryview(buffer.numpy())  # type: ignore[arg-type]
        for part in self.parts(file, name):
            rest[: len(part)] = part
            rest = rest[len(part) :]
        return buffer.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def parts(self, file: ModelFile, name: str) -> Iterator[bytes]:
        """The bytes of a tensor of any type, in parts of some megabytes."""
        stored = file.tensors[name]
        if file.path not in self._opened:
            self._opened[file.path] = self._closing.enter_context(open_model_file(file.path))
        raw, place = self._opened[file.path], stored.start
        while place < stored.end:
            raw.seek(place)
            part = raw.read(min(_PART_BYTES, stored.end - place))
            if not part:
                raise ModelError(
                    f"{printable(str(file.path))}: ends inside {printable(name)}. Copy the file "
                    "again."
                )
            place += len(part)
            yield part


class NewTensor(NamedTuple):
    """A tensor to be written, whose bytes are made when it is its turn."""

    name: str
    dtype: str
    """As safetensors names it, such as `F16`."""
    shape: tuple[int, ...]
    size: int
    """Number of bytes."""
    parts: Callable[[], Iterable[Buffer]]
    """Its bytes, in parts of any size."""


def new_tensor(
    name: str, dtype: str, shape: Sequence[int], value: Callable[[], Tensor]
) -> NewTensor:
    """A tensor whose `value`, on any device and in any type of floats, is written as `dtype`.

    Raises `ModelError` when it is written and a finite number becomes infinite in `dtype`.
    """
    target = DTYPES[dtype]

    def parts() -> Iterator[Buffer]:
        found = value().detach()
        cast = found.to(target)
        if found.dtype != target == torch.float16:
            _check_finite(name, found, cast)
        cast = cast.cpu().reshape(-1).contiguous()
        yield memoryview(cast.view(torch.uint8).numpy())  # type: ignore[arg-type]

    size = target.itemsize * torch.Size(shape).numel()
    return NewTensor(name, dtype, tuple(shape), size, parts)


def _check_finite(name: str, found: Tensor, cast: Tensor) -> None:
    if not bool(cast.isfinite().all()) and bool(found.isfinite().all()):
        raise ModelError(
            f"{name}: found {float(found.abs().max()):g}, expected at most "
            f"{torch.finfo(cast.dtype).max:g} to write it as {cast.dtype}. "
            'Set export.dtype to "bf16" or "fp32".'
        )


def write_tensors(
    path: Path, tensors: Iterable[NewTensor], metadata: Mapping[str, str], reader: ReadTensors
) -> None:
    """Write a `.safetensors` file, whole or not at all, with one tensor at a time in memory.

    `reader` reads what is copied; it is closed before the file gets its name, because Windows
    replaces no file that is open.
    The numbers of each tensor are counted, and the size of the file is read back.
    Where `metadata` has `HASH_KEY`, it becomes the SHA-256 of all bytes behind the header. Raises
    `OutputError` when the file cannot be written, and `ModelError` for a tensor with more or fewer
    numbers than its shape has.
    """
    # Larger types first, as safetensors does it: so every tensor begins at a multiple of its type.
    ordered = sorted(tensors, key=lambda one: -_alignment(one))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    if HASH_KEY in metadata:
        header["__metadata__"] = {**metadata, HASH_KEY: _NO_HASH}
    place = 0
    for one in ordered:
        header[one.name] = {
            "dtype": one.dtype,
            "shape": one.shape,
            "data_offsets": [place, place + one.size],
        }
        place += one.size
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )
    content += b" " * (-len(content) % 8)

    hashed = hashlib.sha256()
    with AtomicFile(path.resolve()) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for one in ordered:
            before = file.written_bytes
            for part in one.parts():
                file.write(part)
                if HASH_KEY in metadata:
                    hashed.update(part)
            # Engines divide weights, so a part of one must not be taken for the whole.
            if file.written_bytes != before + one.size:
                raise ModelError(
                    f"{printable(str(path))}: {one.name} came with {file.written_bytes - before:,} "
                    f"bytes, expected {one.size:,} for its shape {[*one.shape]}. Nothing was kept; "
                    "this is a bug."
                )
        if HASH_KEY in metadata:
            before_hash = f'"{HASH_KEY}":"0x'.encode()
            place = 8 + content.index(before_hash) + len(before_hash)
            file.overwrite(place, hashed.hexdigest().encode())
        reader.close()
        file.publish()
    size = 8 + len(content) + sum(one.size for one in ordered)
    if (found := path.stat().st_size) != size:
        raise OutputError(
            f"{printable(str(path))}: found {found:,} bytes on the disk, expected {size:,}. Check "
            "the disk, and write the file again."
        )


def _alignment(tensor: NewTensor) -> int:
    """The bytes of one number; 1 for an empty tensor, which stands anywhere."""
    count = torch.Size(tensor.shape).numel()
    return tensor.size // count if count else 1
