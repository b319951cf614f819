"""`twice-rec release FOLDER [DOMAIN] [--run_dir RUN] [--quote FILE]`: the release's defects, counted in its own files.

FOLDER holds the authors' JSON files. It prints one table: what the release does, what was counted, the figure. Some
figures take the confidences of a SASRec with the release's settings: RUN is prepared from the same files, and
`bash sasrec.sh recipes/grocery/sasrec_release.yaml` has run in it. FILE gets what documents quote, as JSON.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twice_rec.data.sources.release import ReleaseSource
from twice_rec.errors import InputError
from twice_rec.evaluation.quotation import provenance, short
from twice_rec.evaluation.release import findings_in_files, in_table_order
from twice_rec.evaluation.release_sasrec import SASREC, files_of_run, findings_of_sasrec
from twice_rec.evaluation.sheets import defect_rows
from twice_rec.evaluation.tables import show
from twice_rec.files import write_json
from twice_rec.manifest import Manifest, held
from twice_rec.markdown import markdown_table

_USAGE = "FOLDER [DOMAIN] [--run_dir RUN] [--quote FILE]"
_FLAGS = ("--run_dir", "--quote")


def release(words: Sequence[str]) -> None:
    """Print, and perhaps write, what the words of the command line ask for."""
    folder, domain, run_dir, quote = _read(words)
    files = [] if run_dir is None else files_of_run(run_dir)
    source = ReleaseSource(folder, domain)
    findings = findings_in_files(source)
    if run_dir is not None:
        with held(files):
            findings += findings_of_sasrec(source, run_dir)
    rows = [short(finding.row()) for finding in in_table_order(findings)]
    if quote is not None:
        write_json(quote, {"about": _about(words, domain, run_dir), "defects": rows})
    show(markdown_table(*defect_rows(rows), texts=2))


def _read(words: Sequence[str]) -> tuple[Path, str, Path | None, Path | None]:
    """Return folder, domain, run and file of the command line; InputError if it is not as `_USAGE` says."""
    names, flags = list[str](), dict[str, Path]()
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word in _FLAGS and remaining and not remaining[0].startswith("--"):
            flags[word] = Path(remaining.pop(0)).expanduser()
        elif word.startswith("-"):
            what = "a value behind it" if word in _FLAGS else " or ".join(_FLAGS)
            raise InputError(f"release: found {word}, expected {what}: twice-rec release {_USAGE}")
        else:
            names.append(word)
    if not 1 <= len(names) <= 2:
        raise InputError(f"release: expected {_USAGE}, found {' '.join(words) or 'nothing'}")
    quote = flags.get("--quote")
    if quote is not None and quote.is_dir():
        raise InputError(f"release: --quote {quote} is a folder; give the name of a JSON file")
    folder = Path(names[0])
    return folder, names[1] if len(names) > 1 else _domain(folder), flags.get("--run_dir"), quote


def _domain(folder: Path) -> str:
    """Return the domain whose released test prompts are in the folder; InputError if there is none, or several."""
    names = sorted(path.name for path in folder.glob("amazon_*_llm_test*.json"))
    domains = sorted({name.removeprefix("amazon_").partition("_llm_test")[0] for name in names})
    if len(domains) != 1:
        what = f"test prompts of {', '.join(domains)}; name one domain" if domains else "no amazon_*_llm_test*.json"
        raise InputError(f"{folder}: {what}; expected: twice-rec release {_USAGE}")
    return domains[0]


def _about(words: Sequence[str], domain: str, run_dir: Path | None) -> dict[str, Any]:
    folders = [] if run_dir is None else [run_dir / "data", run_dir / SASREC]
    manifests = [(folder, manifest) for folder in folders if (manifest := Manifest.load(folder)) is not None]
    return provenance(manifests, domain, shlex.join(["twice-rec", "release", *words]))
