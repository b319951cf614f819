"""Stage 1: who writes rationales, and which of them are kept."""
