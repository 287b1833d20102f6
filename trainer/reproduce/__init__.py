"""Claims of the paper that can be tried in small: an experiment is a file here, and the command reproduce runs it."""
