"""How many files this process may have open at once."""

import sys

_OTHERS = 256
"""Files that a process has open besides: pipes to its workers, libraries, scratch files."""


def allow_open_files(count: int) -> None:
    """Raise the limit of this process so that it can open `count` files, as far as it may.

    Systems start programs with a low limit, often 1024 or 256, which each program may raise up to
    another, much higher one. Where that is not enough, opening a file raises `OSError` as before.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHERS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
