"""Stage 0: sources of interactions, sequences and splits, candidate lists, and the files that later stages read."""
