"""Find pictures by what a network makes of them: its features, codes of these, and searches in both."""
