"""Reading a file at any offset, without a position that processes or threads would share."""

import os
import sys
import threading

if sys.platform == "win32":
    _LOCK = threading.Lock()

    def read_at(descriptor: int, size: int, offset: int) -> bytes:
        """Return the bytes [offset, offset + size), fewer only at the end of the file."""
        data = bytearray(size)
        return bytes(data[: read_into(descriptor, memoryview(data), offset)])

    def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; return the bytes read, fewer only at the file's end."""
        with _LOCK:
            os.lseek(descriptor, offset, os.SEEK_SET)
            done = 0
            while done < len(buffer) and (more := os.read(descriptor, len(buffer) - done)):
                buffer[done : done + len(more)] = more
                done += len(more)
        return done
else:

    def read_at(descriptor: int, size: int, offset: int) -> bytes:
        """Return the bytes [offset, offset + size), fewer only at the end of the file."""
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (
            more := os.pread(descriptor, size - len(data), offset + len(data))
        ):
            data += more
        return data

    def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; return the bytes read, fewer only at the file's end."""
        done = os.preadv(descriptor, [buffer], offset)
        while 0 < done < len(buffer) and (
            more := os.preadv(descriptor, [buffer[done:]], offset + done)
        ):
            done += more
        return done
