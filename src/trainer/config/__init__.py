"""The config of a run: its settings, overrides, and checks."""
