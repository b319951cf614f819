"""`twice-rec cost RECIPE`: tokens, FLOPs, GPU-hours, API cost and disk of a domain's stages, before any of them runs.

Reads the recipes beside its own. A run that is prepared gives its own counts and lengths; for the others the recipe has
published statistics. Whatever is assumed is printed as such. `domain: all` prints one Markdown table of all domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twice_rec.cf.recipe import SOFTMAX_ITEMS, SASRecRecipe
from twice_rec.data.dataset import CATALOG, PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.evaluation.tables import show
from twice_rec.grpo import estimate as of_grpo
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.flops import Work
from twice_rec.llm.footprint import gpu_hours, read_shape
from twice_rec.markdown import markdown_table
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.recipe import Recipe, key, required, rule
from twice_rec.recipe_reader import describe_keys, load_recipe
from twice_rec.sft import estimate as of_sft
from twice_rec.sft.estimate import Estimate, Lengths, Population
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe
from twice_rec.stages.plan import hours_of

ALL = "all"
COUNTS = ("reviews", "products", "users", "items")
QUANTITIES = ("tokens", "FLOPs", "GPU-hours", "CPU-hours", "API cost", "disk, GB")
COLUMNS = {  # of the table of domains -> stage and quantity
    "users": ("prepare", "users"), "items": ("prepare", "items"), "stage 1, USD": ("rationales", "API cost"),
    "stage 2, tokens": ("sft", "tokens"), "stage 2, GPU-h": ("sft", "GPU-hours"),
    "stage 3, GPU-h, paper": ("grpo", "GPU-hours"), "stage 3, GPU-h, improved": ("grpo_improved", "GPU-hours"),
    "SASRec, CPU-h": ("sasrec", "CPU-hours"), "stage 4, GPU-h": ("evaluate", "GPU-hours"),
    "disk, GB": (ALL, "disk, GB"),
}  # fmt: skip
# GB: 25.6 M reviews are 11.4, 7.2 M products 18 (published); a user in all results takes 10 kB (data/ 4, assumed 6).
_REVIEW_GB, _PRODUCT_GB, _USER_GB = 450e-9, 2800e-9, 10e-6
_SASREC_ITEMS = 6149  # with which its speed was measured; a softmax over more takes longer
# Measured with 25,000 to 715,000 items: a sampled step takes .4 of that and grows, since Adam moves all embeddings.
_SAMPLED_ITEMS = 130_000
Stages = dict[str, dict[str, float]]  # stage -> quantity -> value


class CostRecipe(Recipe):
    """What is known and assumed of domains, for `twice-rec cost`."""

    domains: dict[str, dict[str, float]] = key(
        {}, "domain -> reviews and products of the raw files, users and items; what is not published is left out"
    )
    users_share: float = key(1.0, "share of these users that prepare.yaml keeps", gt=0, le=1)
    row_tokens: dict[str, list[float]] = required("task -> mean tokens of prompt and completion")
    annotation_tokens: list[float] = required("mean tokens of prompt and completion of stage 1")
    sasrec_epochs: float = key(30.0, "epochs after which patience ends SASRec's training; Grocery's", gt=0)
    sasrec_users_per_second: float = key(1370.0, "users of an epoch of SASRec per second and thread", gt=0)
    evaluation_tokens_per_second: float = key(1000.0, "tokens that stage 4 writes per second and GPU", gt=0)

    @rule
    def domains_have_counts(self) -> str | None:
        """Published counts are above 0, and whoever counts users counts items."""
        for domain, counts in self.domains.items():
            if not counts.keys() <= set(COUNTS) or ("users" in counts) != ("items" in counts):
                return (
                    f"domains has {', '.join(counts)} of {domain}; give some of {', '.join(COUNTS)}: both last or none"
                )
            if wrong := next((name for name, count in counts.items() if count < 1), None):
                return f"domains has {counts[wrong]:g} {wrong} of {domain}; a count is at least 1, or is left out"
        return None

    @rule
    def tokens_are_pairs(self) -> str | None:
        """Each task, and stage 1, has the tokens of a prompt and of a completion."""
        pairs = {"annotation_tokens": self.annotation_tokens}
        pairs |= {f"row_tokens of {task}": self.row_tokens.get(task, []) for task in of_sft.TASKS}
        for name, pair in pairs.items():
            if len(pair) != 2 or min(pair) <= 0:
                return f"{name} is {pair}; give two numbers above 0, the tokens of a prompt and of a completion"
        return None


def cost(words: Sequence[str]) -> None:
    """Print what each stage of the recipe's domain takes; for `domain: all`, a table of all domains.

    Raises:
        InputError: if a recipe is missing or wrong, or nothing is known of the domain.
    """
    if words and words[0] in ("--help", "-h"):
        show(f"usage: twice-rec cost RECIPE [--key value ...]\n\n{CostRecipe.__doc__}\n\n{describe_keys(CostRecipe)}")
        return
    if not words or words[0].startswith("-"):
        found = " ".join(words) or "no word"
        raise InputError(f"cost: expected RECIPE, such as recipes/amazon/cost.yaml, found {found}")
    recipe, folder = load_recipe(words[0], CostRecipe, words[1:]), Path(words[0]).parent
    if recipe.domain != ALL:
        stages, about = stages_of(recipe, folder, recipe.domain)
        rows = [[name, *(_short(figures.get(q)) for q in QUANTITIES)] for name, figures in stages.items()]
        show("\n\n".join([markdown_table(["stage", *QUANTITIES], rows), *about]))
        return
    every = {domain: stages_of(recipe, folder, domain)[0] for domain in recipe.domains}
    rows = [[d, *(_short(found.get(stage, {}).get(q)) for stage, q in COLUMNS.values())] for d, found in every.items()]
    show(markdown_table(["domain", *COLUMNS], rows))


def stages_of(recipe: CostRecipe, folder: Path, domain: str) -> tuple[Stages, list[str]]:
    """Return what each stage of a domain takes, and in words what that rests on."""
    sft = load_recipe(folder / "sft.yaml", SFTRecipe, ["--domain", domain], here=False)
    known, data = recipe.domains.get(domain, {}), Path(recipe.run_dir.replace("{domain}", domain)) / "data"
    raw = {"disk, GB": known.get("reviews", 0) * _REVIEW_GB + known.get("products", 0) * _PRODUCT_GB}
    if (data / CATALOG).exists():
        lengths, there, how = of_sft.measure(PreparedData(data), sft, sft.model_name_or_path)
        about = f"{there.users:,} users, {there.items:,} items and their prompts as {data} has them; tokens by {how}."
    elif "users" in known:
        lengths = {task: np.array([pair]) for task, pair in recipe.row_tokens.items()}
        users = max(1, round(known["users"] * recipe.users_share))
        there = Population(users, users, round(known["items"]))
        about = f"Assumed: {users:,} users ({recipe.users_share:.0%} of {known['users']:,.0f}), {there.items:,} items, "
        about += f"row_tokens {recipe.row_tokens}."
    elif known:
        return {"prepare": raw, ALL: raw}, ["The number of users is not known."]
    else:
        raise InputError(
            f"nothing is known of domain {domain}: prepare it first ({data} is not there), or add it to domains of the "
            f"recipe, which has {', '.join(recipe.domains)}"
        )
    stages = {"prepare": {"users": there.users, "items": there.items, **raw}}
    stages |= _stages(recipe, folder, domain, sft, lengths, there)
    stages[ALL] = {q: sum(found.get(q, 0) for found in stages.values()) for q in QUANTITIES}
    rates = (
        f"Assumed as well: {sft.gpu_utilization:.0%} of {sft.gpu_tflops:g} TFLOP/s; annotation_tokens "
        f"{recipe.annotation_tokens}; every rationale accepted; {recipe.evaluation_tokens_per_second:,.0f} tokens/s in "
        f"stage 4; {recipe.sasrec_epochs:g} epochs of SASRec, {recipe.sasrec_users_per_second:,.0f} users/s per thread."
        " The last row adds all up."
    )
    return stages, [about, rates]


def _stages(
    recipe: CostRecipe, folder: Path, domain: str, sft: SFTRecipe, lengths: Lengths, there: Population
) -> Stages:
    flags, shape = ["--domain", domain], read_shape(sft.model_name_or_path, sft)
    calls = load_recipe(folder / "rationales.yaml", RationalesRecipe, flags)
    asked = [count * min(there.users, calls.max_rationales or there.users) for count in recipe.annotation_tokens]
    disk = there.users * _USER_GB
    stages = {"rationales": {"tokens": sum(asked), "API cost": calls.cost(*asked), "disk, GB": disk}}

    def trained(of: SFTRecipe | SDPORecipe | GRPORecipe, found: Estimate) -> dict[str, float]:
        merged = 2e-9 * shape.parameters  # the model that the stage leaves, in bfloat16
        hours = hours_of(of, found)[2]
        return {"tokens": found.tokens, "FLOPs": found.flops, "GPU-hours": hours, "disk, GB": merged}

    stages["sft"] = trained(sft, of_sft.estimate(sft, shape, lengths, there))
    if (path := folder / "sdpo.yaml").exists():
        sdpo = load_recipe(path, SDPORecipe, flags, here=False)
        stages["sdpo"] = trained(sdpo, of_sft.estimate_preferences(sdpo, shape, lengths, there.users))
    for path in sorted(folder.glob("sasrec*.yaml")):
        cf = load_recipe(path, SASRecRecipe, flags)
        over_all = cf.loss == "softmax" or (cf.loss == "auto" and there.items <= SOFTMAX_ITEMS)
        slower = max(1.0, there.items / _SASREC_ITEMS if over_all else 0.4 + there.items / _SAMPLED_ITEMS)
        epochs = min(cf.epochs, recipe.sasrec_epochs) if cf.patience else cf.epochs
        seconds = there.users * epochs * cf.num_seeds * slower / recipe.sasrec_users_per_second
        stages[path.stem] = {"CPU-hours": seconds / 3600}
    for name in ("grpo", "grpo_improved"):
        grpo = load_recipe(folder / f"{name}.yaml", GRPORecipe, flags, here=False)
        stages[name] = trained(grpo, of_grpo.estimate(grpo, shape, lengths, there.users))
    # Each question is read once, and answered once by likelihood, num_samples times by votes.
    evaluated = load_recipe(folder / "evaluate.yaml", EvaluateRecipe, flags)
    questions = min(there.users, evaluated.num_users or there.users) * len(evaluated.variants) * len(evaluated.lists)
    prompt, completion = (float(part) for part in lengths["rationale"].mean(axis=0))
    flops = questions * shape.arithmetic.forward(Work.of([(0, int(prompt))], 0, shape.arithmetic.windows))
    samples = sum(evaluated.num_samples if ranking == "sampled" else 1 for ranking in evaluated.rankings)
    written = questions * samples * completion
    hours = gpu_hours(flops, sft) + written / recipe.evaluation_tokens_per_second / 3600
    stages["evaluate"] = {"tokens": questions * prompt + written, "FLOPs": flops, "GPU-hours": hours}
    return stages


def _short(value: float | None) -> str:
    """Write a figure with two or three digits that count; a dash for none."""
    if value is None:
        return "-"
    if value < 100 or value >= 1e13:
        return f"{value:.2g}"
    size, name = next((size, name) for size, name in ((1e9, " G"), (1e6, " M"), (1, "")) if value >= size)
    return f"{value / size:,.3g}{name}" if name else f"{value:,.0f}"
