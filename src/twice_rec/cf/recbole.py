"""Models of RecBole 1.2.1: trained and asked by `recbole_runner.py`, a process of RecBole's own environment.

Files go out, scores come in. A training is given the training parts and some users' validation targets, as item
indices; a scorer is given histories, block by block, as any `CFScorer`. The test targets stay here.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.confidence import Floats, Histories
from twice_rec.cf.ranking import CHOSEN_ON, CFQuestions, Data
from twice_rec.cf.recbole_models import RECBOLE_MODELS
from twice_rec.cf.recipe import BaselinesRecipe
from twice_rec.errors import InputError, Unfinished
from twice_rec.files import read_jsonl, write_json
from twice_rec.item_sequences import ItemSequences
from twice_rec.progress import progress

logger = logging.getLogger(__name__)

RUNNER = Path(__file__).with_name("recbole_runner.py")
MODEL, TUNING = "model.safetensors", "tuning.jsonl"  # what a training leaves
MOST_ATTRIBUTES = 64  # RecBole's S3Rec makes a list of all attributes at every position of every sequence
SHORTEST = 10  # length of padded histories below which some models' shapes break
_MEMBER = re.compile(r'"([^"]{1,60})": "([^"]{1,60})"')


def require_environment(python: Path) -> None:
    """Raise an InputError with the command that makes RecBole's environment if its Python is not there."""
    if not python.is_file():
        raise InputError(f"recbole_python is {python}: no such file; make RecBole's environment: {_install(python)}")


def _install(python: Path) -> str:
    return f"VENV={python.parent.parent} bash install.sh requirements-recbole.txt"


def item_attributes(catalog: ItemCatalog, most: int = MOST_ATTRIBUTES) -> tuple[NDArray[np.int64], int]:
    """Return each item's attributes for S3Rec, int64 [N + 1, A] with 0 for none, and how many different ones there are.

    An attribute is a category, the brand, or a member of the details (`"Brand": "Yogi"`), if at least two items have it
    and not more than half; the `most` frequent are kept.
    """
    of_items = [
        {("category", one) for one in item.categories}
        | ({("brand", item.brand)} if item.brand else set())
        | {(name.lower(), value) for name, value in _MEMBER.findall(item.details)}
        for item in catalog
    ]
    counts = Counter(one for found in of_items for one in found)
    known = [one for one, count in counts.items() if 2 <= count <= len(catalog) / 2]
    numbers = {one: i for i, one in enumerate(sorted(known, key=lambda one: (-counts[one], one))[:most], start=1)}
    kept = [sorted(numbers[one] for one in found if one in numbers) for found in of_items]
    table = np.zeros((len(catalog) + 1, max(1, *map(len, kept))), dtype=np.int64)  # [N + 1, A]
    for item, row in enumerate(kept, start=1):
        table[item, : len(row)] = row
    return table, max(len(numbers), 1)


class RecBoleVariant:
    """One row: the training of a model of RecBole with the recipe's settings, and then its scores, as a `CFScorer`.

    While it is entered, one process has the model: it is started when it is first needed, trains, and answers.

    Args:
        name: one of `RECBOLE_MODELS`.
        data: the prepared data.
        valid: the questions on which settings and weights are chosen.

    Raises:
        Unfinished: if RecBole's process died.
    """

    def __init__(self, recipe: BaselinesRecipe, name: str, data: Data, valid: CFQuestions):
        self._recipe, self._name, self._data, self._valid = recipe, name, data, valid
        self.folder = recipe.run_path / name
        self.log_path = recipe.run_path / "logs" / f"recbole_{name}.log"
        self._exchange = Path()
        self._process: subprocess.Popen[str] | None = None
        self._files = ExitStack()

    def __enter__(self) -> RecBoleVariant:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._files:
            if self._process is None:
                return
            if kind is not None:
                self._process.kill()
            self._process.communicate()  # closes its input, which ends it
        if kind is None and self._process.returncode:
            raise self._death()

    def settings(self) -> list[Mapping[str, Any]]:
        """Return what the recipe tries, in this order."""
        return list(RECBOLE_MODELS[self._name].settings[: self._recipe.num_settings])

    def train(self, log: Callable[[dict[str, float]], None]) -> dict[str, Any]:
        """Train with each setting until the minutes are over; go on where a killed process stopped.

        Writes `model.safetensors`, the best on validation, and `tuning.jsonl`, a line per setting, to `folder`.

        Args:
            log: is told loss and validation after each epoch.

        Returns:
            What was measured; `valid/...` by this package's own metric.

        Raises:
            InputError: if no user has two training interactions.
        """
        if not bool((self._data.training_histories().lengths >= 2).any()):
            raise InputError(f"no user has two training interactions; {self._name} has nothing to learn from")
        self._start(trains=True)
        with progress(desc=self._name, unit="epoch") as bar:
            while "ready" not in (told := self._told()):
                if "tried" in told:
                    row, best = told["tried"], max(told["tried"]["validations"], default=0.0)
                    says = f"validation {best:.4f}, {row['epochs']} epochs, ended by {row['ended']}"
                    bar.clear()
                    logger.info("%s: tried %s: %s", self._name, row["settings"] or "RecBole's defaults", says)
                else:
                    bar.set_postfix(loss=f"{told['loss']:.4f}", validation=f"{told['validation']:.4f}", refresh=False)
                    bar.update(1)
                    log({f"{self._name}/{name}": told[name] for name in ("loss", "validation")})
        return self._figures()

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`; InputError for scores of another shape, or NaN."""
        if self._process is None:
            self._start(trains=False)
            self._told()
        path = self._exchange / "scores.npy"
        np.savez(self._exchange / "questions.npz", users=users, **_arrays("history", ItemSequences.of(histories)))
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its death is told by the next line
            self._process.stdin.write("?")
            self._process.stdin.flush()
        self._told()
        scores: Floats = np.load(path)
        expected = (len(users), len(self._data.catalog))
        if scores.shape != expected:
            raise InputError(
                f"{self._name}: RecBole's process gave scores of the shape {scores.shape}, expected [users, items] = "
                f"{expected}"
            )
        if np.isnan(scores).any():
            raise InputError(f"{self._name}: {int(np.isnan(scores).sum())} scores of RecBole's process are NaN")
        return scores

    def _figures(self) -> dict[str, Any]:
        """Measure the chosen model by our own metric, and say what it took."""
        validation = round(self._valid.mean(self), 6)
        tried = [row for _, row in read_jsonl(self.folder / TUNING)]
        best = max(tried, key=lambda row: row["validation"])
        if abs(best["validation"] - validation) > 1e-3:
            logger.warning("%s: validation is %.4f here, %.4f there", self._name, validation, best["validation"])
        left_out = len(self.settings()) - len(tried)
        if left_out:
            logger.warning("%s: minutes are over; %d settings were not tried", self._name, left_out)
        if best["ended"] != "patience":
            logger.warning("%s: its best training was ended by %s, not by patience", self._name, best["ended"])
        return {
            "class": RECBOLE_MODELS[self._name].recbole_class,
            "settings": best["settings"],
            "epochs": best["epochs"],
            "ended": best["ended"],
            f"valid/{CHOSEN_ON}": validation,
            "tried": len(tried),
            "train_seconds": round(sum(row["seconds"] for row in tried), 1),
            "passed_seconds": round(sum(row["passed_seconds"] for row in tried), 1),
        }

    def _start(self, trains: bool) -> None:
        """Start the process, which trains first or takes the weights in `folder`."""
        self._exchange = Path(self._files.enter_context(tempfile.TemporaryDirectory(prefix="twice_rec-")))
        self._write_work(trains)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        words = [str(self._recipe.python_path), "-I", "-W", "ignore", str(RUNNER)]
        words += [str(self._exchange), str(self.folder.absolute())]
        pipe = subprocess.PIPE
        with open(self.log_path, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, text=True, encoding="utf-8")

    def _write_work(self, trains: bool) -> None:
        """Write what the process reads: the work, and the sequences as item indices."""
        recipe, training, asked = self._recipe, self._data.training_histories(), self._valid.asked
        longest = max(training.lengths.max(initial=0), asked.histories.lengths.max(initial=0)) + 1
        write_json(
            self._exchange / "work.json",
            {
                "class": RECBOLE_MODELS[self._name].recbole_class,
                "trains": trains,
                "settings": self.settings(),
                "minutes": recipe.minutes,
                "epochs": recipe.epochs,
                "patience": recipe.patience,
                "seed": recipe.seed,
                "device": recipe.device,
                "max_length": max(SHORTEST, min(recipe.max_length, int(longest))),
            },
        )
        attributes, count = np.zeros((len(self._data.catalog) + 1, 1), dtype=np.int64), 1
        if self._name == "s3rec":
            attributes, count = item_attributes(self._data.catalog)
        np.savez(
            self._exchange / "data.npz",
            num_users=len(training),
            num_items=len(self._data.catalog),
            attributes=attributes,
            num_attributes=count,
            valid_users=asked.users,
            valid_targets=asked.targets,
            **_arrays("train", training),
            **_arrays("valid", asked.histories),
        )

    def _told(self) -> dict[str, Any]:
        """Return what the process tells next."""
        assert self._process is not None
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            told: dict[str, Any] = json.loads(line)
            return told
        self._process.wait()
        raise self._death()

    def _death(self) -> Unfinished:
        assert self._process is not None
        lines = [line.strip() for line in self.log_path.read_text("utf-8", "replace").splitlines() if line.strip()]
        said = lines[-1] if lines else "it said nothing"
        remedy = "the same command goes on where it stopped"
        if "No module named" in said:
            remedy = f"make RecBole's environment: {_install(self._recipe.python_path)}"
        return Unfinished(
            f"{self._name}: RecBole's process ended with status {self._process.returncode}: {said}; its log is "
            f"{self.log_path}; {remedy}"
        )


def _arrays(prefix: str, sequences: ItemSequences) -> dict[str, Any]:
    """Return sequences as arrays of their own: the array that they are pieces of has the test targets too."""
    ends = sequences.lengths.cumsum()
    return {
        f"{prefix}_items": sequences.flat()[1],
        f"{prefix}_starts": ends - sequences.lengths,
        f"{prefix}_ends": ends,
    }
