"""Commands of the project as processes that start fast, for tests.

A server imports the packages of others that a command needs, and nothing of this project. It forks
for each command. The child takes over environment, folder and standard streams, and runs its module
as `python -m` does, up to the end of the interpreter. So a command is a process of its own that
imports every module of the project anew, and only the imports of torch and its like are saved:
five seconds of processor time for each start of the trainer.

Processes of one server share the seed of Python's hashes. A command whose environment differs in
more than `LAUNCHER`, and a test of imports, limits, terminals or closed streams, need a real start
of Python.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

LAUNCHER = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTEST_CURRENT_TEST",
}
"""The variables of the environment that no package reads while it is imported."""
PACKAGES = {
    "capmerge": "multiprocessing.shared_memory numpy orjson tqdm typer",
    "trainer": "multiprocessing.shared_memory PIL.Image accelerate diffusers.optimization ftfy "
    "matplotlib.figure numpy orjson pydantic.main safetensors.torch tokenizers torch tqdm typer "
    "diffusers:UNet2DConditionModel transformers:CLIPTextModel "
    "transformers:CLIPTextModelWithProjection",
}
"""What the server of one of our packages imports: packages of others, or names that such a package
imports when asked."""
LARGEST_REQUEST = 1 << 20


class Process:
    """A command that runs, with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, command: list[str], answers: int) -> None:
        self.args, self.returncode = command, None
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, negative for a signal that killed it; None while the process runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code when the process has ended; TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            select.select([self._answers], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


def can_start(module: str, env: Mapping[str, str]) -> bool:
    """True when a server has imported under an environment like this one."""
    _, started_with = _server_of(module)
    different = {name for name, _ in env.items() ^ started_with.items()}
    return different <= LAUNCHER


def start(
    module: str,
    arguments: list[str],
    streams: list[int],
    *,
    env: Mapping[str, str],
    cwd: Path | str | None = None,
    new_session: bool = False,
    code: str | None = None,
) -> Process:
    """Start a command with three file descriptors as its standard streams.

    `code` is run in place of the module, as by `python -c`.
    """
    channel, _ = _server_of(module)
    request = {
        "module": module,
        "code": code,
        "arguments": arguments,
        "cwd": str(cwd or Path.cwd()),
        "env": dict(env),
        "new_session": new_session,
    }
    answers, answered = os.pipe()
    try:
        socket.send_fds(channel, [json.dumps(request).encode()], [*streams, answered])
    finally:
        os.close(answered)
    return Process([module, *arguments], answers)


def run(
    module: str,
    *arguments: str,
    stdin: bytes = b"",
    timeout: float | None = None,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """A command that has ended, as `subprocess.run` returns it with `capture_output`."""
    env = os.environ if env is None else env
    if not can_start(module, env):
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
            cwd=cwd,
            env=env,
        )
    (given, writes), (reads_out, out), (reads_err, err) = pipes = [os.pipe() for _ in range(3)]
    process = start(module, list(arguments), [given, out, err], cwd=cwd, env=env)
    for end in (given, out, err):
        os.close(end)
    with ThreadPoolExecutor(len(pipes)) as threads:
        threads.submit(_write, writes, stdin)
        read = [threads.submit(_read, end) for end in (reads_out, reads_err)]
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, code, *(each.result() for each in read))


def _write(end: int, data: bytes) -> None:
    with suppress(BrokenPipeError), os.fdopen(end, "wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]


def _read(end: int) -> bytes:
    with os.fdopen(end, "rb") as file:
        return file.read()


def _server_of(module: str) -> tuple[socket.socket, dict[str, str]]:
    """The connection to the server of a module's package, and its environment."""
    return _server(module.partition(".")[0])


@cache
def _server(package: str) -> tuple[socket.socket, dict[str, str]]:
    """The connection to the server of a package, which ends with it, and its environment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
    env = dict(os.environ)
    if package == "trainer":
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), *PACKAGES[package].split()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours, env


def _serve(channel: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request; in the process that becomes the command, its request and streams."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    request, (*streams, answered) = json.loads(message), files
    command = os.fork()
    if command == 0:
        if request["new_session"]:
            os.setsid()
        os.write(answered, f"{os.getpid()}\n".encode())
        os.close(answered)
        return request, streams
    for file in streams:
        os.close(file)
    _, status = os.waitpid(command, 0)
    with suppress(BrokenPipeError):
        os.write(answered, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: dict, streams: list[int]) -> None:
    """Be the command: take over its streams, folder and environment, and run its module."""
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _standard_stream(number, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    if request["code"] is None:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    else:
        exec(request["code"], {"__name__": "__main__"})


def _standard_stream(number: int, old: TextIO) -> TextIO:
    """A standard stream on its new file, as Python makes it when it starts."""
    writes = number > 0
    unbuffered = writes and "PYTHONUNBUFFERED" in os.environ
    return TextIOWrapper(
        open(number, "wb" if writes else "rb", buffering=0 if unbuffered else -1, closefd=False),
        encoding=old.encoding,
        errors=old.errors,
        newline="\n",
        line_buffering=os.isatty(number) or number == 2,
        write_through=unbuffered,
    )


def _import(packages: list[str]) -> None:
    for each in packages:
        package, _, name = each.partition(":")
        __import__(package, fromlist=[name] if name else ())
        if name:
            getattr(sys.modules[package], name)


if __name__ == "__main__":
    _import(sys.argv[2:])
    # The end of a command then looks through its own objects and not through all of torch.
    gc.freeze()
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
