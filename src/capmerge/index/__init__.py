"""The index by which a trainer reads single records, and the listing of their cached latents."""
