"""No command hangs or shows a traceback, whatever its files and streams turn out to be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.commands import RECORDS
from builders.config import LEAST, write
from builders.metadata import run, run_shell
from builders.packed import write_sound
from builders.pictures import write_pictures, write_vae

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sweep needs files of Linux")

PLACES = {
    "rewrite SRC": "rewrite HERE -o new.json",
    "rewrite --out": "rewrite meta.json --force -o HERE",
    "rewrite --plot": "rewrite meta.json -o new.json --stats --force --plot HERE",
    "rewrite --report": "rewrite meta.json -o new.json --stats --force --report HERE",
    "rewrite --tokenizer": "rewrite meta.json -o new.json --stats --tokenizer HERE",
    "rewrite --drop-tags": "rewrite meta.json -o new.json --force --drop-tags HERE",
    "rewrite --replace-tags": "rewrite meta.json -o new.json --force --replace-tags HERE",
    "rewrite --in-place": "rewrite HERE --in-place",
    "convert SRC": "convert HERE -o new.jsonl --force",
    "convert --out": "convert meta.json --format json --force -o HERE",
    "convert --out parquet": "convert meta.json --format parquet --force -o HERE",
    "collect DIR": "collect HERE -o new.json --force",
    "collect --out": "collect folder --format json --force -o HERE",
    "rewrite OUT of shards": "rewrite shards -j 1 -o HERE",
    "rewrite --latents of shards": "rewrite shards -j 1 -o new --force --latents HERE",
    "verify SRC": "verify HERE out.json --layout lines",
    "verify OUT": "verify meta.json HERE",
    "verify OUT with options": "verify meta.json HERE --layout lines",
    "stats SRC": "stats HERE -o new.stats.json",
    "stats --out": "stats meta.json --force -o HERE",
    "stats --plot": "stats meta.json --force --plot HERE",
    "stats --report": "stats meta.json --force --report HERE",
    "stats --per-record": "stats meta.json --force --per-record HERE",
    "stats --tokenizer": "stats meta.json --force --tokenizer HERE",
    "preview SRC": "preview HERE",
    "preview --tokenizer": "preview meta.json --tokenizer HERE",
    "index FILE": "index HERE",
    "index --latents": "index out.json --latents HERE",
    "join FILE": "join meta.json HERE -o new.json --force",
    "join --out": "join meta.json --force -o HERE",
    "join --missing": "join meta.json -o new.json --force --fields tags=meta.json --missing HERE",
    "split SRC": "split HERE -n 2 -o parts --force",
    "split --out": "split meta.json -n 2 --force -o HERE",
    "filter SRC": "filter HERE -o new.json --force --require tags",
    "filter --out": "filter meta.json --force --require tags -o HERE",
    "filter --latents": "filter meta.json -o new.json --force --latents HERE",
    "filter --keys": "filter meta.json -o new.json --force --keys HERE",
    "filter --exclude": "filter meta.json -o new.json --force --exclude HERE",
    "check-latents SRC": "check-latents HERE --latents folder",
    "check-latents --latents": "check-latents meta.json --latents HERE",
    "check-latents --out": "check-latents meta.json --latents folder --force -o HERE",
    "check-latents --quarantine": "check-latents meta.json --latents folder --quarantine HERE",
    "pack-latents SRC": "pack-latents HERE --latents folder -o new.shards",
    "pack-latents --latents": "pack-latents meta.json --latents HERE -o new.shards",
    "pack-latents --out": "pack-latents meta.json --latents folder -o HERE",
    "trainer CONFIG": "HERE --dry-run",
    "trainer --resume": "--resume HERE",
    "trainer --resume with CONFIG": "config.toml --resume HERE",
    "trainer metadata": "config.toml --dry-run --set data.metadata=HERE",
    "trainer latents": "config.toml --dry-run --set data.latents=HERE",
    "trainer model": "config.toml --dry-run --set model.path=HERE",
    "trainer output": "config.toml --dry-run --set train.output_dir=HERE",
    "cache CONFIG": "HERE",
    "cache images": "cache.toml --set cache.images=HERE",
    "cache metadata": "cache.toml --set cache.metadata=HERE",
    "cache metadata_output": "cache.toml --set cache.metadata_output=HERE",
    "cache output": "cache.toml --set cache.output=HERE",
    "cache vae": "cache.toml --set cache.vae=HERE",
}
"""Commands with a file argument each, where HERE stands for the path that is tried."""
KINDS = {
    "a folder": "folder",
    "a loop of links": "loop",
    "below a file": "junk/x",
    "an empty device": "/dev/null",
    "a device without an end": "/dev/full",
    "a file that cannot be read": "/proc/self/mem",
    "a long name": "x" * 300,
    "a name that is not UTF-8": "a\udcffb",
    "no JSON": "junk",
    "an empty file": "empty",
    "missing": "missing/x",
    "an empty name": "",
    "a named pipe": "fifo",
}
READS_PIPES = {
    "rewrite SRC",
    "rewrite --in-place",
    "convert SRC",
    "collect DIR",
    "verify SRC",
    "verify OUT with options",
    "stats SRC",
    "preview SRC",
    "join FILE",
    "split SRC",
    "filter SRC",
    "filter --keys",
    "filter --exclude",
    "trainer CONFIG",
    "cache CONFIG",
}
"""A named pipe is a source like any other there, and opening it waits for its writer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with metadata, their rewrite, a config, and files of many kinds."""
    folder = tmp_path_factory.mktemp("sweep")
    write_sound(folder, ["danbooru/1"]).rename(folder / "sound.json")
    (folder / "meta.json").write_text(json.dumps(RECORDS))
    run("rewrite", "meta.json", "-o", "out.json", cwd=folder)
    write(folder / "config.toml", LEAST)
    cache = {"images": "pictures", "metadata": "pictures.json", "vae": "vae", "resolution": 64}
    write(folder / "cache.toml", {"model": LEAST["model"], "cache": cache})
    write_pictures(folder / "pictures", 1)
    (folder / "pictures.json").write_text('{"sub/p0": {}}')
    write_vae(folder)
    (folder / "folder").mkdir()
    (folder / "shards").mkdir()
    (folder / "shards" / "one.json").write_text(json.dumps(RECORDS))
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize("program", ["capmerge", "trainer", "cache"])
def test_any_file_argument_ends_in_a_message(folder, program):
    """Every file argument of every command, of any kind, gives success or a message in time."""
    cases = {
        (place, kind): [program, [word.replace("HERE", path) for word in words.split()]]
        for place, words in PLACES.items()
        for kind, path in KINDS.items()
        if (place.split()[0] if place.split()[0] in ("trainer", "cache") else "capmerge") == program
        and not (kind == "a named pipe" and place in READS_PIPES)
    }
    (folder / "junk").write_bytes(bytes(range(256)))
    (folder / "empty").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sweep.py")],
        input=json.dumps([*cases.values()]),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=True,
    )
    faults = {}
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        code, text = json.loads(line)
        if code not in (0, 1, 2) or "Traceback" in text or (code and not text.strip()):
            faults[case] = code, text[-500:]
    assert faults == {}, json.dumps({str(case): told for case, told in faults.items()}, indent=1)


@pytest.mark.parametrize(
    "arguments",
    [
        "rewrite meta.json -o new.json --force",
        "rewrite meta.json --dry-run 1",
        "verify meta.json out.json",
        "stats meta.json --force",
        "preview meta.json -n 1",
        "index out.json --force",
        "convert meta.json -o new.parquet --force",
        "collect folder -o new.json --force",
        "check-latents sound.json --latents latents",
        "rewrite - -o -",
    ],
)
def test_closed_standard_streams(folder, arguments):
    """A command whose standard streams are closed ends with success or a message."""
    script = "".join(
        f"CAPMERGE {arguments} <meta.json {closed}; echo $? >> codes; "
        for closed in ("<&-", ">&-", "2>&-")
    )
    (folder / "codes").unlink(missing_ok=True)
    done = run_shell(script, cwd=folder)
    assert "Traceback" not in done.err
    reads, shows = arguments.startswith("rewrite -"), "preview" in arguments or "dry" in arguments
    shows = shows or reads
    codes = [int(code) for code in (folder / "codes").read_text().split()]
    assert codes == [2 if reads else 0, 2 if shows else 0, 0]


MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = {arguments!r}
from {module} import main
main()
"""


@pytest.mark.parametrize(
    "package", ["click", "ftfy", "numpy", "orjson", "regex", "tokenizers", "typer", "zstandard"]
)
def test_a_missing_package_is_named(folder, package):
    """A package that capmerge needs and that is missing is one message and exit code 2."""
    (folder / "odd.json").write_text('{"a": {"caption": "\u00e9t\u00e9 \u201cnow\u201d"}}')
    options = "-o n.json --stats --index --force"
    if package == "zstandard":
        options = "-o n.json.zst --force"
    arguments = ["capmerge", "rewrite", "odd.json", *options.split()]
    script = MISSING.format(packages=[package], arguments=arguments, module="capmerge.__main__")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 2, done.stderr
    assert package in done.stderr
    assert "pip install capmerge" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["torch", "pydantic", "typer"])
def test_training_without_a_package_says_what_to_install(folder, package):
    """The trainer without one of its packages names the extra that installs it."""
    arguments = ["trainer.run", "config.toml"]
    script = MISSING.format(packages=[package], arguments=arguments, module="trainer.run")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the package {package} cannot be imported" in done.stderr
    assert "pip install 'capmerge[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_caching_without_pillow_says_what_to_install(folder):
    """`trainer.cache` without Pillow names the extra that installs it; training needs none."""
    arguments = ["trainer.cache", "cache.toml"]
    script = MISSING.format(packages=["PIL"], arguments=arguments, module="trainer.cache")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "the package PIL cannot be imported" in done.stderr
    assert "pip install 'capmerge[train,cache]'" in done.stderr


@pytest.mark.parametrize("module", ["capmerge", "trainer.run", "trainer.cache"])
def test_the_help_is_shown_where_warnings_are_errors(module):
    """Deprecations in the packages under the command line do not stop it."""
    command = [sys.executable, "-W", "error", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout


@pytest.mark.parametrize("module", ["capmerge.__main__", "trainer.run", "trainer.cache"])
def test_ctrl_c_during_imports_is_a_message(module):
    """Ctrl-C while a program is imported ends it with exit code 130 and one line."""
    script = (
        "import os, signal, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.meta_path.insert(0, Slow())\nimport {module}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted.\n")
    assert done.stderr.count("\n") == 1
