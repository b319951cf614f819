"""Stage 2: multi-task SFT of the base model."""
