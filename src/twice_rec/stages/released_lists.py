"""`twice-rec released_lists FOLDER`: what the test lists in the authors' released prompts have in common.

It reads `*_llm_test*.json` and the training sequences of one domain, writes nothing, and prints how many lists there
are, how many distractors they share, and the HR@1 of three scores that know nothing of the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from twice_rec.data.released_lists import SHARED, diagnose_source
from twice_rec.data.sources.release import ReleaseSource
from twice_rec.errors import InputError
from twice_rec.evaluation.tables import show
from twice_rec.markdown import markdown_table


def released_lists(words: Sequence[str]) -> None:
    """Print the diagnosis of the folder that the words of the command line name."""
    if not 1 <= len(words) <= 2 or words[0].startswith("-"):
        raise InputError(f"released_lists: expected FOLDER [DOMAIN], found {' '.join(words) or 'nothing'}")
    folder = Path(words[0])
    found = diagnose_source(ReleaseSource(folder, words[1] if len(words) > 1 else _domain(folder)))
    fewest, most = found.num_candidates
    lines = [
        f"{folder}: {found.num_lists} released test lists of {fewest if fewest == most else f'{fewest} to {most}'} "
        "candidates.",
        f"{len(found.pool)} items are in more than {SHARED:.0%} of the lists, {found.in_all} in all of them: the "
        f"shared pool. Its items have {found.pool_count:.1f} training interactions each, all items that occur "
        f"{found.catalog_count:.1f}.",
        f"{found.num_lists - found.targets_in_pool} of {found.num_lists} targets are not in the pool.",
    ]
    rows = [[name, f"{mean:.4f}", f"[{low:.4f}, {high:.4f}]"] for name, (mean, low, high) in found.hit_rates.items()]
    table = markdown_table(["score, which knows no user", "HR@1", "95 % interval"], rows)
    show("\n".join([*lines, "", table]))


def _domain(folder: Path) -> str:
    """Return the domain whose released test prompts are in the folder; InputError if there is none, or several."""
    names = sorted(path.name for path in folder.glob("amazon_*_llm_test*.json"))
    domains = sorted({name.removeprefix("amazon_").partition("_llm_test")[0] for name in names})
    if len(domains) != 1:
        what = f"test prompts of {', '.join(domains)}; name one domain" if domains else "no amazon_*_llm_test*.json"
        raise InputError(f"{folder}: {what}; expected: twice-rec released_lists FOLDER [DOMAIN]")
    return domains[0]
