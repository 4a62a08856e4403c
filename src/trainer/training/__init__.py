"""The run itself: steps, losses, optimizer, saved states, and what is logged."""
