"""The values of a trained model as they are written, and the type of each."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from trainer.config.settings import Config
from trainer.model.model import Model
from trainer.model.original_layout import VAE
from trainer.model.source import find_source
from trainer.model.tensor_file import ReadTensors

TYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""The values of `export.dtype`, as safetensors names them."""


class Weights:
    """The values of a model to be written: trained ones of a state, all others of the source."""

    def __init__(
        self,
        model: Model,
        state: Mapping[str, Tensor],
        config: Config,
        reader: ReadTensors,
        *,
        vae: bool,
    ) -> None:
        self.source = find_source(model, config, vae=vae)
        self._state, self._export, self.reader = state, config.export, reader
        parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(one.shape) for name, one in parameters.items()}
        if self.source.vae:
            self.shapes |= {
                f"{VAE}.{name}": tuple(one.shape)
                for name, one in self.source.vae.named_parameters()
            }
        self.trained = {name for name, one in parameters.items() if one.requires_grad}

    def dtype(self, name: str) -> str:
        """The type in which a tensor is written, as safetensors names it."""
        if self._export.dtype != "source":
            return TYPES[self._export.dtype]
        return self.source.held[name].dtype if name in self.source.held else "F32"

    def value(self, name: str) -> Tensor:
        """The value of a tensor, in the type of the state or of the source."""
        if name in self.source.held and name not in self.trained:
            return self.source.held[name].read(self.reader).reshape(self.shapes[name])
        return self._state[name]

    def parts_of_file(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor of the single file that the model comes from."""
        assert self.source.file is not None
        return self.reader.parts(self.source.file, name)
