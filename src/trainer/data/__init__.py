"""Records and latents to the batches of a run."""
