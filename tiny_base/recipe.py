"""The keys of recipe.yaml."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from twice_rec.config import Check, Recipe, at_least, key, within


@dataclass(frozen=True, kw_only=True)
class BaseModelRecipe(Recipe):
    """The tiny base model: a Gemma 3 of our own, pretrained to read lists, for machines that cannot run a real one."""

    publish_dir: str | None = key(None, "folder that gets a copy of the finished model", changes_result=False)
    vocab_size: int = key(2048, "of the byte-level BPE at most, before the answer tags")
    hidden_size: int = key(192, "width")
    intermediate_size: int = key(384, "width of the feed-forward layers")
    num_hidden_layers: int = key(6, "layers")
    num_attention_heads: int = key(4, "query heads")
    num_key_value_heads: int = key(2, "key and value heads")
    head_dim: int = key(32, "width of a head; vLLM's CPU kernels have 32, 64, 80, 96, ...")
    sliding_window: int = key(512, "tokens that sliding-window layers see")
    full_attention_every: int = key(2, "every so many layers one has full attention (Gemma 3: 6)")
    max_position_embeddings: int = key(8192, "longest row")
    steps: int = key(3000, "of pretraining; 0 leaves random weights")
    tokens_per_step: int = key(2500, "documents are drawn up to this many tokens")
    learning_rate: float = key(4e-3, "of Muon and AdamW")
    warmup_steps: int = key(30, "to the full learning rate")
    decay_fraction: float = key(0.3, "of the steps, the last ones, in which the learning rate falls to 0")
    weight_decay: float = key(0.05, "of the matrices")
    questions: int = key(10, "about the lists of one document")
    item_share: float = key(0.08, "of the documents are about items alone")
    max_candidates: int = key(10, "in a document, from 3 on")
    max_purchases: int = key(6, "in a document, from none on")
    curriculum_steps: int = key(2000, "in which the longest lists grow from 3 candidates and 1 purchase to these")
    exam_documents: int = key(100, "of held-out items in the final exam, each of the longest lists")
    save_steps: int = key(100, "between training states", changes_result=False)

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        at_least("vocab_size", 300),
        at_least("steps", 0),
        at_least("max_candidates", 3),
        at_least("max_purchases", 1),
        within("decay_fraction", 0, 1),
        within("item_share", 0, 1),
        *(
            at_least(name, 1)
            for name in (
                "full_attention_every", "tokens_per_step", "warmup_steps", "questions", "curriculum_steps",
                "exam_documents", "save_steps",
            )
        ),
        Check(
            lambda c: c.num_attention_heads % c.num_key_value_heads == 0,
            lambda c: (
                f"num_attention_heads {c.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{c.num_key_value_heads}"
            ),
        ),
    )  # fmt: skip
