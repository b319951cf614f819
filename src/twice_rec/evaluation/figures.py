"""The report's figures: what each shows. A function returns None if its data is not there; `drawing` draws and saves.

`results` is what `results.json` holds. Figures over variants take the users that all of them share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twice_rec.evaluation.calibration import Calibration
from twice_rec.evaluation.curves import LOGGED, Curves, smoothed
from twice_rec.evaluation.drawing import FAINT, LINES, MARKERS, ON_SERIES, SERIES, Chart, intervals, line_of
from twice_rec.evaluation.names import CEILING, RANKINGS, chosen, group_of, metric_name, metric_with_list, variant_name
from twice_rec.evaluation.tables import Table
from twice_rec.evaluation.trials import Judged, Value

Results = Mapping[str, Any]

# Stages A to E in the order that the paper reports, the lowest first -> their label on the axis.
STAGES = {
    "base": "A\nbase", "stage3_C": "C\nstage 3\nalone", "stage2": "B\nstage 2", "stage3_D": "D\nmatch\nreward",
    "stage3": "E\nall of it", "sasrec": "SASRec",
}  # fmt: skip
_RATIONALES = {
    "stage2": "A: stage 2\nwith\nrationale", "stage2_item_only": "B: stage 2\nitem\nalone",
    "stage2_no_rationale": "C: trained\nwithout", "stage3": "A: stage 3\nwith\nrationale",
    "stage3_item_only": "B: stage 3\nitem\nalone",
}  # fmt: skip
_LAMBDAS = {value: "stage3" if value == 3 else f"stage3_lambda{value}" for value in range(6)}
_MOST_LINES = 6

# Suffix of a second ranking -> what readers see of the first and of it.
_SECOND = {f"_{second}": (RANKINGS[first], RANKINGS[second]) for first, second in itertools.permutations(RANKINGS, 2)}


def shared(results: Results) -> Mapping[str, Mapping[str, Any]]:
    """Return the summary of the users that all variants share, or else of all users."""
    return results["common_users"]["variants"] or results["variants"]


def _values(results: Results, names: Mapping[Any, str], metric: str, suffix: str = "") -> dict[Any, Value]:
    """Return key -> mean and interval, for those of some variants that have the metric."""
    summary = shared(results)
    found = {}
    for at, name in names.items():
        row = summary.get(name if name == "sasrec" else name + suffix, {"metrics": {}})
        if metric in row["metrics"]:
            found[at] = {"mean": row["metrics"][metric], "ci95": row["ci95"][metric]}
    return found


def _rankings(results: Results, names: Mapping[Any, str], metric: str) -> dict[str, dict[Any, Value]]:
    """Return name of the ranking -> its values: of the first one, and of a second one if it has two values or more."""
    of_first = _values(results, names, metric)
    for suffix, both in _SECOND.items():
        found = _values(results, {at: name for at, name in names.items() if name != "sasrec"}, metric, suffix)
        if len(found) >= 2:
            return dict(zip(both, (of_first, found), strict=True))
    return {"": of_first}


def first(rankings: Mapping[str, dict[Any, Value]]) -> dict[Any, Value]:
    """Return the values of the first ranking."""
    return next(iter(rankings.values()))


def _with_interval(value: Value) -> str:
    return "{:.4f} [{:.4f}, {:.4f}]".format(value["mean"], *value["ci95"])


def _ceilings(results: Results, metric: str) -> list[tuple[str, float]]:
    return [
        (variant_name(name).removeprefix("Ceiling: "), row["metrics"][metric])
        for name, row in shared(results).items()
        if group_of(name) == CEILING and metric in row["metrics"]
    ]


def _points(
    names: Mapping[Any, str],
    labels: Sequence[str],
    rankings: Mapping[str, Mapping[Any, Value]],
    lines: Any,
    metric: str,
) -> Callable[[Any], None]:
    """Return what draws means with intervals over named places, a series per ranking, and horizontal lines."""
    keys = list(names)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (says, found) in enumerate(rankings.items()):
            places = [keys.index(at) + 0.16 * number for at in found]
            intervals(axes, places, list(found.values()), number, says)
        for number, (says, height) in enumerate(lines):
            line_of(axes, height, says, number)
        axes.set_xticks(range(len(keys)), labels)
        axes.set_xlim(-0.5, len(keys) - 0.3)
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(metric_name(metric))
        if len(rankings) > 1:
            axes.legend(loc="best")

    return draw


def _table(names: Mapping[Any, str], rankings: Mapping[str, Mapping[Any, Value]], heading: str) -> Table:
    rows = [
        [variant_name(name), *(_with_interval(of[at]) if at in of else "-" for of in rankings.values())]
        for at, name in names.items()
        if any(at in of for of in rankings.values())
    ]
    return [heading, *(says or "Value with 95 % interval" for says in rankings)], rows


def _says(names: Mapping[Any, str], found: Mapping[Any, Value]) -> str:
    return "; ".join(f"{variant_name(names[at])} {value['mean']:.3f}" for at, value in found.items())


def stages(results: Results, metric: str) -> Chart | None:
    """Stages A to E and SASRec, with the ceilings as lines."""
    order = {name: name for name in STAGES}
    rankings = _rankings(results, order, metric)
    if len(first(rankings).keys() - {"sasrec"}) < 2:
        return None
    names = {name: name for name in STAGES if any(name in of for of in rankings.values())}
    lines = _ceilings(results, metric)
    table = _table(names, rankings, "Variant")
    table[1].extend([f"Ceiling: {says}", f"{height:.4f}", *([""] * (len(rankings) - 1))] for says, height in lines)
    return Chart(
        "stages", "What each stage adds",
        f"{metric_with_list(metric)}, with 95 % intervals, in the order that the paper reports, its lowest first."
        + (" Lines: the best ranking that such knowledge allows." if lines else ""),
        _says(names, first(rankings)),
        _points(names, [STAGES[name] for name in names], rankings, lines, metric), table,
    )  # fmt: skip


def lambdas(results: Results, metric: str) -> Chart | None:
    """Stage 3 by lambda; stage 2 as a line."""
    rankings = _rankings(results, _LAMBDAS, metric)
    if len(first(rankings)) < 2:
        return None
    names = {at: name for at, name in _LAMBDAS.items() if any(at in of for of in rankings.values())}
    before = shared(results).get("stage2", {"metrics": {}})["metrics"].get(metric)
    lines = [] if before is None else [("stage 2", before)]
    return Chart(
        "lambda", "The weight of the confidence, lambda",
        f"Stage 3: {metric_with_list(metric)}, with 95 % intervals. The paper: rises to 3, then falls slightly.",
        _says(names, first(rankings)), _points(names, [str(at) for at in names], rankings, lines, metric),
        _table(names, rankings, "Lambda"),
    )  # fmt: skip


def rationales(results: Results, metric: str) -> Chart | None:
    """The same models with a rationale and asked for the item alone; a model trained without."""
    order = {name: name for name in _RATIONALES}
    rankings = _rankings(results, order, metric)
    found = first(rankings)
    if not found.keys() & {"stage2_item_only", "stage3_item_only", "stage2_no_rationale"} or len(found) < 2:
        return None
    names = {name: name for name in order if any(name in of for of in rankings.values())}
    return Chart(
        "rationales", "Rationales on and off",
        f"{metric_with_list(metric)}, with 95 % intervals. A writes a rationale first; B is the same model, asked for "
        "the item alone; C was trained without rationales.",
        _says(names, found), _points(names, [_RATIONALES[name] for name in names], rankings, [], metric),
        _table(names, rankings, "Variant"),
    )  # fmt: skip


def training(curves: Mapping[str, Curves]) -> Chart | None:
    """What stage 3 logged at each step, smoothed."""
    names = chosen([name for name, of in curves.items() if len(of.steps) >= 2], _MOST_LINES)
    keys = [key for key in LOGGED if any(key in curves[name].values for name in names)]
    if not names or not keys:
        return None
    widths = {name: max(1, len(curves[name].steps) // 12) for name in names}

    def draw(figure: Any) -> None:
        panels = figure.subplots((len(keys) + 1) // 2, 2, squeeze=False)
        for axes, key in zip(panels.flat, keys, strict=False):
            for number, name in enumerate(names):
                if key in curves[name].values:
                    values = smoothed(curves[name].values[key], widths[name])
                    axes.plot(
                        curves[name].steps, values, color=SERIES[number], linestyle=LINES[number],
                        label=variant_name(name),
                    )  # fmt: skip
            axes.set_title(LOGGED[key])
            axes.locator_params(nbins=5)
        for axes in panels.flat[len(keys) :]:
            axes.set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)

    rows = [
        [variant_name(name), LOGGED[key], *(f"{smoothed(of, widths[name])[at]:.4g}" for at in (0, -1))]
        for name in names
        for key, of in curves[name].values.items()
    ]
    ends = "; ".join(f"{row[0]}, {row[1]}: from {row[2]} to {row[3]}" for row in rows[: len(keys)])
    return Chart(
        "training", "Stage 3 in training",
        "What the trainer logged per step, a moving average over a twelfth of the steps; means over seeds.",
        ends, draw, (["Variant", "Logged", "At the start", "At the end"], rows),
        height=0.6 + 1.4 * ((len(keys) + 1) // 2),
    )  # fmt: skip


def calibration(found: Calibration | None) -> Chart | None:
    """Confidence against the share of targets, before and after calibration."""
    if found is None:
        return None
    both = {"as the paper has it: sigmoid": found.before, "calibrated on validation": found.after}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":", label="confidence = share")
        for number, (says, of) in enumerate(both.items()):
            axes.plot(
                of.confidence, of.share, color=SERIES[number], marker=MARKERS[number], linestyle=LINES[number],
                label=says,
            )  # fmt: skip
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="mean confidence", ylabel="share that is the target")
        axes.legend(loc="upper left")

    rows = [
        [says, f"{confidence:.3f}", f"{share:.3f}", f"{count:,}"]
        for says, of in both.items()
        for confidence, share, count in zip(of.confidence, of.share, of.count, strict=True)
    ]
    apart = f"{found.before.error:.3f} before and {found.after.error:.3f} after calibration"
    return Chart(
        "calibration", "What a confidence of the CF model means",
        f"Candidates of {found.users:,} test users, {found.kind} lists, in tenths of {variant_name(found.model)}'s "
        "confidence. "
        f"On average, confidence and share are {apart} apart.",
        f"Confidence and share are {apart} apart.", draw,
        (["Confidence", "Mean", "Share of targets", "Candidates"], rows),
    )  # fmt: skip


def by_group(results: Results, metric: str, key: str) -> Chart | None:
    """Hits by history length or by target popularity, a line per variant."""
    groups = [row for row in results.get("groups", {}).get(key, []) if row.get("variants")]
    name = metric.rpartition("/")[2]
    having = [v for v in in_groups(groups) if all(_of_group(row, v, name, metric) for row in groups)]
    names = chosen([v for v in having if group_of(v) != CEILING], _MOST_LINES)
    if len(groups) < 2 or not names:
        return None
    title = {"history_length": "Hits by history length", "target_popularity": "Hits by popularity of the target"}[key]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, variant in enumerate(names):
            values = [_of_group(row, variant, name, metric) for row in groups]
            places = [place + 0.06 * (number - len(names) / 2) for place in range(len(groups))]
            intervals(axes, places, values, number, variant_name(variant))
            axes.plot(places, [value["mean"] for value in values], color=SERIES[number], linestyle=LINES[number])
        axes.set_xticks(range(len(groups)), [f"{row['label']}\n{row['n']:,} users" for row in groups])
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(metric_name(metric))
        figure.legend(loc="outside lower center", ncols=2)

    rows = [
        [str(row["label"]), f"{row['n']:,}", *(_with_interval(_of_group(row, v, name, metric)) for v in names)]
        for row in groups
    ]
    unit = "interactions before the target" if key == "history_length" else "training interactions of the target"
    return Chart(
        key.replace("_", "-"), title, f"{metric_with_list(metric)}, with 95 % intervals; groups of {unit}.",
        "; ".join(f"{row[0]}: {variant_name(names[-1])} {row[-1]}" for row in rows), draw,
        ([unit.capitalize(), "Users", *map(variant_name, names)], rows), height=3.4,
    )  # fmt: skip


def in_groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the variants of some groups, in order."""
    return list(dict.fromkeys(name for row in groups for name in row["variants"]))


def _of_group(row: Mapping[str, Any], variant: str, name: str, metric: str) -> Value:
    """Return the value of a variant in a group; empty if it has none. A group may name the metric with its list."""
    values = row["variants"].get(variant, {})
    return values.get(metric) or values.get(name) or {}


def position(results: Results, places: Mapping[str, Sequence[int]]) -> Chart | None:
    """How often each place of the list is chosen, a line per variant."""
    measured = {name: of["by_place"] for name, of in results.get("position", {}).items() if of.get("by_place")}
    counted = {name: [count / sum(of) for count in of] for name, of in places.items() if sum(of)}
    shares = measured or counted
    names = chosen(list(shares), _MOST_LINES)
    if not names:
        return None
    length = max(len(shares[name]) for name in names)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(1 / length, color=FAINT, linewidth=1, linestyle=":", label="if places made no difference")
        for number, name in enumerate(names):
            axes.plot(
                range(1, len(shares[name]) + 1), shares[name], color=SERIES[number], marker=MARKERS[number],
                linestyle=LINES[number], label=variant_name(name),
            )  # fmt: skip
        axes.set(xlabel="place in the list, as the prompt shows it", ylabel="share of first choices")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=2)

    changes = "; ".join(
        f"{variant_name(name)}: in {of['k']} orders, {of['changes']:.1%} of choices change"
        for name, of in results.get("position", {}).items()
        if "changes" in of
    )
    rows = [[variant_name(name), *(f"{share:.3f}" for share in shares[name])] for name in names]
    first = "; ".join(f"{variant_name(name)} chooses the first place in {shares[name][0]:.3f}" for name in names)
    return Chart(
        "position", "Does the place in the list matter?",
        "Candidates are listed in random order, so each place should be chosen equally often"
        + (f". {changes}." if changes else f"; of {sum(places.get(names[0], [])):,} lists."),
        first, draw, (["Variant", *(f"Place {place}" for place in range(1, length + 1))], rows), height=3.4,
    )  # fmt: skip


_SCORES = ("0: not in the catalogue", "1: insufficient", "2: acceptable", "3: satisfying")
_OF_SCORES = (SERIES[1], SERIES[4], SERIES[5], SERIES[0])


def judged(found: Mapping[str, Sequence[Judged]]) -> Chart | None:
    """What judges said of each variant's rationales: the share of each score, with another user's as a control."""
    rows = [
        (variant, of.judge, of.condition, of.distribution)
        for variant, judges in found.items()
        for of in judges
        if of.condition in ("item_shown", "counterfactual") and sum(of.distribution)
    ]
    if not rows:
        return None
    control = {"item_shown": "", "counterfactual": ", control"}
    labels = [f"{variant_name(variant)}{control[condition]}\n{judge}" for variant, judge, condition, _ in rows]
    shares = [[count / sum(of) for count in of] for *_, of in rows]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for score, says in enumerate(_SCORES):
            left = [sum(of[:score]) for of in shares]
            widths = [of[score] for of in shares]
            axes.barh(range(len(rows)), widths, left=left, color=_OF_SCORES[score], label=says, height=0.62)
            for place, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width >= 0.07:
                    axes.text(
                        start + width / 2, place, f"{width:.0%}", ha="center", va="center", color=ON_SERIES, fontsize=8
                    )
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share of rationales")
        axes.grid(visible=False)
        figure.legend(loc="outside lower center", ncols=2)

    table = [
        [label.replace("\n", "; "), *(f"{share:.3f}" for share in of), f"{sum(row[-1]):,}"]
        for label, of, row in zip(labels, shares, rows, strict=True)
    ]
    return Chart(
        "judged", "How good are the rationales?",
        "Scores of judges; the paper reports score 3 for 75.71 %, by another judge. The control is another user's "
        "rationale: a judge that reads should score it lower.",
        "; ".join(f"{label}: score 3 for {of[-1]:.1%}" for label, of in zip(labels, shares, strict=True)),
        draw, (["Rationales", *_SCORES, "Number"], table), height=1.3 + 0.5 * len(rows),
    )  # fmt: skip
