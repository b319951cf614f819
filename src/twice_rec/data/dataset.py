"""The prepared data of a run, as stage 0 left it, for all later stages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.files import read_json, read_records, write_json
from twice_rec.prompts import PromptFormat
from twice_rec.records import CandidateLists, Example, Split, UserSequence

CATALOG = "catalog.jsonl"
SEQUENCES = "sequences.jsonl"
PROMPT = "prompt.json"
ORACLE = "oracle.npz"
STATISTICS = "statistics.json"


def candidates_file(split: Split) -> str:
    """Name of the split's candidate lists."""
    return f"candidates.{split}.jsonl"


class PreparedData:
    """Reads `data/` of a run, each file once and when it is needed.

    Args:
        folder: the `data` folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def catalog(self) -> ItemCatalog:
        """All items."""
        return ItemCatalog.load(self.folder / CATALOG)

    @cached_property
    def sequences(self) -> list[UserSequence]:
        """All users, in the files' order.

        Raises:
            InputError: for an item that is not in the catalogue, with the line.
        """
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
        """The stored lists of a split."""
        return list(read_records(self.folder / candidates_file(split), CandidateLists))

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """How much prompts show."""
        path = self.folder / PROMPT
        values = read_json(path)
        try:
            return PromptFormat(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except TypeError as error:
            raise InputError(f"{path}: {error}; run prepare.sh again") from None

    def examples(self, split: Split, kind: str) -> Iterator[Example]:
        """The questions of a split with one kind of candidate list, in the files' order of users."""
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
        """The training questions; their candidates are the kind that prompts show, the only one stored for them."""
        (kind,) = self.candidates("train")[0].lists
        return self.examples("train", kind)

    def training_histories(self) -> list[list[int]]:
        """Every user's training part as item indices, in the files' order."""
        return [self.catalog.indices(e.item_id for e in s.interactions[: s.num_train]) for s in self.sequences]


def save_prompt_format(path: Path, shown: PromptFormat) -> None:
    """Write `prompt.json`."""
    write_json(path, {name: getattr(shown, name) for name in PromptFormat.__slots__})
