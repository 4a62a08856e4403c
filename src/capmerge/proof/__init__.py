"""A second opinion on a rewritten file: readers, comparison and proof of the draws of `verify`."""
