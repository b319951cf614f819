"""S-DPO: the stage-2 model learns to prefer the target's answer to those of several other candidates at once.

Our re-creation of the method's published idea: DPO with a softmax over one chosen and K rejected answers. Questions and
answers are those of task 2. The reference is the model without its adapter, so no second model is held.

Shapes: B users, K rejected answers per user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from twice_rec.errors import InputError
from twice_rec.llm import models
from twice_rec.llm.fused import fuse_on_gpu
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.shared_prefix import group_logprobs
from twice_rec.llm.tokens import encode_chat, encode_text, end_of_turn_ids
from twice_rec.prompts import item_answer
from twice_rec.random_streams import random_stream, stream_seed
from twice_rec.records import Example
from twice_rec.sft.recipe import SDPORecipe


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of each user, [B], from the logprobs of its answers, [B, 1 + K] each; the chosen one comes first.

    With r = policy - reference it is -log sigmoid(-log sum over j of exp(beta * (r_j - r_0))), j over the rejected
    answers. That is the cross-entropy of beta * r with the chosen answer as its class; K = 1 is DPO.
    """
    return -torch.log_softmax(beta * (policy - reference), dim=1)[:, 0]


def preference_rows(
    builder: PromptBuilder, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, recipe: SDPORecipe
) -> list[dict[str, Any]]:
    """Draw the users and, for each, the candidates whose answers are rejected, by seed.

    Returns:
        One row per user: `prompt`, token ids of task 2, and `answers`, token ids of the chosen one and the rejected.

    Raises:
        InputError: if a list has fewer candidates beside the target than are to be rejected.
    """
    end, rows = end_of_turn_ids(tokenizer), []
    drawn = random_stream(recipe.seed, "users of S-DPO").permutation(len(examples))[: recipe.preference_rows]
    for example in (examples[position] for position in drawn):
        others = [item_id for item_id in example.candidates if item_id != example.target]
        if len(others) < recipe.num_negatives:
            raise InputError(
                f"num_negatives is {recipe.num_negatives}, but user {example.user_id} has {len(others)} candidates "
                "beside the target; lower it, or raise num_candidates in prepare.yaml"
            )
        rng = random_stream(recipe.seed, "negatives of S-DPO", example.user_id)
        rejected = [others[i] for i in rng.choice(len(others), recipe.num_negatives, replace=False)]
        texts = [item_answer(builder.catalog[item_id]) for item_id in (example.target, *rejected)]
        answers = [[*encode_text(tokenizer, text), *end] for text in texts]
        prompt = encode_chat(tokenizer, builder.recommend(example, with_rationale=False))
        rows.append({"prompt": prompt, "answers": answers})
    return rows


class SDPOTrainer(Trainer):
    """The trainer of transformers with the preference loss; a prompt is computed once for all of its answers.

    The log has, as TRL's DPO names them, `rewards/accuracies`: the share of users whose chosen answer gained more on
    the reference than every rejected one; and `rewards/margins`: beta times how much more it gained than their mean.

    Args:
        beta: see `preference_loss`.
    """

    def __init__(self, *arguments: Any, beta: float, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over users; accumulated steps are averaged
        self._beta = beta
        self._since: dict[str, list[float]] = {"accuracies": [], "margins": []}  # of the micro-batches since the log

    def compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Return the mean loss of a micro-batch; see `Trainer`."""
        groups = [(row["prompt"], row["answers"]) for row in inputs["rows"]]
        policy = group_logprobs(model, groups).view(len(groups), -1)  # [B, 1 + K]
        adapted: PeftModel = self.accelerator.unwrap_model(model)
        with torch.no_grad(), adapted.disable_adapter():
            reference = group_logprobs(adapted, groups).view(len(groups), -1)  # [B, 1 + K]
        gains = self._beta * (policy - reference).detach()  # [B, 1 + K]
        self._since["accuracies"].append(float((gains[:, :1] > gains[:, 1:]).all(dim=1).float().mean()))
        self._since["margins"].append(float((gains[:, 0] - gains[:, 1:].mean(dim=1)).mean()))
        loss = preference_loss(policy, reference, self._beta).mean()
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: they are not counted, since transformers counts those of padded rows."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last line of the log; see `Trainer`."""
        if "loss" in logs:
            logs |= {f"rewards/{name}": fmean(values) for name, values in self._since.items() if values}
            for values in self._since.values():
                values.clear()
        super().log(logs, start_time)


def sdpo_trainer(
    recipe: SDPORecipe, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, start: Path, folder: Path
) -> SDPOTrainer:
    """Load the model that is trained, give it an adapter, and return its trainer."""
    arguments = recipe.trainer_arguments(folder, remove_unused_columns=False, label_names=[])
    torch.manual_seed(stream_seed(recipe.seed, "first weights of S-DPO's adapter"))
    model = get_peft_model(models.load_model(start, recipe), models.lora_config(recipe))
    trainer = SDPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        data_collator=lambda of_batch: {"rows": of_batch},
        processing_class=tokenizer,
        beta=recipe.beta,
    )
    fuse_on_gpu(trainer.model, trainer.args.device)
    return trainer
