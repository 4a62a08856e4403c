"""The model of a run: building, loading, saving, and encoding its text."""
