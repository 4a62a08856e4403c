"""Statistics of captions: counted in the workers, added up, and shown as table, figure and page."""
