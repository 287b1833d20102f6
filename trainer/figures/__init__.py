"""Draw a run: PNG sheets and a page."""
