"""Language models: loading, LoRA, merging, generation, and the log-probabilities of many answers to one prompt."""
