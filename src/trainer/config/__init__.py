"""The config of a run: settings, overrides, and everything that can be wrong with them."""
