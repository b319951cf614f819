"""The prepared data of a run, as stage 0 left it, for all later stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from twice_rec.catalog import ItemCatalog
from twice_rec.data import arrays
from twice_rec.data.ceilings import CEILINGS
from twice_rec.errors import InputError
from twice_rec.files import read_json, read_records, write_json
from twice_rec.item_sequences import ItemSequences, Questions
from twice_rec.prompts import PromptFormat
from twice_rec.records import CandidateLists, Example, Split, UserSequence
from twice_rec.run import require

CATALOG = "catalog.jsonl"
SEQUENCES = "sequences.jsonl"
PROMPT = "prompt.json"
TRUE_REASONS = "true_reasons.jsonl"  # of the synthetic domain; for the rule judge alone
STATISTICS = "statistics.json"
KNOWN_SCORES = (*CEILINGS, "oracle")  # rows of tables, from score files that stage 0 writes of the synthetic domain

# Key of `prompt.json` -> key of the recipe.
_KEYS_OF_PROMPT = {key.removeprefix("prompt_"): key for key in PromptFormat.model_fields}


def score_file(name: str) -> str:
    """Return the name of the file of one of `KNOWN_SCORES`."""
    return f"{name}.npz"


def candidates_file(split: Split) -> str:
    """Return the name of the file of a split's candidate lists."""
    return f"candidates.{split}.jsonl"


def required_files(run_path: Path, *names: str) -> list[Path]:
    """Return the paths of files in `data/` of a run, inputs of a later stage; InputError if one is not there."""
    return [require(run_path / "data" / name, "prepare.sh") for name in names]


def training_files(run_path: Path) -> list[Path]:
    """Return the files that training prompts rest on; see `required_files`."""
    return required_files(run_path, CATALOG, SEQUENCES, PROMPT, candidates_file("train"))


class PreparedData:
    """Reads the folder `data/` of a run, each file once and when it is needed.

    Language models need the records, with their texts. CF models need indices only: those are read as arrays, without
    the texts, so that millions of users fit in memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def catalog(self) -> ItemCatalog:
        """All items."""
        return ItemCatalog.load(self.folder / CATALOG)

    @cached_property
    def sequences(self) -> list[UserSequence]:
        """All users, in the order of the file; InputError if an item is not in the catalogue, with the line."""
        path, sequences = self.folder / SEQUENCES, []
        for line, sequence in enumerate(read_records(path, UserSequence), start=1):
            for entry in sequence.interactions:
                if entry.item_id not in self.catalog:
                    raise InputError(
                        f"{path}, line {line}: item {entry.item_id} of user {sequence.user_id} is not in "
                        f"{CATALOG}; the files belong to different runs: run prepare.sh again"
                    )
            sequences.append(sequence)
        return sequences

    def candidates(self, split: Split) -> list[CandidateLists]:
        """Read the stored lists of a split."""
        return list(read_records(self.folder / candidates_file(split), CandidateLists))

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """What prompts show."""
        path = self.folder / PROMPT
        values = read_json(path)
        if values.keys() != _KEYS_OF_PROMPT.keys():
            raise InputError(f"{path}: expected the keys {', '.join(_KEYS_OF_PROMPT)}; run prepare.sh again")
        try:
            return PromptFormat.model_validate({_KEYS_OF_PROMPT[name]: value for name, value in values.items()})
        except ValidationError as error:
            raise InputError(f"{path}: {error.errors()[0]['msg']}; run prepare.sh again") from None

    def examples(self, split: Split, kind: str) -> Iterator[Example]:
        """Yield the questions of a split with one kind of list, in the order of the file; InputError without it."""
        by_user = {sequence.user_id: sequence for sequence in self.sequences}
        for entry in self.candidates(split):
            if kind not in entry.lists:
                raise InputError(
                    f"{self.folder / candidates_file(split)} has the lists {', '.join(entry.lists)}, not {kind}; add "
                    "it to candidate_lists in prepare.yaml and run prepare.sh again"
                )
            sequence = by_user[entry.user_id]
            yield Example(entry.user_id, sequence.history(split), entry.lists[kind], entry.target)

    def training_examples(self) -> Iterator[Example]:
        """Yield the training questions, with the only kind of list that is stored for them: `prompt_list`."""
        (kind,) = self.list_kinds("train")
        return self.examples("train", kind)

    def list_kinds(self, split: Split) -> list[str]:
        """Return the names of the lists that are stored for a split."""
        return arrays.stored_kinds(self.folder / candidates_file(split), lambda: self.candidates(split))

    def require_lists(self, split: Split, kinds: Sequence[str]) -> None:
        """Raise an InputError if a kind of lists is not stored for a split; `questions` does so too, but reads all."""
        arrays.require_kinds(self.folder / candidates_file(split), kinds, lambda: self.candidates(split))

    @cached_property
    def _interactions(self) -> arrays.InteractionArrays:
        return arrays.read_interactions(self.folder / SEQUENCES, self.catalog, lambda: self.sequences)

    def training_histories(self) -> ItemSequences:
        """Return every user's training part as item indices, in the order of the file."""
        sequences = self._interactions.sequences
        return ItemSequences(sequences.items, sequences.starts, sequences.starts + self._interactions.num_train)

    def questions(self, split: Split, kinds: Sequence[str] = ()) -> Questions:
        """Return the questions of a split with some kinds of lists as indices; see `examples` for those with texts.

        Raises:
            InputError: if no user has a target in the split, if a kind is not stored, or a user has no lists.
        """
        known = self._interactions
        position = known.target_position(split)  # [users]
        users = np.flatnonzero(position >= 0)  # [U]
        if not len(users):
            raise InputError(f"no user has a {split} target")
        user_ids = [known.user_ids[user] for user in users.tolist()]
        path, records = self.folder / candidates_file(split), lambda: self.candidates(split)
        lists = arrays.read_lists(path, user_ids, kinds, self.catalog, records) if kinds else {}
        starts = known.sequences.starts[users]
        histories = ItemSequences(known.sequences.items, starts, starts + position[users])
        return Questions(users, user_ids, histories, known.sequences.items[histories.ends], lists)


def save_prompt_format(path: Path, shown: PromptFormat) -> None:
    """Write `prompt.json`."""
    write_json(path, {name: getattr(shown, key) for name, key in _KEYS_OF_PROMPT.items()})
