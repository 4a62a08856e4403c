"""Memory while block after block is worked on, in a worker process or in the only one."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@contextmanager
def steady_memory() -> Iterator[None]:
    """A context in which memory is freed at once and used again at once.

    Python does not look for reference cycles: records have none, so reference counts free them, and
    looking for cycles would cost a fifth of the time. And the allocator keeps up to 16 MiB that are
    free, because block after block needs about as much: giving pages back to the kernel and getting
    them again took another eighth.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
            libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
