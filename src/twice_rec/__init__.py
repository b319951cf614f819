"""TWiCE-Rec (AAAI-26), reproduced: a rationale-aware LLM recommender trained in three stages."""

__version__ = "0.1.0"
