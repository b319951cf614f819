"""The authors' released JSON files of one domain, under their sample or their full-data names.

`*_sasrec_{train,test}*.json` hold the sequences as item indices, `amazon_vocab_*.json` and `*_llm_meta*.json` the items
in index order. Reviews and ratings are only in the prompts of `*_llm_{train_case_1,train_case_2,test}*.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twice_rec import answer_format
from twice_rec.data.sources.base import Problems, Row, Source, clean_text
from twice_rec.errors import InputError
from twice_rec.files import read_json
from twice_rec.prompts import RATING_WORDS
from twice_rec.records import Item

_META_TITLE = re.compile(r"\[Item Title\] ?: ?(.*?)\n\s*\*\*\*Instruction", re.DOTALL)
_META_TEXT = re.compile(r"<item_info> item_id:(\S+)\s*\n- description:(.*?)\n- details:(.*?)\s*</item_info>", re.DOTALL)
# One released row (Grocery, item 2302) lost the line break before its details.
_META_ONE_LINE = re.compile(r"<item_info> item_id:(\S+)\s*\n- description:(.*) details:(.*?)\s*</item_info>", re.DOTALL)
_HISTORY = re.compile(r"\[Purchase History\] ?:(.*?)\[Candidate List\]", re.DOTALL)
_INTERACTION = re.compile(
    r"title:[^\n]*\n- item_id:(\S+)\n- description:(?:(?!\n- item_id:).)*?\n- review:(.*?)\n- rating:(\w+)", re.DOTALL
)


class ReleaseSource(Source, name="release"):
    """The released files of `domain` in one folder."""

    def find_files(self) -> None:
        """Find the files, and read all items at once, because everything else is given by their indices."""
        start, prompts = f"amazon_{self.domain}", ("llm_train_case_1", "llm_train_case_2", "llm_test")
        self._train = self._find(f"{start}_sasrec_train*.json")
        self._test = self._find(f"{start}_sasrec_test*.json")
        self._meta = self._find(f"{start}_llm_meta*.json")
        self._vocab = self._find(f"amazon_vocab_{self.domain}*.json")
        self._prompts = [path for kind in prompts for path in sorted(self.folder.glob(f"{start}_{kind}*.json"))]
        self.interaction_files, self.item_files = [self._train, self._test], [self._vocab, self._meta, *self._prompts]
        self._items = self._read_items()
        self._reviews: dict[int, tuple[str, str]] = {}

    def _find(self, pattern: str) -> Path:
        found = sorted(self.folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        what = f"{len(found)} files ({', '.join(path.name for path in found)})" if found else "no file"
        raise InputError(f"{self.folder}: {what} named {pattern}; expected one of the authors' released files")

    def _read_items(self) -> list[Item]:
        """Read all items in index order, so that item i of the release has index i here."""
        vocab, rows = read_json(self._vocab), read_json(self._meta)
        if not isinstance(vocab, dict) or list(vocab) != [str(i) for i in range(1, len(vocab) + 1)]:
            raise InputError(f"{self._vocab}: expected item indices 1, 2, ... as keys, each with a title")
        if not isinstance(rows, list) or len(rows) != len(vocab):
            raise InputError(f"{self._meta}: expected one row for each of the {len(vocab)} items of {self._vocab.name}")
        numbered = enumerate(zip(rows, vocab.values(), strict=True), start=1)
        return [self._read_item(number, row, title) for number, (row, title) in numbered]

    def _read_item(self, number: int, row: Mapping[str, Any], title: str) -> Item:
        named, text = _META_TITLE.search(str(row.get("input", ""))), str(row.get("output", ""))
        info = _META_TEXT.search(text)
        if info is None:
            self.problems.add("item whose details do not start a line", f"{self._meta.name}, row {number}")
            info = _META_ONE_LINE.search(text)
        if not named or not info:
            raise InputError(f"{self._meta}, row {number}: no [Item Title] in `input` or no <item_info> in `output`")
        if named.group(1).strip() != title.strip():
            raise InputError(
                f"{self._meta}, row {number}: title {named.group(1)[:60]!r}, but item {number} of "
                f"{self._vocab.name} is {title[:60]!r}; the files belong to different versions"
            )
        return Item(info.group(1), clean_text(title), clean_text(info.group(2)), clean_text(info.group(3)))

    def rows(self) -> Iterator[Row]:
        """Yield the histories and targets of the test rows: whole sequences, because each begins with its train row.

        Raises:
            InputError: if the rows of the two files do not fit together.
        """
        test, train = (
            [(str(row.get("user_id")), self._indices(row, where)) for where, row in _rows(path)]
            for path in (self._test, self._train)
        )  # (user id, item indices with the target last) of each row
        if [user for user, _ in train] != [user for user, _ in test]:
            raise InputError(f"{self._train} and {self._test} do not list the same users in the same order")
        rows_of: dict[tuple[int, ...], list[int]] = {}  # whole or training sequence -> rows that have it
        for row, ((user, whole), (_, start)) in enumerate(zip(test, train, strict=True)):
            if whole[: len(start)] != start:
                says = f"the history of user {user} does not begin with its row in {self._train.name}"
                raise InputError(f"{self._test}, row {row + 1}: {says}")
            rows_of.setdefault(tuple(whole), []).append(row)
            rows_of.setdefault(tuple(start), []).append(row)
        reviews, line = self._read_reviews(rows_of), 0
        for row, (user, sequence) in enumerate(test):
            for index in sequence:
                item_id = self._items[index - 1].item_id
                title, rating = reviews.get((row, item_id), ("", None))
                if title:
                    self._reviews[line] = (title, "")
                yield user, item_id, 0, rating, line
                line += 1

    def _read_reviews(self, rows_of: Mapping[tuple[int, ...], list[int]]) -> dict[tuple[int, str], tuple[str, float]]:
        """Return (row of the user, item id) -> review title and rating, from the histories in the prompts."""
        found: dict[tuple[int, str], tuple[str, float]] = {}
        for where, row in _rows(*self._prompts):
            history = _HISTORY.search(str(row.get("input", "")))
            indices = self._indices(row, where)
            users = rows_of.get(tuple(indices), [])
            if not history or len(users) != 1:
                self.problems.add("prompt that belongs to no single user, its reviews left out", where)
                continue
            reviewed = _INTERACTION.findall(history.group(1))
            if len(reviewed) != len(indices) - 1:
                self.problems.add("prompt with reviews that do not parse", f"{where}: {len(reviewed)} found")
            for item_id, review, word in reviewed:
                if word in RATING_WORDS:
                    found[users[0], item_id] = (clean_text(review), float(RATING_WORDS.index(word) + 1))
        return found

    def rationales(self) -> dict[tuple[str, ...], str]:
        """Return ids of the history's items and the target -> the authors' rationale; InputError if one is missing."""
        found = {}
        for where, row in _rows(*(path for path in self._prompts if "_llm_train_case_1" in path.name)):
            text = answer_format.parse(str(row.get("output", ""))).rationale
            if not text:
                raise InputError(f"{where}: no complete <think> element in `output`")
            found[tuple(self._items[index - 1].item_id for index in self._indices(row, where))] = clean_text(text)
        if not found:
            raise InputError("the source has no file *_llm_train_case_1*.json, which holds the released rationales")
        return found

    def described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Yield the wanted items (Grocery's item 2276 has no title)."""
        return (item for item in self._items if item.item_id in wanted)

    def items(self, wanted: set[str]) -> list[Item]:
        """Return all released items in the release's index order (13 of Grocery's are in no sequence)."""
        return self._items

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Return the review titles that some prompt shows."""
        return {line: review for line, review in self._reviews.items() if line in lines}

    def _indices(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Return the indices of a row's items, the target last."""
        try:
            indices = [int(part) for part in f"{row['output_id']},{row['positive_item_id']}".split(",")]
        except (KeyError, ValueError):
            raise InputError(f"{where}: expected item indices in `output_id` and `positive_item_id`") from None
        if not all(1 <= index <= len(self._items) for index in indices):
            raise InputError(f"{where}: item index outside 1..{len(self._items)}: {indices}")
        if len(indices) < 2:
            raise InputError(f"{where}: user {row.get('user_id')} has 1 item; needs a history and a target")
        return indices


def _rows(*paths: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and number, row) of each row."""
    for path in paths:
        rows = read_json(path)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected a list of objects, as the authors released it")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
