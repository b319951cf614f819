"""Stage 1's library: who writes rationales, and which of them are kept."""
