"""How many tokens, steps and operations stages 2 and 2b take, before they run; and how long a domain's rows are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twice_rec.data.dataset import PreparedData
from twice_rec.files import read_records
from twice_rec.llm.flops import Work
from twice_rec.llm.footprint import TILE_TOKENS, Shape, memory
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.llm.tokens import encode_chat, encode_text
from twice_rec.random_streams import random_stream
from twice_rec.rationales.generate import CHARS_PER_TOKEN
from twice_rec.records import Rationale
from twice_rec.sft.dataset import TASKS, TaskMixConfig, training_rows
from twice_rec.sft.encoding import pack
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe

SAMPLE = 200  # users whose rows are measured
_RATIONALE = 980  # characters; the mean of the released ones, for users that have none yet
Lengths = Mapping[str, NDArray[np.float64]]  # task -> tokens of prompt and completion of some rows, [n, 2]


class Population(NamedTuple):
    """How much there is to train on."""

    users: int  # training examples
    explained: int  # those with an accepted rationale
    items: int


class Estimate(NamedTuple):
    """What a training stage takes, on all its GPUs together unless said otherwise."""

    rows: Mapping[str, float]  # of stage 2 per epoch, by task; of stage 3 its prompts
    batch: float  # rows or completions per optimizer step, on average: the effective batch
    steps: int
    tokens: float  # of all rows in all epochs
    computed: float  # tokens that go through the model in training
    written: float  # tokens of rollouts
    flops: float  # of training, with what gradient checkpointing repeats
    at_once: int  # tokens that go through the model at once on one GPU
    memory: Mapping[str, float]  # part -> GiB on one GPU, see `footprint.memory`


def measure(data: PreparedData, config: PromptConfig, model: str | None) -> tuple[Lengths, Population, str]:
    """Return the lengths of a sample of a run's rows, how many there are, and how tokens were counted.

    The user with the longest prompt, in characters, is in the sample in any case, since it decides the memory.

    Args:
        config: limits the prompts; here they are only counted as no longer.
        model: whose tokenizer counts, if it is on this machine; else characters are.
    """
    import transformers

    tokenizer = None
    with contextlib.suppress(OSError, ValueError):
        if model is not None:
            found = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
            tokenizer = found if found.chat_template else None
    examples = list(data.training_examples())
    drawn = random_stream(0, "lengths of the estimate").permutation(len(examples))[:SAMPLE]
    whole = PromptConfig(item_first=config.item_first)
    builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, whole)  # type: ignore[arg-type]
    longest = max(examples, key=lambda e: sum(len(message["content"]) for message in builder.recommend(e, True)))
    chosen = [longest, *(examples[i] for i in drawn if examples[i] is not longest)][:SAMPLE]
    accepted = data.folder.parent / "rationales" / "accepted.jsonl"
    texts = {r.user_id: r.text for r in read_records(accepted, Rationale)} if accepted.exists() else {}
    usual = "x" * (sum(map(len, texts.values())) // len(texts) if texts else _RATIONALE)
    written = [(e.user_id, e.target, texts.get(e.user_id, usual)) for e in chosen]
    rationales = [Rationale(*one, "relevant", (), 1.0, "none") for one in written]
    count = _counter(tokenizer)
    lengths: dict[str, list[tuple[float, float]]] = {task: [] for task in TASKS}
    for row in training_rows(builder, chosen, rationales, TaskMixConfig(item_info_rows=SAMPLE), 0):
        prompt = count(row.prompt)
        lengths[row.task].append((min(prompt, config.max_prompt_tokens or prompt), count(row.completion)))
    how = f"the tokenizer of {model}" if tokenizer else f"{CHARS_PER_TOKEN} characters per token, assumed"
    population = Population(len(examples), len(texts) or len(examples), len(data.catalog))
    return {task: np.array(pairs) for task, pairs in lengths.items()}, population, how


def _counter(tokenizer: Any) -> Callable[[Any], float]:
    """Return what counts the tokens of a conversation or a text."""

    def count(given: Any) -> float:
        if tokenizer is not None:
            return len((encode_text if isinstance(given, str) else encode_chat)(tokenizer, given))
        turns = [given] if isinstance(given, str) else [message["content"] for message in given]
        return sum(map(len, turns)) / CHARS_PER_TOKEN

    return count


def estimate(
    recipe: SFTRecipe, shape: Shape, lengths: Lengths, population: Population, processes: int = 1, zero: int = 0
) -> Estimate:
    """Return what stage 2 takes; a rejected rationale's user still has a row of task 2."""
    there = {"item_info": population.items, "direct": population.users, "rationale": population.explained}
    limits = {task: there[task] if (limit := recipe.rows_of(task)) is None else limit for task in TASKS}
    rows = {task: min(there[task], limits[task]) * recipe.weight_of(task) for task in TASKS}
    alone = {task: [[(0, int(sum(pair)))] for pair in lengths[task]] for task in TASKS}
    direct, rationale = lengths["direct"], lengths["rationale"]
    ends = [round(float(part[:, 1].mean())) for part in (direct, rationale)]  # completions of both rows of a user
    joined = [[(0, int(prompt)), *((int(prompt), end) for end in ends)] for prompt in direct[:, 0]]
    both = min(rows["direct"], rows["rationale"]) if recipe.share_prefixes else 0.0
    pieces = [(both, joined, sum(ends))]
    for task in TASKS:
        count = rows[task] - (both if task != "item_info" else 0)
        pieces.append((count, alone[task], round(float(lengths[task][:, 1].mean()))))
    computed = flops = 0.0
    for count, groups, predicted in pieces:  # the sample's work, scaled to the number of its groups
        work = Work.of([s for group in groups for s in group], predicted * len(groups), shape.arithmetic.windows)
        computed += count / len(groups) * work.tokens
        again = shape.arithmetic.forward(work) if recipe.trainer_value("gradient_checkpointing") else 0
        flops += count / len(groups) * (shape.arithmetic.training(work, recipe.use_peft) + again)
    tokens = sum(rows[task] * float(lengths[task].sum(axis=1).mean()) for task in TASKS)
    value = recipe.trainer_value
    size, epochs = value("per_device_train_batch_size"), value("num_train_epochs")
    longest = max(sum(own for _, own in group) for count, groups, _ in pieces if count for group in groups)
    room = recipe.pack_tokens or (value("max_length") if value("packing") else None)  # of a pack, ours or TRL's
    if room is None:
        batches, at_once = sum(count for count, *_ in pieces), size * longest
    else:
        drawn = [(count / computed * 5e6, groups) for count, groups, _ in pieces]  # 5 million tokens are packed
        sizes = [sum(own for _, own in groups[i % len(groups)]) for n, groups in drawn for i in range(round(n))]
        scale = computed / sum(sizes)
        if recipe.pack_tokens is None:  # TRL cuts longer rows
            sizes, longest = [min(size_of, room) for size_of in sizes], room
        packs = pack([{"labels": [0] * size_of} for size_of in sizes], room, recipe.seed)
        batches, at_once = len(packs) * scale, size * max(room, longest)
    per_epoch = ceil(ceil(batches) / (size * value("gradient_accumulation_steps") * processes))
    steps = value("max_steps") if value("max_steps") > 0 else ceil(per_epoch * epochs)
    epochs = steps / per_epoch
    weights = recipe.quantization if recipe.quantization != "none" else recipe.dtype
    tile = at_once if value("label_smoothing_factor") else TILE_TOKENS  # TRL smooths labels on whole logits
    parts = memory(shape, recipe, at_once, weights, value("gradient_checkpointing"), zero, processes, tile)
    batch = sum(rows.values()) / per_epoch
    return Estimate(rows, batch, steps, tokens * epochs, computed * epochs, 0.0, flops * epochs, at_once, parts)


def estimate_preferences(
    recipe: SDPORecipe, shape: Shape, lengths: Lengths, users: int, processes: int = 1, zero: int = 0
) -> Estimate:
    """Return what stage 2b takes: forward and backward of all answers of a user, and the reference's forward."""
    users, value = min(users, recipe.preference_rows or users), recipe.trainer_value
    direct, answers = lengths["direct"], 1 + recipe.num_negatives
    end = round(float(direct[:, 1].mean()))
    groups = [[(0, int(prompt)), *[(int(prompt), end)] * answers] for prompt in direct[:, 0]]
    work = Work.of([s for group in groups for s in group], end * answers * len(groups), shape.arithmetic.windows)
    forwards = shape.arithmetic.forward(work) * (2 if value("gradient_checkpointing") else 1)
    flops = users / len(groups) * (shape.arithmetic.training(work, recipe.use_peft) + forwards)
    size = value("per_device_train_batch_size")
    per_epoch = ceil(ceil(users / size / processes) / value("gradient_accumulation_steps"))
    steps = value("max_steps") if value("max_steps") > 0 else ceil(per_epoch * value("num_train_epochs"))
    epochs = steps / per_epoch
    tokens = users * answers * (float(direct[:, 0].mean()) + end) * epochs
    at_once = size * max(sum(own for _, own in group) for group in groups)
    parts = memory(shape, recipe, at_once, recipe.dtype, value("gradient_checkpointing"), zero, processes)
    computed = users / len(groups) * work.tokens * epochs
    return Estimate({"users": users}, users / per_epoch, steps, tokens, computed, 0.0, flops * epochs, at_once, parts)
