"""Model families by the names users give them: whose tokenizer counts, and where a caption ends without being cut into chunks."""

from typing import Literal

Family = Literal["sd1", "sd2", "sdxl", "sd3", "flux"]

CLIP: dict[Family, str] = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sd1", "sd3": "sd1", "flux": "sd1"}
"""The CLIP tokenizer of each, as `tokens.FAMILIES` names it. The second encoders of SDXL and SD3 differ in padding alone."""
ONE_CHUNK: frozenset[Family] = frozenset(("sd3", "flux"))
"""Where CLIP reads one chunk of a caption and no more; the other families take any number of chunks."""
T5_IDS: dict[Family, int] = {"sd3": 256, "flux": 512}
"""Ids that T5 reads, the one it adds itself included."""
