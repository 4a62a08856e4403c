"""The training itself: steps, losses, optimizer, saved states, and the log."""
