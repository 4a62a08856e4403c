"""The entry point of the console script `capmerge` and of `python -m capmerge`."""

import os

from capmerge.start import importing

# numpy is used for arrays here, and not for linear algebra. Without this it starts a thread per
# core, and in a process with threads every allocation of memory takes a lock.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

with importing("capmerge: ", "capmerge"):
    from capmerge.cli.app import main

if __name__ == "__main__":
    main()
