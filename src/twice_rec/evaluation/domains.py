"""Several domains in one table, as in the paper's Table 1, from the `results.json` of each domain's report.

A domain's values are those of the users that its variants share. Reports can be in one table if their lists have as
many candidates and their language models were asked in the same way; else an error says how they differ. A model has a
mean over the domains only if it has a value in each of them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from twice_rec.data.dataset import SEQUENCES, PreparedData, candidates_file
from twice_rec.errors import InputError
from twice_rec.evaluation.claims import CONTRADICTED, NOT_RUN, NOT_SHOWN, SHOWN, counts
from twice_rec.evaluation.equals import Terms, labels
from twice_rec.evaluation.recipe import TERMS, ReportRecipe
from twice_rec.evaluation.report import Variant, read_variants
from twice_rec.evaluation.tables import in_order
from twice_rec.files import MANIFEST, read_json
from twice_rec.manifest import Hashes, Manifest, check_fresh, making_command, redo_command, stage_folder
from twice_rec.metrics import holm

RESULTS = "results.json"
METRICS_OF_TABLE_1 = ("hr@1", "hr@5", "ndcg@5")
MISSING, NOT_EVALUATED, OTHER_USERS = "missing", "not run", "other users"  # why a domain has no value of a variant
CLAIM = "table1_sasrec"  # the claim that the paper makes of every domain; see `claims.CLAIMS`
_ERROR = 0.05  # above it, one domain does not contradict a claim about all of them


class _Part(BaseModel):
    """A part of results.json, as far as the table reads it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class _Row(_Part):
    metrics: dict[str, float]
    ci95: dict[str, list[float]]
    n: int
    runs: int


class _Shared(_Part):
    n: int
    variants: dict[str, _Row]


class _Claim(_Part):
    id: str
    claim: str
    question: str
    short: str
    way: str
    metric: str
    verdict: str
    difference: float | None
    ci95: list[float] | None
    n: int | None
    runs: int | None
    p: float | None = None


class _Settings(_Part):
    metric: str
    candidates: dict[str, int]
    data: str | None
    asked: dict[str, dict[str, Any]]


class _About(_Part):
    domain: str


class Results(_Part):
    """What results.json holds, as far as the table reads it."""

    variants: dict[str, _Row]
    common_users: _Shared
    claims: list[_Claim]
    settings: _Settings
    manifest: _About


@dataclass(frozen=True)
class DomainReport:
    """The report of one domain."""

    path: Path  # of its results.json
    results: Results

    @property
    def domain(self) -> str:
        """Its domain."""
        return self.results.manifest.domain


def settings_of(variants: Mapping[str, Variant], data: PreparedData, recipe: ReportRecipe) -> dict[str, Any]:
    """Return what reports must have in common to be in one table, for results.json.

    `candidates` has the length of the first test user's lists; it is empty if the data is not there. `data` is the hash
    of the interactions, by which two names of one domain are known.
    """
    of_data = [of.terms[0].data().get(f"data/{SEQUENCES}") for of in variants.values()]
    there = (data.folder / candidates_file("test")).exists()
    first = next(iter(data.candidates("test")), None) if there else None
    return {
        "metric": recipe.comparison_metric,
        "candidates": {kind: len(items) for kind, items in first.lists.items()} if first else {},
        "data": next(filter(None, of_data), None),
        "asked": {name: dict(of.terms[0].asked) for name, of in variants.items() if of.terms[0].asked},
    }


def read_reports(folders: Iterable[str]) -> list[DomainReport]:
    """Read finished reports; each is named by its folder, by its results.json, or by the run folder that has it.

    Raises:
        InputError: if one is missing, stale, older than an evaluation of its run, or of another version.
    """
    return [_read(Path(name).expanduser()) for name in folders]


def _read(place: Path) -> DomainReport:
    run_dir = place.parent if place.name == "report" else place
    known = (place, place / RESULTS, place / "report" / RESULTS)
    path = next((path for path in known if path.is_file()), None)
    if path is None:
        raise InputError(
            f"domain_reports names {place}, where no report is finished; make it first: "
            f"{making_command(run_dir, 'report')}, or name its domain in missing_domains"
        )
    folder = stage_folder(path)
    check_fresh(path, Hashes())
    manifest = Manifest.load(folder) if folder else None
    redo = redo_command(folder, manifest) if folder and manifest else making_command(run_dir, "report")
    if folder and (newer := _newer_evaluation(folder)):
        raise InputError(f"{path} does not know {newer}, which is newer; make it again: {redo}")
    try:
        return DomainReport(path, Results.model_validate(read_json(path)))
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "all of it"
        raise InputError(
            f"{path} is not of this version's form ({where}: {fault['msg']}); make it again: {redo}"
        ) from None


def _newer_evaluation(folder: Path) -> Path | None:
    made = (folder / MANIFEST).stat().st_mtime_ns
    found = sorted(folder.parent.glob(f"eval/*/{MANIFEST}"))
    return next((path.parent for path in found if path.stat().st_mtime_ns > made), None)


def read_own(run_dirs: Sequence[Path], others: Sequence[DomainReport]) -> tuple[dict[str, Variant], list[str]]:
    """Return `read_variants`; nothing, and a line that says why, if the first run has nothing but others have reports.

    Then this run's domain is missing in the table.
    """
    try:
        return read_variants(run_dirs)
    except InputError as error:
        if not others:
            raise
        try:
            read_variants(run_dirs[:1])
        except InputError:
            return {}, [str(error)]
        raise


def check_reports(own: Mapping[str, Any] | None, others: Sequence[DomainReport], recipe: ReportRecipe) -> None:
    """Check that reports can be in one table.

    Args:
        own: this run's `settings_of`; None if it has no evaluation.

    Raises:
        InputError: if a domain is there twice, if two differ in metric, candidates or ranking, or if none has results.
    """
    places = {recipe.domain: "this run"}
    for report in others:
        if report.domain in places:
            raise InputError(
                f"{report.path} is of the domain {report.domain}, and so is {places[report.domain]}; a table has each "
                "domain once: leave one out of domain_reports"
            )
        places[report.domain] = str(report.path)
    if wrong := [domain for domain in recipe.missing_domains if domain in places]:
        raise InputError(f"missing_domains names {wrong[0]}, but {places[wrong[0]]} is of this domain; leave it out")
    if others and not own and not any(of.results.variants for of in others):
        raise InputError("no domain has a result: neither this run nor the reports in domain_reports have a variant")
    known = [(f"{recipe.domain} (this run)", _Settings.model_validate(own))] if own and others else []
    known += [(f"{of.domain} ({of.path})", of.results.settings) for of in others if of.results.variants]
    for (name, one), (other_name, other) in itertools.combinations(known, 2):
        if differs := _difference(one, other):
            raise InputError(f"{name} and {other_name} cannot be in one table: they have {differs}")


def _difference(one: _Settings, other: _Settings) -> str | None:
    """Return in words how two reports differ in metric, candidates or ranking; None if they are alike."""
    if one.metric != other.metric:
        return f"different comparison_metric ({one.metric} and {other.metric})"
    kind = one.metric.partition("/")[0]
    sizes = [settings.candidates.get(kind) for settings in (one, other)]
    if kind != "full" and None in sizes:
        return f"an unknown number of candidates, since data/ was not there; make both with data/candidates ({kind})"
    if sizes[0] != sizes[1] and kind != "full":
        return f"different candidates: {kind} lists of {sizes[0]} and of {sizes[1]}"
    for variant in one.asked.keys() & other.asked.keys():
        for name in TERMS:
            if (was := one.asked[variant].get(name)) != (now := other.asked[variant].get(name)):
                return f"{variant} with different {name} ({was} and {now})"
    return None


def domains_of(own: Mapping[str, Any], others: Sequence[DomainReport], recipe: ReportRecipe) -> dict[str, Any]:
    """Return the table over domains and the claim about all of them, for results.json.

    Args:
        own: this run's results; a domain whose results hold no variant is missing.

    Returns:
        `domains`, those with a report, in the order of the table; `missing`, those without; `reports`, where each was
        read; `metrics`, the columns; `users`, how many each domain has; `variants`: of each its values per domain, why
        it lacks others, and its mean, None if it lacks any; `same_data`, domains that are two names of one, so that
        nothing has a mean; `claims`, see `claims_over`.
    """
    kept = {name: own[name] for name in ("variants", "common_users", "claims", "settings")}
    as_read = json.loads(json.dumps({**kept, "manifest": {"domain": recipe.domain}}))
    ours = DomainReport(recipe.run_path / "report" / RESULTS, Results.model_validate(as_read))
    reports = {report.domain: report for report in (ours, *others) if report.results.variants}
    missing = [report.domain for report in (ours, *others) if not report.results.variants] + recipe.missing_domains
    kind = recipe.comparison_metric.partition("/")[0]
    metrics = [f"{kind}/{name}" for name in METRICS_OF_TABLE_1]
    same_data = _with_same_data(reports)
    asked = [report.results.settings.asked for report in reports.values()]
    terms = {name: Terms(Path(), of, {}) for settings in reversed(asked) for name, of in settings.items()}
    says = labels(terms)
    names = in_order(list(dict.fromkeys(name for report in reports.values() for name in report.results.variants)))
    claims = list(claims_over({domain: of.results.claims for domain, of in reports.items()}, missing))
    variants = {}
    for name in names:
        values, absent = {}, dict.fromkeys(missing, MISSING)
        for domain, report in reports.items():
            row, why = _values(report.results, name, metrics)
            values |= {domain: row} if row else {}
            absent |= {domain: why} if why else {}
        mean = None if absent or same_data else {key: _mean(values.values(), key) for key in metrics}
        row = {"domains": values, "absent": absent, "mean": mean}
        variants[name] = {**row, **({"asked": says[name]} if name in says else {})}
    return {
        "domains": list(reports),
        "missing": missing,
        "reports": {domain: str(report.path) for domain, report in reports.items()},
        "metrics": metrics,
        "users": {domain: report.results.common_users.n for domain, report in reports.items()},
        "variants": variants,
        "same_data": same_data,
        "claims": claims if not same_data else [{**claim, "mean": None, "ci95": None} for claim in claims],
    }


def _with_same_data(reports: Mapping[str, DomainReport]) -> list[str]:
    """Return the domains whose data is that of another one too."""
    data = {domain: report.results.settings.data for domain, report in reports.items()}
    return [domain for domain, of in data.items() if of is not None and list(data.values()).count(of) > 1]


def _values(results: Results, name: str, metrics: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Return a variant's values in one domain, or None and why there are none."""
    row = results.common_users.variants.get(name)
    if row is not None and all(key in row.metrics for key in metrics):
        kept = {key: row.metrics[key] for key in metrics}
        return {"metrics": kept, "ci95": {key: row.ci95[key] for key in metrics}, "n": row.n, "runs": row.runs}, ""
    alone = results.variants.get(name)
    is_there = row is None and alone is not None and metrics[0] in alone.metrics
    return None, OTHER_USERS if is_there else NOT_EVALUATED


def _mean(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, Any]:
    rows = list(rows)
    mean, interval = mean_of([row["metrics"][key] for row in rows], [row["ci95"][key] for row in rows])
    return {"mean": mean, "ci95": interval}


def mean_of(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
    """Return the mean of independent values, each domain counting the same, and its 95 % interval.

    The distances of the values from their bounds are added as squares (Zou and Donner 2008, "MOVER").
    """
    number, mean = len(values), sum(values) / len(values)
    below = math.hypot(*(value - low for value, (low, _) in zip(values, intervals, strict=True))) / number
    above = math.hypot(*(high - value for value, (_, high) in zip(values, intervals, strict=True))) / number
    return mean, [mean - below, mean + above]


def claims_over(claims: Mapping[str, Sequence[_Claim]], missing: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the claim about all domains, once per ranking of the language models: a row per domain, and a verdict.

    Args:
        claims: domain -> the claims of its report.
        missing: domains without a report.
    """
    found: dict[str, dict[str, _Claim]] = {}
    for domain, rows in claims.items():
        for row in rows:
            if row.claim == CLAIM:
                found.setdefault(row.id, {})[domain] = row
    for claim_id, by_domain in found.items():
        first = next((row for row in by_domain.values() if row.verdict != NOT_RUN), next(iter(by_domain.values())))
        rows = [_in_domain(domain, by_domain.get(domain)) for domain in claims]
        rows += [_in_domain(domain, None, MISSING) for domain in missing]
        ran = [row for row in rows if row["verdict"] != NOT_RUN]
        for row, adjusted in zip(ran, holm([row["p"] for row in ran]), strict=True):
            row["p_holm"] = float(adjusted)
        mean, interval = None, None
        if len(ran) == len(rows):
            mean, interval = mean_of([row["difference"] for row in rows], [row["ci95"] for row in rows])
        yield {
            "id": claim_id, "question": first.question, "short": first.short, "way": first.way, "metric": first.metric,
            "domains": rows, "counts": counts(rows), "verdict": in_all(rows), "mean": mean, "ci95": interval,
        }  # fmt: skip


def _in_domain(domain: str, row: _Claim | None, why: str = NOT_EVALUATED) -> dict[str, Any]:
    if row is None or row.verdict == NOT_RUN or row.p is None:
        nothing = dict.fromkeys(("difference", "ci95", "n", "runs", "p", "p_holm"))
        return {"domain": domain, "verdict": NOT_RUN, "why": why, **nothing}
    kept = {name: getattr(row, name) for name in ("verdict", "difference", "ci95", "n", "runs", "p")}
    return {"domain": domain, **kept, "p_holm": None}


def in_all(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdict on a claim about all domains.

    It is shown if it is shown in each. It is contradicted if one domain contradicts it, also with the p-value that
    accounts for the number of domains. Else it is not run if a domain was not run, or not shown.
    """
    if any(row["verdict"] == CONTRADICTED and row["p_holm"] <= _ERROR for row in rows):
        return CONTRADICTED
    if all(row["verdict"] == SHOWN for row in rows):
        return SHOWN
    return NOT_RUN if any(row["verdict"] == NOT_RUN for row in rows) else NOT_SHOWN
