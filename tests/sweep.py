"""Runs commands of all programs in forked children, and prints how each of them ended.

It reads a list of cases from standard input as JSON and prints one result per case. A child has
the programs imported already, so that hundreds of commands take seconds.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import capmerge.cli.app
import trainer.cache
import trainer.caching.story
import trainer.run
import trainer.training.dry_run
import trainer.training.loop

PROGRAMS = {"capmerge": capmerge.cli.app, "trainer": trainer.run, "cache": trainer.cache}
_SECONDS = 20


def _run(program: str, arguments: list[str]) -> int:
    """The exit code of a command; its output goes to the file `output`."""
    child = os.fork()
    if child == 0:
        end = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(end, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [program, *arguments]
        code = 0
        try:
            PROGRAMS[program].main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001  # Python would show it like this
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end_time = time.monotonic() + _SECONDS
    while time.monotonic() < end_time:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def main() -> None:
    """Run the cases that standard input lists."""
    torch.set_num_threads(1)  # a forked child waits for ever for threads that it has not got
    for program, arguments in json.load(sys.stdin):
        code = _run(program, arguments)
        text = Path("output").read_bytes().decode("utf-8", "replace")
        print(json.dumps([code, text]), flush=True)


if __name__ == "__main__":
    main()
