"""One sample exactly as it trains, from its record and its latents. Knows nothing of batches, buckets or ranks."""

from collections.abc import Sequence
from typing import Any, Self

from capmerge.captions.written import BrokenRecordError
from capmerge.errors import DataError, quoted
from capmerge.rng import Chance
from capmerge.tokens.chunks import CHUNK_TOKENS, Chunker
from capmerge.tokens.load import load_tokenizer
from capmerge.tokens.tokenizer import ClipTokenizer
from trainer.config.settings import Config
from trainer.data.batch import Sample
from trainer.data.captions import TrainedCaption, train_caption
from trainer.data.datasets import DataSet
from trainer.data.latents import load_latents
from trainer.data.noise import draw_noise, draw_timestep
from trainer.errors import LatentsError
from trainer.families import FAMILIES


def build_chunker(config: Config) -> Chunker:
    """How the captions of a run are cut: its family's tokenizers and `[text]`. About 0.2 s a tokenizer the first time in a process."""
    tokenizers = [load_tokenizer(name) for name in FAMILIES[config.model.family].tokenizers]
    most = config.text.max_tokens
    return Chunker(
        tuple(tokenizer for tokenizer in tokenizers if isinstance(tokenizer, ClipTokenizer)),
        config.text.chunking,
        None if most == "unlimited" else most // CHUNK_TOKENS,
    )


class SampleMaker:
    """Makes samples; pickles as what it was made of, so that each worker opens its own files and tokenizers.

    `max_steps` are the optimizer steps of the run, of which token warm-up may be a share. The
    config needs its seed.
    """

    def __init__(self, config: Config, datasets: Sequence[DataSet], max_steps: int) -> None:
        assert config.train.seed is not None  # one was drawn
        self._config, self._datasets, self._max_steps = config, tuple(datasets), max_steps
        self._seed, self._family = config.train.seed, FAMILIES[config.model.family]
        self._chunker: Chunker | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self._config, self._datasets, self._max_steps)

    def make(self, dataset: int, record: int, repeat: int, epoch: int, step: int) -> Sample:
        """The sample of a record's `repeat` in `epoch` (from 0): a pure function of the arguments, the config's seed and settings.

        `step` (the optimizer step, from 0) matters to token warm-up alone. Raises `LatentsError`
        when its latents are missing or broken, `DataError` or `StaleError` when its record is.
        """
        found, config = self._datasets[dataset], self._config
        key, read = found.index.read(record)
        chance = Chance(self._seed, epoch, key, dataset, repeat)
        caption = self._caption(found, record, key, read, repeat, epoch, step)
        flipped = found.settings.flip and chance.below(2, "flip") == 1
        path = found.latents_file(record, key)
        if path is None:
            raise LatentsError(
                f"{found.settings.latents}: found no latents of the record {quoted(key)}, expected a file. Cache them."
            )
        latents = load_latents(
            path,
            family=self._family,
            width=int(found.index.width[record]),
            height=int(found.index.height[record]),
            flipped=flipped,
            alpha_mask=found.settings.alpha_mask,
        )
        noise_CHW, input_noise_CHW = draw_noise(latents.latents_CHW, chance, config.noise)
        if self._chunker is None:
            self._chunker = build_chunker(config)
        return Sample(
            dataset=dataset,
            record=record,
            repeat=repeat,
            key=key,
            caption=caption.text,
            style=caption.style,
            cut=self._chunker.cut(caption.text),
            latents_CHW=latents.latents_CHW,
            noise_CHW=noise_CHW,
            input_noise_CHW=input_noise_CHW,
            timestep=draw_timestep(chance, config.noise),
            size_conditioning=latents.size_conditioning,
            mask_HW=latents.mask_HW,
            text_noise_seed=chance.below(1 << 63, "text noise"),
            events=caption.events + ("flipped",) * flipped,
        )

    def _caption(
        self, found: DataSet, number: int, key: str, record: Any, repeat: int, epoch: int, step: int
    ) -> TrainedCaption:
        try:
            return train_caption(
                record,
                found.captions,
                self._config.text,
                seed=self._seed,
                epoch=epoch,
                key=key,
                dataset=found.number,
                repeat=repeat,
                step=step,
                max_steps=self._max_steps,
            )
        except BrokenRecordError as error:
            offset = int(found.index.offset[number])
            raise DataError(
                str(found.settings.metadata), offset, key, str(error), "Rewrite the original again."
            ) from error
