"""Reads text as CLIP's tokenizers do: ids, counts and chunks, without torch and any network."""
