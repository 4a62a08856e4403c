"""Fine-tuning of SD 1.x, SD 2.x and SDXL on captions written by `capmerge`.

The rooms of this package, floor by floor, are listed in the README; `loop` is the story.
"""
