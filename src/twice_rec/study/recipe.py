"""The settings of a study: which runs of which stages, over which seeds and domains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twice_rec.recipe import Recipe, key, required, rule
from twice_rec.stages.command_line import STAGES

# Keys of an entry in `runs` that are the study's own -> the type of their values; all others are the stage's.
ENTRY: Mapping[str, type] = {
    "stage": str, "recipe": str, "part": str, "once": bool, "others": dict, "needs": list,
}  # fmt: skip
SET_BY_THE_STUDY = (
    "run_dir", "domain", "seed", "overwrite", "other_runs", "domain_reports", "missing_domains", "rollout_servers",
)  # fmt: skip
NOT_RUN = ("serve", "study")  # stages that a study does not run by themselves


class StudyRecipe(Recipe):
    """A study: the variants of the paper's questions over several seeds, as one plan of runs of the other stages.

    The first seed's results are in run_dir, those of seed N in <run_dir>_seedN. Test users and their lists are those of
    the first seed everywhere.
    """

    seeds: int = key(3, "trainings of each variant, with seed, seed + 1, ...", ge=1, le=100)
    domains: list[str] | None = key(
        None, "domains of the study, each in its own run_dir, in which {domain} is replaced; null for domain alone"
    )
    recipes_dir: str = required("folder of the recipes that runs names")
    parts: list[str] = required("which parts of runs are run; runs without a part always are")
    overrides: dict[str, dict[str, Any]] = key(
        {}, "stage -> keys that all its runs get: {prepare: {synthetic_users: 1500}, grpo: {max_steps: 4}}"
    )
    runs: list[dict[str, Any]] = required(
        "the runs, each with its stage and: recipe, a file in recipes_dir (else STAGE.yaml); part; once: true if all "
        "seeds share its results; others, keys for all seeds but the first; needs, results that it waits for; and any "
        "keys of the stage"
    )
    processes: int | None = key(
        None, "runs at the same time; null for one per GPU, or one per core without a GPU", ge=1, le=1024
    )

    @property
    def all_domains(self) -> list[str]:
        """The domains of the study."""
        return self.domains or [self.domain]

    @property
    def run_path(self) -> Path:
        """The run folder of the first seed of the first domain."""
        return Path(self.run_dir.replace("{domain}", self.all_domains[0])).expanduser()

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of `runs` that belong to the study."""
        for entry in self.runs:
            if entry.get("part") is None or entry["part"] in self.parts:
                yield entry

    @rule
    def runs_are_entries(self) -> str | None:
        if not self.runs:
            return "runs is empty; there is nothing to do"
        stages = [name for name in STAGES if name not in NOT_RUN]
        for number, entry in enumerate(self.runs, start=1):
            where = f"entry {number} of runs"
            if entry.get("stage") not in stages:
                return f"{where} has the stage {entry.get('stage')!r}; it must be one of {', '.join(stages)}"
            for name, kind in ENTRY.items():
                if name in entry and not isinstance(entry[name], kind):
                    return f"{where} has {name} {entry[name]!r}; it must be a {kind.__name__}"
            if not all(isinstance(name, str) for name in (*entry.get("needs", ()), *entry.get("others", ()))):
                return f"{where} has needs or others that are not names"
            if taken := [name for name in SET_BY_THE_STUDY if name in entry or name in entry.get("others", {})]:
                return f"{where} has {taken[0]}, which the study sets itself; leave it out"
        return None

    @rule
    def parts_are_known(self) -> str | None:
        known = list(dict.fromkeys(entry["part"] for entry in self.runs if isinstance(entry.get("part"), str)))
        if unknown := [part for part in self.parts if part not in known]:
            return f"parts names {', '.join(unknown)}; runs has {', '.join(known) or 'no parts'}"
        return None

    @rule
    def overrides_are_of_stages(self) -> str | None:
        for stage, values in self.overrides.items():
            if stage not in STAGES or stage in NOT_RUN:
                return f"overrides names {stage!r}, which is no stage that a study runs"
            if taken := [name for name in SET_BY_THE_STUDY if name in values]:
                return f"overrides of {stage} has {taken[0]}, which the study sets itself; use the study's own keys"
        return None

    @rule
    def domains_have_folders(self) -> str | None:
        if self.domains is None:
            return None
        if not self.domains or len(set(self.domains)) < len(self.domains):
            return "domains is empty or names one twice"
        if len(self.domains) > 1 and "{domain}" not in self.run_dir:
            return f"run_dir is {self.run_dir} for {len(self.domains)} domains; put {{domain}} into it"
        return None
