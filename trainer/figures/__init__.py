"""What a run looks like: PNG files and a page."""
