"""The plan of a study: its runs, what each of them makes and waits for, and what several seeds share.

Every recipe is read with the class of its stage before anything runs, and all that is wrong is told together.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.recipe import HintConfig, SASRecRecipe
from twice_rec.data.dataset import KNOWN_SCORES
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.files import MANIFEST
from twice_rec.grpo.recipe import GRPORecipe, grpo_folder, is_grpo_variant
from twice_rec.masking import masked
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.recipe import Recipe
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe, is_sft_variant, sft_folder
from twice_rec.stages.command_line import STAGES
from twice_rec.study.links import check_link
from twice_rec.study.recipe import ENTRY, StudyRecipe

FIXED = {"prepare": "data", "report": "report"}  # stage -> its only folder
FIRST_SEED = ("evaluate", "report")  # stages that draw the same for all seeds: test users, resamples


@dataclass(frozen=True, eq=False)
class Run:
    """One process of a stage.

    Args:
        what: tells it from other runs of its stage, seed and domain: a variant; empty if there are none.
        recipe: the settings that it will have.
        words: recipe and flags of its command line.
        makes: results folders that it writes.
        reads: results folders that it needs; in the folder of its seed, where they may be links.
        links: name of a folder in run_dir -> the first seed's, which it is a link to.
        reports_on: run folders of all seeds, of a report; it runs once nothing else is left, whatever failed.
        sums_up: whether this report, that of the first of several domains, also has the table over all domains; it
            waits for the other domains' reports.
    """

    domain: str
    seed: int
    stage: str
    what: str
    recipe: Recipe
    words: tuple[str, ...]
    makes: tuple[Path, ...]
    reads: tuple[Path, ...]
    links: Mapping[str, Path] = field(default_factory=dict)
    reports_on: tuple[Path, ...] = ()
    sums_up: bool = False

    @property
    def run_dir(self) -> Path:
        """The folder of its seed."""
        return self.recipe.run_path

    @property
    def name(self) -> str:
        """Its name in logs and tables."""
        return " ".join(part for part in (self.domain, f"seed {self.seed}", self.stage, self.what) if part)

    def command(self, *more: str) -> list[str]:
        """Return the command line of its process."""
        return self._command(self.stage, more)

    def server_command(self, *more: str) -> list[str]:
        """Return the command line of its rollout servers."""
        return self._command("serve", more)

    def _command(self, stage: str, more: Sequence[str]) -> list[str]:
        words = [*self.words, *more]
        if self.reports_on:
            others = [str(path) for path in self.reports_on[1:] if any(path.glob(f"eval/*/{MANIFEST}"))]
            words += ["--other_runs", json.dumps(others)]
        return [sys.executable, "-m", "twice_rec", stage, *words]


def make_plan(study: StudyRecipe, here: bool = True) -> list[Run]:
    """Return all runs of a study, each behind those that it waits for.

    Args:
        here: whether this machine is to run them; if not, recipes for a GPU are read without one.

    Raises:
        InputError: one message with everything that is wrong with any recipe.
    """
    if not (folder := Path(study.recipes_dir).expanduser()).is_dir():
        raise InputError(f"recipes_dir is {folder}, which is no folder; name one with recipes, such as recipes/tiny")
    errors: list[str] = []
    runs: list[Run] = []
    domains = study.all_domains
    for domain in domains:
        for run in _of_domain(study, domain, len(domains) > 1, here, errors):
            of_makers = makers(runs)
            twin = next((of_makers[path] for path in run.makes if path in of_makers), None)
            if twin is None:
                runs.append(run)
            elif twin.words != run.words:
                path = next(path for path in run.makes if of_makers.get(path) is twin)
                errors.append(f"{path} is written by two different runs, {twin.name} and {run.name}")
    errors += _missing(runs) if not errors else []
    if errors:
        raise InputError("the study cannot be run\n" + "\n".join(dict.fromkeys(errors)))
    return _in_order(runs)


def _of_domain(study: StudyRecipe, domain: str, several: bool, here: bool, errors: list[str]) -> Iterator[Run]:
    folders = seed_folders(study, domain)
    first, *_ = folders
    shared: dict[str, Path] = {}
    for entry in study.entries():
        cls = recipe_class(entry["stage"])
        once, is_report = entry.get("once", False), entry["stage"] == "report"
        for seed, folder in list(folders.items())[: 1 if once or is_report else None]:
            path = Path(study.recipes_dir).expanduser() / entry.get("recipe", f"{entry['stage']}.yaml")
            for values in _one_variant_each(entry["stage"], _values(study, entry, domain, seed, first, folder)):
                words = flags_of(values)
                try:
                    recipe = load_recipe(path, cls, words, here)
                    links = {} if seed == first else shared  # which later entries add to
                    run = _run(domain if several else "", seed, entry, recipe, (str(path), *words), links, folders)
                    yield replace(run, sums_up=is_report and several and domain == study.all_domains[0])
                    if once and len(folders) > 1:
                        _check_shared(entry["stage"], recipe)
                        made = _makes(entry["stage"], recipe)
                        shared.update({path.name: path for path in made if path.parent == folder})
                except InputError as error:
                    errors.append(str(error))
                except (OSError, ValueError) as error:
                    errors.append(f"{path}: cannot be read: {error}")
    for folder in list(folders.values())[1:]:
        for name, target in shared.items():
            errors += check_link(folder / name, target)


def seed_folders(study: StudyRecipe, domain: str) -> dict[int, Path]:
    """Return seed -> its run folder, the first one first."""
    first = Path(study.run_dir.replace("{domain}", domain)).expanduser()
    seeds = range(study.seed, study.seed + study.seeds)
    return {seed: first if seed == study.seed else Path(f"{first}_seed{seed}") for seed in seeds}


def recipe_class(stage: str) -> type[Recipe]:
    """Return the class of a stage's recipes."""
    module = importlib.import_module(f"twice_rec.stages.{STAGES[stage][0]}")
    return module.main.recipe_class


def _values(
    study: StudyRecipe, entry: Mapping[str, Any], domain: str, seed: int, first: int, folder: Path
) -> dict[str, Any]:
    """Return the keys that an entry's run with one seed sets over its recipe's."""
    stage = entry["stage"]
    return {
        "run_dir": str(folder),
        "domain": domain,
        "seed": first if stage in FIRST_SEED else seed,
        **({"overwrite": True} if study.overwrite else {}),
        **({"wandb": study.wandb, "wandb_project": study.wandb_project} if study.wandb != "none" else {}),
        **({"wandb_group": study.wandb_group} if study.wandb_group else {}),
        **study.overrides.get(stage, {}),
        **{name: value for name, value in entry.items() if name not in ENTRY},
        **(entry.get("others", {}) if seed != first else {}),
    }


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    as_text = {
        name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in values.items()
    }
    return [word for name, text in as_text.items() for word in (f"--{name}", text)]


def _one_variant_each(stage: str, values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the keys of each run of an entry: of stage 4 one per variant, so that each waits for its own model only."""
    variants = values.get("variants")
    if stage != "evaluate" or not isinstance(variants, list):
        yield values
        return
    for variant in variants:
        yield {**values, "variants": [variant]}


def _run(
    domain: str,
    seed: int,
    entry: Mapping[str, Any],
    recipe: Recipe,
    words: tuple[str, ...],
    links: Mapping[str, Path],
    folders: Mapping[int, Path],
) -> Run:
    stage, reports_on = entry["stage"], ()
    makes = _makes(stage, recipe)
    reads = [recipe.run_path / name for name in (*_reads(stage, recipe), *entry.get("needs", ()))]
    if stage == "report":
        what, reports_on = "", tuple(folders.values())
    elif isinstance(recipe, EvaluateRecipe):
        what = " ".join(recipe.result_name(variant, recipe.rankings[0]) for variant in recipe.variants)
    else:
        what = str(getattr(recipe, "variant", ""))
    return Run(domain, seed, stage, what, recipe, words, tuple(makes), tuple(reads), links, reports_on)


def _makes(stage: str, recipe: Recipe) -> list[Path]:
    """The results folders that a run writes, the one with its manifest first."""
    if stage in FIXED:
        names = [FIXED[stage]]
    elif isinstance(recipe, RationalesRecipe):
        names = [recipe.variant]
    elif isinstance(recipe, (SFTRecipe, SDPORecipe, GRPORecipe)):
        names = [recipe.folder]
    elif isinstance(recipe, SASRecRecipe):
        names = [recipe.variant, *(f"eval/{name}" for name in (recipe.variant, *recipe.baselines))]
    elif isinstance(recipe, EvaluateRecipe):
        names = [f"eval/{name}" for name in rankings_of(recipe)]
    else:
        names = []
    return [recipe.run_path / name for name in names]


def rankings_of(recipe: EvaluateRecipe) -> dict[str, str | None]:
    """Return the name of each result of an evaluation -> how it is ranked; None for a score file."""
    files = [v for v in recipe.variants if v in KNOWN_SCORES or v in recipe.precomputed_scores]
    models = [v for v in recipe.variants if v not in files]
    asked: dict[str, str | None] = {recipe.result_name(v, r): r for v in models for r in recipe.rankings}
    return asked | dict.fromkeys(files)


def _reads(stage: str, recipe: Recipe) -> list[str]:
    """The results folders of its run folder that a run needs."""
    if stage == "prepare" or stage == "report":
        return []
    if isinstance(recipe, SFTRecipe):
        return ["data", recipe.rationales]
    if isinstance(recipe, SDPORecipe):
        return ["data", *(["sft"] if recipe.model_name_or_path is None else [])]
    if isinstance(recipe, GRPORecipe):
        start = ["sft"] if recipe.model_name_or_path is None else []
        return ["data", *start, *_cf_folder(recipe)]
    if isinstance(recipe, EvaluateRecipe):
        of_hints = _cf_folder(recipe) if recipe.cf_hints else []
        return ["data", *filter(None, map(_model_folder, recipe.variants)), *of_hints]
    return ["data"]


def _cf_folder(recipe: HintConfig) -> list[str]:
    return [recipe.cf_model] if recipe.cf_model not in BASELINES else []


def _model_folder(variant: str) -> str | None:
    if is_sft_variant(variant):
        return sft_folder(variant)
    return grpo_folder(variant) if is_grpo_variant(variant) else None


def _check_shared(stage: str, recipe: Recipe) -> None:
    if isinstance(recipe, SASRecRecipe) and recipe.held_out_prompts:
        raise InputError(
            f"{stage} is once, but its held_out_prompts of {recipe.held_out_prompts:g} keeps the prompts of seed "
            f"{recipe.seed} from SASRec, and stage 3 of another seed has other prompts; leave once out of this "
            "entry, or set held_out_prompts to 0"
        )


def makers(runs: Sequence[Run]) -> dict[Path, Run]:
    """Return results folder -> the run that makes it, also under the names of links to it."""
    found = {path: run for run in runs for path in run.makes}
    for run in runs:
        found |= {run.run_dir / name: found[target] for name, target in run.links.items() if target in found}
    return found


def _missing(runs: Sequence[Run]) -> list[str]:
    """A line about each results folder that is needed, is not there, and is made by no run."""
    made, lines = makers(runs), []
    for run in runs:
        for path in run.reads:
            if path not in made and not path.exists():
                lines.append(f"{run.name} needs {path}, which is not there, and no run of the study makes it")
    return lines


def waits_for(run: Run, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that must be done before one: those that make what it reads; of a report all of its domain.

    The report that sums up waits for the other domains' reports too.
    """
    if run.reports_on:
        of_domain = [o for o in runs if o is not run and o.domain == run.domain and not o.reports_on]
        return of_domain + [o for o in runs if run.sums_up and o.reports_on and o.domain != run.domain]
    made = makers(runs)
    return list(dict.fromkeys(made[path] for path in run.reads if path in made and made[path] is not run))


def _in_order(runs: Sequence[Run]) -> list[Run]:
    """Sort runs: seed by seed, each run behind those that it waits for, and reports last."""
    ordered: list[Run] = []
    domains = list(dict.fromkeys(run.domain for run in runs))
    by_seed = sorted(runs, key=lambda run: (bool(run.reports_on), domains.index(run.domain), run.seed))  # stable
    waiting = {run: waits_for(run, runs) for run in runs}

    def add(run: Run, behind: tuple[Run, ...]) -> None:
        if run in behind:
            raise InputError(masked(f"runs wait for each other: {' and '.join(r.name for r in behind)}; look at needs"))
        for other in waiting[run]:
            if other not in ordered:
                add(other, (*behind, run))
        if run not in ordered:
            ordered.append(run)

    for run in by_seed:
        add(run, ())
    return ordered
