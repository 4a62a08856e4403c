"""The saved states of a run: written, found, checked, resumed, and exported as models."""
