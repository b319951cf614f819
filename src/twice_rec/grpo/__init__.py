"""Stage 3: rewards, rollouts and the trainer of confidence-weighted GRPO."""
