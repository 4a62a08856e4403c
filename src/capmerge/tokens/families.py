"""States how the CLIP tokenizers differ, and which tokenizers each model family uses."""

from typing import Literal, NamedTuple

from capmerge.tokens.chunks import EOS_ID

ClipName = Literal["sd1", "sd2", "sdxl_g"]
"""The CLIP tokenizers of SD 1 and SDXL's first encoder, of SD 2, and of SDXL's second encoder."""


class ClipVariant(NamedTuple):
    """The differences between one CLIP tokenizer and the others; all share one vocabulary."""

    pad: int
    """The id that fills a chunk after its EOS."""
    added: dict[str, int]
    """The literals, besides BOS and EOS, that become one id each before the text is cleaned."""


CLIP_VARIANTS: dict[ClipName, ClipVariant] = {
    "sd1": ClipVariant(EOS_ID, {}),
    # The padding of SD 2 is an added token, so every "!" is cut out of its word. SDXL's second
    # encoder pads with the same id and leaves "!" alone.
    "sd2": ClipVariant(0, {"!": 0}),
    "sdxl_g": ClipVariant(0, {}),
}

TokenizerFamily = Literal["sd1", "sd2", "sdxl", "sd3", "flux"]
"""The model families whose captions `--family` counts."""
CLIP_OF_FAMILY: dict[TokenizerFamily, ClipName] = {
    "sd1": "sd1",
    "sd2": "sd2",
    "sdxl": "sd1",
    "sd3": "sd1",
    "flux": "sd1",
}
"""The CLIP tokenizer of each family.

The second encoders of SDXL and SD3 differ in padding alone."""
ONE_CHUNK: frozenset[TokenizerFamily] = frozenset(("sd3", "flux"))
"""The families whose CLIP reads only the first chunk of a caption.

The others take any number of chunks."""
T5_IDS: dict[TokenizerFamily, int] = {"sd3": 256, "flux": 512}
"""The number of ids that T5 reads, including the one that it adds itself."""
