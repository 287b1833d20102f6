"""Raw pictures that a person names to be predicted or looked for: where they are, and their bytes."""
