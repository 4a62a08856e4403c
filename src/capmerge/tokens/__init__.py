"""Text as CLIP's tokenizers read it: ids, counts and chunks, without torch and without a network."""
