"""Fine-tuning of SD 1.x, SD 2.x and SDXL on captions written by `capmerge`.

`docs/architecture.md` lists the folders of this package and their order of imports;
`training/loop` tells the story of a run.
"""
