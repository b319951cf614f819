"""Stage 0's library: sources of purchases, sequences and splits, candidate lists, and the training rows of stage 2."""
