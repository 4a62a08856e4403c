"""What a run would do, without doing it: the resolved config, the derived numbers, and the first samples as they will train."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from capmerge.errors import printable
from trainer.batch import Sample
from trainer.config import resolved_toml, with_seed
from trainer.datasets import DataSet, open_datasets
from trainer.derived import derive
from trainer.model import build_model, freeze_parts, trained_share
from trainer.samples import SampleMaker
from trainer.settings import Config

FIRST_SAMPLES = 8


def show(config: Config) -> None:
    """Print what `config` would train; needs no GPU, and writes nothing but missing indexes.

    The number of ranks is that of the environment a launcher sets (WORLD_SIZE), else 1.
    """
    datasets = open_datasets(config)
    config = with_seed(config, None)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    derived = derive(config, datasets, ranks)
    print(resolved_toml(config))
