"""The release's defects, each with figures counted on the authors' own files: what is not seen in them is in its code.

What takes the confidences of a SASRec is in `release_sasrec`. Every figure is counted anew, from the files alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twice_rec.answer_format import parse
from twice_rec.catalog import Outcome, normalised
from twice_rec.data.released_lists import diagnose
from twice_rec.data.sources.release import ReleasedPrompt, ReleaseSource
from twice_rec.evaluation.paper import TABLE_1
from twice_rec.grpo.rewards import RewardConfig, ScoredCompletion, tags, tags_release
from twice_rec.rationales.leaks import LEAKS, leaks_of

DEFECTS = {  # short name -> what the release does, in the order of the table
    "training": "SASRec learns little more than popularity",
    "popularity": "the confidence in the reward is mostly popularity",
    "tau": "tau .3 is passed by most random items",
    "memory": "SASRec is trained on the targets of GRPO's prompts",
    "pool": "all test lists share one pool of popular distractors",
    "own_items": "a distractor can be the user's own item",
    "table_1": "Table 1's CF rows are near or below random",
    "set": "answers pass through a set before they are ranked",
    "title": "an id decides a match, a title the confidence",
    "outside": "any title of the catalogue earns confidence",
    "failures": "any failure becomes reward 0",
    "padding": "the padding id 2 is a product; ids 1 and 2 never train",
    "evaluation": "GRPO is evaluated on prompts of its training set",
    "keys": "lambda, tau and the domain cannot be set",
    "tags": "six tags earn a quarter each",
    "lambda": "a group's deviation divides its rewards, and most of lambda",
    "leaks": "rationales give the answer away",
    "length": "answers end at 300 tokens",
    "curation": "GRPO's prompts are those of accepted rationales",
    "filter": "longer histories are left out, and no k-core follows",
}
IN_CODE = ("failures", "evaluation", "keys")  # no data shows them
HASH_SEEDS = 20  # with so many the order of sets is tried

_EPOCHS, _BATCH = 20, 2 * 2048  # of the release's SASRec
_ANSWERS = 5  # sampled per test prompt
_FEW = 5  # interactions: the k of the k-core of Amazon's 5-core sets
_TRAIN, _TEST = "llm_train_case_1", "llm_test"


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure of a defect.

    Args:
        defect: key of `DEFECTS`.
        counted: what was counted, and how.
        value: a count, or a mean or share; None if nothing was counted, and `counted` says why.
        of: for a count, among how many.
        ci95: 95 % bootstrap interval of a mean over users or lists.
    """

    defect: str
    counted: str
    value: float | None
    of: int | None = None
    ci95: tuple[float, float] | None = None

    def row(self) -> dict[str, Any]:
        """Return it as a row of JSON; what does not apply is left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {"defect": self.defect, "release": DEFECTS[self.defect], **values}


def _interval(low: float, high: float) -> tuple[float, float] | None:
    """Return an interval; None for values that are all the same, of which it says nothing."""
    return (low, high) if low < high else None


def in_table_order(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings by defect, and add a row without a figure for each defect that has none."""
    having = {finding.defect for finding in findings}
    why = {defect: "seen in its code alone" if defect in IN_CODE else "needs --run_dir" for defect in DEFECTS}
    without = [Finding(defect, why[defect], None) for defect in DEFECTS if defect not in having]
    order = list(DEFECTS)
    return sorted([*findings, *without], key=lambda finding: order.index(finding.defect))


def findings_in_files(source: ReleaseSource) -> list[Finding]:
    """Return every figure that the authors' files show.

    Raises:
        InputError: if prompts of a kind are missing, or are not as the authors released them.
    """
    train, test = source.sequences("train"), source.sequences("test")
    trained, asked = source.prompts(_TRAIN), source.prompts(_TEST)
    counts = Counter(item for sequence in train for item in sequence)
    answers = _of_answers(source, trained)  # raises for texts that cannot be counted, before what takes time
    steps = _EPOCHS * -(-len(train) // _BATCH)
    return [
        Finding("training", f"steps: {_EPOCHS} epochs of batches of {_BATCH:,} users", steps),
        *_of_memory(trained, train),
        *_of_pool(asked, counts),
        *_of_own_items(asked, trained, dict(zip(train, test, strict=False))),
        *_of_table_1(),
        *_of_sets(asked),
        *_of_titles(source, test),
        *_of_padding(source, test),
        *answers,
        *_of_curation(trained, train),
        *_of_filter(test),
    ]


def _of_memory(prompts: Sequence[ReleasedPrompt], train: Sequence[tuple[str, ...]]) -> list[Finding]:
    rows = set(train)
    same = sum((*prompt.history, prompt.target) in rows for prompt in prompts)
    return [Finding("memory", "prompts with a rationale that are rows of SASRec's training", same, len(prompts))]


def _of_pool(prompts: Sequence[ReleasedPrompt], counts: Counter[str]) -> list[Finding]:
    found = diagnose([(prompt.candidates, prompt.target) for prompt in prompts], counts)
    outside = found.num_lists - found.targets_in_pool
    return [
        Finding("pool", f"items that all {found.num_lists} test lists have", found.in_all),
        Finding("pool", "targets that are not in the pool", outside, found.num_lists),
        *(
            Finding("pool", f'HR@1 of the score "{name}"', mean, ci95=_interval(low, high))
            for name, (mean, low, high) in found.hit_rates.items()
        ),
        Finding("pool", "training interactions of an item of the pool, mean", found.pool_count),
        Finding("pool", "training interactions of any item, mean", found.catalog_count),
    ]


def _of_own_items(
    asked: Sequence[ReleasedPrompt], trained: Sequence[ReleasedPrompt], whole: Mapping[tuple[str, ...], Sequence[str]]
) -> list[Finding]:
    """Count candidates that are in the history, or that the user bought later.

    Args:
        whole: a user's training sequence -> the whole sequence.
    """

    def with_item(prompts: Sequence[ReleasedPrompt]) -> int:
        return sum(bool((set(prompt.candidates) - {prompt.target}) & set(prompt.history)) for prompt in prompts)

    def later(prompt: ReleasedPrompt) -> set[str]:
        sequence = whole.get((*prompt.history, prompt.target), ())
        return set(sequence[len(prompt.history) + 1 :]) - {prompt.target}

    buys_later = sum(bool(later(prompt) & set(prompt.candidates)) for prompt in trained)
    return [
        Finding("own_items", "test lists with an item of the history beside the target", with_item(asked), len(asked)),
        Finding("own_items", "training lists with one", with_item(trained), len(trained)),
        Finding("own_items", "training lists with an item that the user bought later", buys_later, len(trained)),
    ]


def _of_table_1() -> list[Finding]:
    random = 1 / 30  # of the paper's candidate lists
    below = sum(rows["sasrec"]["uniform/hr@1"] < random for rows in TABLE_1.values())
    return [Finding("table_1", "domains in which SASRec's HR@1 is below 1/30, a random ranking's", below, len(TABLE_1))]


def _of_sets(prompts: Sequence[ReleasedPrompt]) -> list[Finding]:
    """Rank answers that name the target first and other candidates after it, before and after they were in a set."""
    lists = [[p.target, *(item for item in p.candidates if item != p.target)][:_ANSWERS] for p in prompts]
    rates = []
    for seed in range(HASH_SEEDS):
        ordered = order_in_sets(lists, seed)
        rates.append(float(np.mean([items[0] == own[0] for items, own in zip(ordered, lists, strict=True)])))
    counted = f"HR@1 behind the set of {_ANSWERS} different answers, the target's first"
    return [
        Finding("set", f"{counted}: mean of {HASH_SEEDS} hash seeds", float(np.mean(rates))),
        Finding("set", "the same: lowest of them", min(rates)),
        Finding("set", "the same: highest of them", max(rates)),
    ]


def order_in_sets(lists: Sequence[Sequence[str]], seed: int) -> list[list[str]]:
    """Return the order in which a set of each list's strings is read, in a Python of its own with this hash seed."""
    script = "import json, sys; print(json.dumps([list(set(one)) for one in json.load(sys.stdin)]))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], input=json.dumps([list(one) for one in lists]), text=True,
        env={**os.environ, "PYTHONHASHSEED": str(seed)}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    ordered: list[list[str]] = json.loads(done.stdout)
    return ordered


def _of_titles(source: ReleaseSource, test: Sequence[Sequence[str]]) -> list[Finding]:
    titles = {item.item_id: normalised(item.title) for item in source.items(set())}
    having = Counter(title for title in titles.values() if title)
    targets = [titles[sequence[-1]] for sequence in test if sequence]
    shared = sum(having[title] > 1 for title in targets)
    return [
        Finding("title", "titles of several items, of which a look-up gives one", sum(n > 1 for n in having.values())),
        Finding("title", "test targets with such a title", shared, len(targets)),
    ]


def _of_padding(source: ReleaseSource, test: Sequence[Sequence[str]]) -> list[Finding]:
    first, second = (item for item in source.items(set())[:2])
    counts = Counter(item for sequence in test for item in sequence)
    targets = Counter(sequence[-1] for sequence in test if sequence)
    return [
        *(
            Finding("padding", f'interactions of id {number}, "{_shortened(item.title)}"', counts[item.item_id])
            for number, item in ((1, first), (2, second))
        ),
        Finding("padding", "test targets that are one of them", targets[first.item_id] + targets[second.item_id]),
    ]


def _shortened(title: str, words: int = 6) -> str:
    return " ".join(title.split()[:words])


def _of_answers(source: ReleaseSource, prompts: Sequence[ReleasedPrompt]) -> list[Finding]:
    """Count in the released answers with a rationale: what they give away, their words, what their tags earn."""
    items = {item.item_id: item for item in source.items(set())}
    rationales = source.rationales()
    leaks = Counter(leak for ids, text in rationales.items() for leak in leaks_of(text, items[ids[-1]]))
    words = [len(prompt.answer.split()) for prompt in prompts]
    answers = [ScoredCompletion(p.answer, parse(p.answer), Outcome.HIT, 0.0) for p in prompts]

    def earned(reward: Any) -> float:
        return float(np.mean([reward(answer, RewardConfig()) for answer in answers]))

    return [
        Finding("tags", "what the tags of a released answer earn there, mean", earned(tags_release)),
        Finding("tags", "what they earn by the paper's Eq. 4, mean", earned(tags)),
        *(Finding("leaks", f"rationales: one {says}", leaks[name], len(rationales)) for name, says in LEAKS.items()),
        Finding("length", "words of a released answer with its rationale, mean", float(np.mean(words))),
        Finding("length", "words of the longest one", max(words)),
    ]


def _of_curation(prompts: Sequence[ReleasedPrompt], train: Sequence[tuple[str, ...]]) -> list[Finding]:
    accepted, first = {(*prompt.history, prompt.target) for prompt in prompts}, train[: len(prompts)]
    kept = sum(sequence in accepted for sequence in first)
    return [Finding("curation", f"of the first {len(first)} users, those with a released rationale", kept, len(first))]


def _of_filter(test: Sequence[Sequence[str]]) -> list[Finding]:
    counts = Counter(item for sequence in test for item in sequence)
    lengths = Counter(len(sequence) for sequence in test if sequence)
    few = sum(count < _FEW for count in counts.values())
    least, most, users = min(lengths), max(lengths), sum(lengths.values())
    return [
        Finding("filter", "fewest interactions of a user", least),
        Finding("filter", f"users with {most} interactions, the most", lengths[most], users),
        Finding("filter", f"users with {most - 1}; a cut would leave more with {most}", lengths[most - 1], users),
        Finding("filter", f"items with fewer than {_FEW} interactions", few, len(counts)),
    ]
