"""The path from records and latents to the batches of a run."""
