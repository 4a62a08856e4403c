"""The page of a run: `python -m trainer.report` draws it from the files of the run folder."""
