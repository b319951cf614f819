"""The keys of recipe.yaml."""

from __future__ import annotations

from twice_rec.recipe import Recipe, Settings, key, rule


class ShapeConfig(Settings):
    """The shape of the model."""

    vocab_size: int = key(2048, "largest vocabulary of the byte-level BPE, before the answer tags", ge=300)
    hidden_size: int = key(192, "width of the model")
    intermediate_size: int = key(384, "width of the feed-forward layers")
    num_hidden_layers: int = key(6, "number of layers")
    num_attention_heads: int = key(4, "number of query heads")
    num_key_value_heads: int = key(2, "number of key and value heads")
    head_dim: int = key(32, "width of a head; vLLM's CPU kernels have 32, 64, 80, 96, ...")
    sliding_window: int = key(512, "tokens that layers with a sliding window see")
    full_attention_every: int = key(2, "every so many layers, one has full attention (Gemma 3: 6)", ge=1)
    max_position_embeddings: int = key(8192, "longest row in tokens")

    @rule
    def key_heads_divide_query_heads(self) -> str | None:
        if self.num_attention_heads % self.num_key_value_heads:
            return (
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return None


class PretrainingConfig(Settings):
    """How the model is trained."""

    steps: int = key(3000, "steps of pretraining; 0 leaves random weights", ge=0)
    tokens_per_step: int = key(2500, "documents are drawn up to this many tokens per step", ge=1)
    learning_rate: float = key(4e-3, "learning rate of Muon; AdamW has a quarter of it")
    warmup_steps: int = key(30, "steps to the full learning rate", ge=1)
    decay_fraction: float = key(
        0.3, "share of the steps, the last ones, in which the learning rate falls to 0", ge=0, le=1
    )
    weight_decay: float = key(0.05, "weight decay of the matrices")
    save_steps: int = key(100, "steps between training states", changes_result=False, ge=1)


class BaseModelRecipe(Recipe, ShapeConfig, PretrainingConfig):
    """The toy base model: a Gemma 3 of our own, pretrained to read lists, for machines that cannot run a real one."""

    publish_dir: str | None = key(None, "folder that gets a copy of the finished model", changes_result=False)
    questions: int = key(10, "questions about the lists of one document", ge=1)
    item_share: float = key(0.08, "share of the documents that are about items alone", ge=0, le=1)
    max_candidates: int = key(10, "most candidates in a document; the fewest are 3", ge=3)
    max_purchases: int = key(6, "most interactions in a document", ge=1)
    curriculum_steps: int = key(
        2000, "steps in which the longest lists grow from 3 candidates and 1 interaction to these", ge=1
    )
    exam_documents: int = key(100, "documents of held-out items in the final exam, each with the longest lists", ge=1)
