"""The speed of reading packed latents beside loose files, as a section of `bench_toolbox`.

.venv/bin/python scripts/bench_latents_read.py [--files 1000] [--rounds 7] [--flipped]

Both are read as a run reads them: the listing gives the file of a record, and `load_latents` reads,
checks and scales it, in a random order of the records. The files are SDXL latents of 1024 x 1024 px
as sd-scripts stores them. Rounds of both ways alternate in one process with one thread, and the
best round of each counts. Before a cold round the system is asked to drop the files from its cache,
which needs no permission; a virtual disk of the host may have them in its cache all the same.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from measuring import table
from trainer.config.settings import Config
from trainer.data.datasets import DataSet, open_datasets
from trainer.data.latents import load_latents
from trainer.families import FAMILIES

SIDE_PX = 1024
WAYS = ("loose", "packed")
HEADER = ("cache", "latents", "wall us/file", "CPU us/file", "wall rate", "CPU rate")


class Round(NamedTuple):
    """What the reading of all files took, per file."""

    wall_us: float
    cpu_us: float


def write_data(folder: Path, files: int, *, flipped: bool) -> Path:
    """Write latents, their metadata and the shards of them into `folder`; return the metadata."""
    rng = np.random.default_rng(0)
    shape = (4, SIDE_PX // 8, SIDE_PX // 8)
    records = {}
    (folder / "loose").mkdir()
    for number in range(files):
        key = f"{number:06d}"
        latents = rng.standard_normal(shape, np.float32) / np.float32(0.13025)
        more = {"latents_flipped": latents[:, :, ::-1].copy()} if flipped else {}
        np.savez(
            folder / "loose" / f"{key}.npz",
            latents=latents,
            original_size=np.array([1500, 1400]),
            crop_ltrb=np.array([20, 0, SIDE_PX + 20, SIDE_PX]),
            **more,
        )
        records[key] = {"caption": "a picture", "train_resolution": [SIDE_PX, SIDE_PX]}
    source, out = folder / "meta.json", folder / "rewritten.json"
    source.write_text(json.dumps(records), encoding="utf-8")
    for command in (
        ["rewrite", source, "-o", out],
        ["pack-latents", out, "--latents", folder / "loose", "-o", folder / "packed"],
    ):
        subprocess.run([sys.executable, "-m", "capmerge", *command, "--quiet"], check=True)
    return out


def opened(folder: Path, metadata: Path, way: str) -> DataSet:
    """The data set of a run with the loose or the packed latents."""
    config = Config.model_validate(
        {
            "model": {"family": "sdxl", "path": "random"},
            "data": [{"metadata": metadata, "latents": folder / way}],
            "train": {"output_dir": folder / "run", "max_steps": 1, "seed": 1},
        }
    )
    return open_datasets(config)[0]


def read_all(data: DataSet, order: Sequence[int], keys: Sequence[str]) -> Round:
    """Read the latents of all records in this order."""
    family = FAMILIES["sdxl"]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for record in order:
        path = data.latents_file(record, keys[record])
        assert path is not None
        load_latents(
            path, family=family, width=SIDE_PX, height=SIDE_PX, flipped=False, alpha_mask=False
        )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Round(seconds / len(order) * 1e6, cpu / len(order) * 1e6)


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the pages of all files in a folder."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(
    folder: Path, metadata: Path, rounds: int, before_round: Callable[[Path], None] | None
) -> dict[str, Round]:
    """The best round of each way; `before_round` is called with the folder to be read."""
    sets = {way: opened(folder, metadata, way) for way in WAYS}
    index = sets["loose"].index
    keys = [index.read(record)[0] for record in range(len(index))]
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    for number in range(rounds):
        order = random.Random(number).sample(range(len(keys)), len(keys))
        for way in WAYS if number % 2 else reversed(WAYS):
            if before_round:
                before_round(folder / way)
            found[way].append(read_all(sets[way], order, keys))
    return {
        way: Round(min(one.wall_us for one in all_), min(one.cpu_us for one in all_))
        for way, all_ in found.items()
    }


def section(files: int, rounds: int, *, flipped: bool) -> list[list[str]]:
    """The rows of the table under `HEADER`; rates are those of loose files where they are 1."""
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        metadata = write_data(folder, files, flipped=flipped)
        for cache, before in (("warm", None), ("cold", drop_from_cache)):
            best = measure(folder, metadata, rounds, before)
            rows += [
                [
                    cache,
                    way,
                    f"{found.wall_us:.0f}",
                    f"{found.cpu_us:.0f}",
                    f"{best['loose'].wall_us / found.wall_us:.2f}",
                    f"{best['loose'].cpu_us / found.cpu_us:.2f}",
                ]
                for way, found in best.items()
            ]
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flipped", action="store_true", help="store flipped latents too")
    asked = parser.parse_args()
    print(table(HEADER, section(asked.files, asked.rounds, flipped=asked.flipped)))


if __name__ == "__main__":
    main()
