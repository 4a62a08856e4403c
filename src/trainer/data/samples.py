"""Making one sample exactly as it trains, from its record and its latents.

A sample depends on neither its batch, its bucket nor its rank.
"""

from collections.abc import Sequence
from typing import Any, Self

from capmerge.captions.written import BrokenRecordError
from capmerge.errors import DataError, quoted
from capmerge.index.latent_names import PIXELS_PER_LATENT
from capmerge.rng import Chance, SampleId
from capmerge.tokens.chunks import CHUNK_TOKENS, Chunker
from capmerge.tokens.load import load_clip
from trainer.config.settings import Config, family_of
from trainer.data.batch import Sample, SampleRequest
from trainer.data.captions import train_caption
from trainer.data.datasets import DataSet
from trainer.data.latents import load_latents
from trainer.data.noise import draw_noise, draw_timestep
from trainer.errors import LatentsError
from trainer.families import FAMILIES


def build_chunker(config: Config) -> Chunker:
    """The chunker of a run, made from the tokenizers of its family and from `[text]`.

    Takes about 0.2 s per tokenizer the first time in a process.
    """
    most = config.text.max_tokens
    return Chunker(
        tuple(load_clip(name) for name in FAMILIES[config.model.family].tokenizers),
        config.text.chunking,
        None if most == "unlimited" else most // CHUNK_TOKENS,
    )


class SampleMaker:
    """The maker of the samples of a run.

    It pickles as its arguments, so that each worker opens its own files and tokenizers. `max_steps`
    is the number of optimizer steps in the run; token warm-up may be a share of it. The config must
    have a seed.
    """

    def __init__(self, config: Config, datasets: Sequence[DataSet], max_steps: int) -> None:
        # A seed was drawn when the config had none.
        assert config.train.seed is not None
        self._config, self._datasets, self._max_steps = config, tuple(datasets), max_steps
        self._seed, self._family = config.train.seed, family_of(config.model)
        self._chunker: Chunker | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self._config, self._datasets, self._max_steps)

    def make(self, request: SampleRequest) -> Sample:
        """The sample of `request`, a pure function of the request, the config and its seed.

        `request.step` matters only to token warm-up. Raises `LatentsError` when the latents are
        missing or broken, `DataError` or `StaleError` when the record is.
        """
        # Read the record; everything random about the sample follows from its identity.
        dataset, record, repeat, epoch, step = request
        found, config = self._datasets[dataset], self._config
        key, read = found.index.read(record)
        sample = SampleId(self._seed, epoch, key, dataset, repeat)
        chance = Chance(sample)
        # The caption.
        try:
            caption = train_caption(
                read, found.captions, config.text, sample, step=step, max_steps=self._max_steps
            )
        except BrokenRecordError as error:
            metadata, offset = found.index.place_of(record)
            raise DataError(
                metadata, offset, key, str(error), "Rewrite the original again."
            ) from error
        # The latents.
        flipped = found.settings.flip and chance.below(2, "flip") == 1
        path = found.latents_file(record, key)
        if path is None:
            raise LatentsError(
                f"{found.settings.latents}: found no latents of the record {quoted(key)}, "
                "expected a file. Cache them."
            )
        latents = load_latents(
            path,
            family=self._family,
            width=int(found.rows.width[record]),
            height=int(found.rows.height[record]),
            flipped=flipped,
            alpha_mask=found.settings.alpha_mask,
        )
        # The noise, and all of it together.
        n_pixels = latents.latents_CHW[0].numel() * PIXELS_PER_LATENT**2
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
            timestep=draw_timestep(chance, config.noise, n_pixels),
            size_conditioning=latents.size_conditioning,
            mask_HW=latents.mask_HW,
            text_noise_seed=chance.below(1 << 63, "text noise"),
            events=caption.events + ("flipped",) * flipped,
        )
