"""Fine-tuning of SD 1.x, SD 2.x and SDXL on captions written by `capmerge`.

`docs/architecture.md` lists the folders of this package and their order of imports;
`training/loop` tells the story of a run.
"""

import logging

# diffusers imports bitsandbytes where it is installed, which then advises to install a package for
# models in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
