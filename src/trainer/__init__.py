"""Fine-tuning of SD 1.x, SD 2.x and SDXL on captions written by `capmerge`.

Nothing is built here yet: this release holds the caption tools. The package name is taken so that both install as one.
"""
