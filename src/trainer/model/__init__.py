"""The model of a run: built, loaded, saved, and how its text is encoded."""
