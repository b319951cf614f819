"""`twice-rec cost RECIPE`: tokens, FLOPs, GPU-hours, API cost and disk of a domain's stages, before any of them runs.

Reads the recipes beside its own. A run that is prepared gives its own counts and lengths; for the others the recipe has
published statistics. Whatever is assumed is printed as such. `domain: all` prints one Markdown table of all domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.data.dataset import CATALOG, PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.evaluation.tables import show
from twice_rec.grpo import estimate as of_grpo
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.flops import Work
from twice_rec.llm.footprint import Shape, read_shape
from twice_rec.markdown import markdown_table
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.recipe import Recipe, key
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft import estimate as of_sft
from twice_rec.sft.estimate import Lengths, Population
from twice_rec.sft.recipe import SFTRecipe
from twice_rec.stages.plan import hours_of

ALL = "all"
QUANTITIES = ("tokens", "FLOPs", "GPU-hours", "CPU-hours", "API cost", "disk, GB")
_GB = 1e9
Stages = dict[str, dict[str, float]]  # stage -> quantity -> value


class CostRecipe(Recipe):
    """What is known and assumed of domains, for `twice-rec cost`."""

    domains: dict[str, dict[str, float]] = key(
        {}, "domain -> reviews and products of the raw files, users and items; what is not published is left out"
    )
    users_share: float = key(1.0, "share of these users that prepare.yaml keeps", gt=0, le=1)
    row_tokens: dict[str, list[float]] = key({}, "task -> mean tokens of prompt and completion")
    annotation_tokens: list[float] = key([], "mean tokens of prompt and completion of stage 1")
    sasrec_users_per_second: float = key(1370.0, "users of an epoch per second and thread", gt=0)
    sasrec_items: float = key(6149.0, "items at that speed; a softmax over more takes longer", gt=0)
    evaluation_tokens_per_second: float = key(1000.0, "tokens that stage 4 writes per second and GPU", gt=0)
    review_bytes: float = key(450.0, "bytes of a raw review", gt=0)
    product_bytes: float = key(2800.0, "bytes of a raw product", gt=0)
    user_bytes: float = key(10_000.0, "bytes of a user in all results", gt=0)


def cost(words: Sequence[str]) -> None:
    """Print what each stage of the recipe's domain takes; for `domain: all`, a table of all domains.

    Raises:
        InputError: if a recipe is missing or wrong, or nothing is known of the domain.
    """
    if not words or words[0].startswith("-"):
        raise InputError(
            f"cost: expected RECIPE, such as recipes/amazon/cost.yaml, found {' '.join(words) or 'no word'}"
        )
    recipe, folder = load_recipe(words[0], CostRecipe, words[1:]), Path(words[0]).parent
    if recipe.domain != ALL:
        stages, about = stages_of(recipe, folder, recipe.domain)
        rows = [[name, *(_short(found.get(q)) for q in QUANTITIES)] for name, found in stages.items()]
        show("\n\n".join([markdown_table(["stage", *QUANTITIES], rows), *about]))
        return
    header = [
        "domain", "users", "items", "stage 1, USD", "stage 2, tokens", "stage 2, GPU-h", "stage 3, GPU-h, paper",
        "stage 3, GPU-h, improved", "SASRec, CPU-h", "stage 4, GPU-h", "disk, GB",
    ]  # fmt: skip
    places = [
        ("prepare", "users"), ("prepare", "items"), ("rationales", "API cost"), ("sft", "tokens"), ("sft", "GPU-hours"),
        ("grpo", "GPU-hours"), ("grpo_improved", "GPU-hours"), ("sasrec", "CPU-hours"), ("evaluate", "GPU-hours"),
        ("all", "disk, GB"),
    ]  # fmt: skip
    rows = []
    for domain in recipe.domains:
        stages, _ = stages_of(recipe, folder, domain)
        rows.append([domain, *(_short(stages.get(stage, {}).get(quantity)) for stage, quantity in places)])
    show(markdown_table(header, rows))


def stages_of(recipe: CostRecipe, folder: Path, domain: str) -> tuple[Stages, list[str]]:
    """Return what each stage of a domain takes, and in words what that rests on."""
    flags = ["--domain", domain]
    sft = load_recipe(folder / "sft.yaml", SFTRecipe, flags, here=False)
    shape, known = read_shape(sft.model_name_or_path, sft), recipe.domains.get(domain, {})
    data = Path(recipe.run_dir.replace("{domain}", domain)) / "data"
    raw = known.get("reviews", 0) * recipe.review_bytes + known.get("products", 0) * recipe.product_bytes
    if (data / CATALOG).exists():
        lengths, there, how = of_sft.measure(PreparedData(data), sft, sft.model_name_or_path)
        about = [f"{there.users:,} users, {there.items:,} items and their prompts as {data} has them; tokens by {how}."]
    elif "users" in known:
        lengths = {task: np.array([pair]) for task, pair in recipe.row_tokens.items()}
        users = round(known["users"] * recipe.users_share)
        there = Population(users, users, round(known["items"]))
        about = [
            f"Assumed: {users:,} users ({recipe.users_share:.0%} of {known['users']:,.0f}), {there.items:,} items, "
            f"row_tokens {recipe.row_tokens}."
        ]
    elif known:
        return {"prepare": {"disk, GB": raw / _GB}, "all": {"disk, GB": raw / _GB}}, [
            "The number of users is not known."
        ]
    else:
        raise InputError(
            f"nothing is known of domain {domain}: prepare it first ({data} is not there), or add it to domains of the "
            f"recipe, which has {', '.join(recipe.domains)}"
        )
    stages = _stages(recipe, folder, flags, sft, shape, lengths, there)
    stages["prepare"] |= {"disk, GB": raw / _GB}
    stages["all"] = {q: sum(found.get(q, 0) for found in stages.values()) for q in QUANTITIES}
    rates = (
        f"{sft.gpu_utilization:.0%} of {sft.gpu_tflops:g} TFLOP/s; annotation_tokens {recipe.annotation_tokens}; every "
        f"rationale accepted; {recipe.evaluation_tokens_per_second:,.0f} tokens/s in stage 4; "
        f"{recipe.sasrec_users_per_second:,.0f} users/s of SASRec on one thread; raw files by bytes per record. The last row adds up all others."
    )
    return stages, [*about, f"Assumed as well: {rates}"]


def _stages(
    recipe: CostRecipe,
    folder: Path,
    flags: list[str],
    sft: SFTRecipe,
    shape: Shape,
    lengths: Lengths,
    there: Population,
) -> Stages:
    calls = load_recipe(folder / "rationales.yaml", RationalesRecipe, flags)
    asked = [count * min(there.users, calls.max_rationales or there.users) for count in recipe.annotation_tokens]
    stages: Stages = {
        "prepare": {"users": there.users, "items": there.items},
        "rationales": {
            "tokens": sum(asked),
            "API cost": calls.cost(*asked),
            "disk, GB": there.users * recipe.user_bytes / _GB,
        },
    }
    merged = 2 * shape.parameters / _GB  # bfloat16
    found = of_sft.estimate(sft, shape, lengths, there)
    stages["sft"] = {
        "tokens": found.tokens, "FLOPs": found.flops, "GPU-hours": hours_of(sft, found)[2], "disk, GB": merged
    }  # fmt: skip
    for path in sorted(folder.glob("sasrec*.yaml")):
        cf = load_recipe(path, SASRecRecipe, flags)
        slower = max(1.0, there.items / recipe.sasrec_items) if cf.loss == "softmax" else 1.0
        seconds = there.users * cf.epochs * cf.num_seeds * slower / recipe.sasrec_users_per_second
        stages[path.stem] = {"CPU-hours": seconds / 3600}
    for name in ("grpo", "grpo_improved"):
        grpo = load_recipe(folder / f"{name}.yaml", GRPORecipe, flags, here=False)
        trained = of_grpo.estimate(grpo, shape, lengths, there.users)
        hours = hours_of(grpo, trained)[2]
        stages[name] = {
            "tokens": trained.tokens, "FLOPs": trained.flops, "GPU-hours": hours, "disk, GB": merged
        }  # fmt: skip
    stages["evaluate"] = _evaluation(
        recipe, load_recipe(folder / "evaluate.yaml", EvaluateRecipe, flags), shape, lengths, there
    )
    return stages


def _evaluation(
    recipe: CostRecipe, asked: EvaluateRecipe, shape: Shape, lengths: Lengths, there: Population
) -> dict[str, float]:
    """Each question is read once per ranking, and answered once by likelihood, `num_samples` times by votes."""
    questions = min(there.users, asked.num_users or there.users) * len(asked.variants) * len(asked.lists)
    prompt, completion = (float(part) for part in lengths["rationale"].mean(axis=0))
    work = Work.of([(0, int(prompt))], 0, shape.arithmetic.windows)
    flops = questions * len(asked.rankings) * shape.arithmetic.forward(work)
    samples = sum(asked.num_samples if ranking == "sampled" else 1 for ranking in asked.rankings)
    written = questions * samples * completion
    hours = written / recipe.evaluation_tokens_per_second / 3600
    return {"tokens": questions * len(asked.rankings) * prompt + written, "FLOPs": flops, "GPU-hours": hours}


def _short(value: float | None) -> str:
    """Write a figure in at most five characters of digits; a dash for none."""
    if value is None:
        return "-"
    for size, name in ((1e15, ""), (1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value:.2g}" if not name else f"{value / size:,.3g}{name}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.0f}"
