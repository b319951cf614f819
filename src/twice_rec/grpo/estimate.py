"""How many prompts, steps, tokens and operations stage 3 takes, before anything is loaded."""

from __future__ import annotations

from math import ceil, comb

from twice_rec.grpo.recipe import GRPORecipe, micro_batches_add_up
from twice_rec.llm.flops import Work
from twice_rec.llm.footprint import Shape, memory
from twice_rec.sft.estimate import Estimate, Lengths


def prompts_per_batch(recipe: GRPORecipe) -> float:
    """Return how many prompts go through the model with a micro-batch of completions in training.

    With `share_prefixes` and an additive loss the completions of a prompt are together. With bnpo they stay where TRL's
    shuffle of a process's completions has put them.
    """
    m, k = recipe.trainer_value("per_device_train_batch_size"), recipe.trainer_value("num_generations")
    all_own = m * recipe.trainer_value("gradient_accumulation_steps")
    if not recipe.share_prefixes:
        return float(m)
    if micro_batches_add_up(recipe):
        return max(1.0, m / k)
    return max(1.0, shuffled_prompts(m, k, all_own))


def _in_pieces(recipe: GRPORecipe, prompts: float, prompt: float, completion: float) -> float:
    """Return how many prompts a micro-batch has with `tokens_at_once`, a prompt once in each piece that has it."""
    size, bound = recipe.trainer_value("per_device_train_batch_size"), recipe.tokens_at_once
    if bound is None or prompts * prompt + size * completion <= bound:
        return prompts
    of_prompt = size / prompts  # completions
    return prompts * ceil(of_prompt / max(1, (bound - prompt) // completion))


def shuffled_prompts(size: int, group: int, completions: int) -> float:
    """Return how many prompts `size` completions have on average, drawn from g groups of K, which are `completions`.

    That is g (1 - C(gK - K, size) / C(gK, size)).
    """
    missed = comb(max(completions - group, 0), size) / comb(completions, size)
    return completions / group * (1 - missed)


def estimate(
    recipe: GRPORecipe, shape: Shape, lengths: Lengths, users: int, processes: int = 1, zero: int = 0
) -> Estimate:
    """Return what stage 3 takes: for each step the policy's forward and backward, and forwards of others.

    These are of the reference, if `beta` is above 0, and of the policy itself before the step, for the correction of
    the rollouts' logprobs.
    """
    value = recipe.trainer_value
    m, k, accumulation = (
        value(name) for name in ("per_device_train_batch_size", "num_generations", "gradient_accumulation_steps")
    )
    prompts = max(1, round(recipe.train_fraction * users))
    batch = m * accumulation * processes
    steps = ceil(prompts * k * value("num_train_epochs") * value("num_iterations") / batch)
    steps = value("max_steps") if value("max_steps") > 0 else steps
    prompt, completion = (float(part) for part in lengths["rationale"].mean(axis=0))
    completion = min(completion, value("max_completion_length"))

    def work(prompts_of: float) -> Work:  # of ten micro-batches, since a mean number of prompts is no whole one
        whole = [(0, int(prompt))] * round(10 * prompts_of) + [(int(prompt), int(completion))] * (10 * m)
        return Work.of(whole, int(10 * m * completion), shape.arithmetic.windows)

    together = prompts_per_batch(recipe)
    trained = _in_pieces(recipe, together, prompt, completion)
    before = max(1.0, m / k) if recipe.share_prefixes else float(m)  # before the shuffle
    before = _in_pieces(recipe, before, prompt, completion)
    others = (value("beta") > 0) + bool(value("vllm_importance_sampling_correction"))
    flops = shape.arithmetic.training(work(trained), recipe.use_peft) + others * shape.arithmetic.forward(work(before))
    pieces = recipe.tokens_at_once is not None and together * prompt + m * completion > recipe.tokens_at_once
    flops += shape.arithmetic.forward(work(trained)) * (bool(value("gradient_checkpointing")) + pieces)
    micro = steps * accumulation * processes / 10
    longest = float(lengths["rationale"][:, 0].max())
    at_once = ceil(ceil(together) * longest + m * value("max_completion_length"))
    if recipe.tokens_at_once is not None:
        at_once = min(at_once, max(recipe.tokens_at_once, ceil(longest + value("max_completion_length"))))
    parts = memory(shape, recipe, at_once, recipe.dtype, value("gradient_checkpointing"), zero, processes)
    return Estimate(
        {"prompts": prompts}, batch, steps, steps * batch * (prompt + completion), micro * work(trained).tokens,
        steps * batch * completion / value("num_iterations"), micro * flops, at_once, parts,
    )  # fmt: skip
