"""Statistics of captions: counted in the workers, added up, shown as table, figure and page."""
