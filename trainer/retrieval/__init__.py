"""Pictures found by what a network makes of them: its features, codes of them, and both searched."""
