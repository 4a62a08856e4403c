"""Latents from pictures, in sd-scripts' files."""
