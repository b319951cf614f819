"""The authors' released JSON files of one domain, under their sample or their full-data names.

`*_sasrec_{train,test}*.json` hold the sequences as item indices, `amazon_vocab_*.json` and `*_llm_meta*.json` the items
in index order; reviews and ratings stand only inside the prompts of `*_llm_{train_case_1,train_case_2,test}*.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twice_rec import answer_format
from twice_rec.data.sources.base import Problems, PurchaseTable, TableBuilder, clean_text
from twice_rec.errors import InputError
from twice_rec.files import read_json
from twice_rec.prompts import RATING_WORDS
from twice_rec.records import Item

_META_TITLE = re.compile(r"\[Item Title\] ?: ?(.*?)\n\s*\*\*\*Instruction", re.DOTALL)
_META_TEXT = re.compile(r"<item_info> item_id:(\S+)\s*\n- description:(.*?)\n- details:(.*?)\s*</item_info>", re.DOTALL)
# One released row (Grocery, item 2302) lost the line break before its details.
_META_ONE_LINE = re.compile(r"<item_info> item_id:(\S+)\s*\n- description:(.*) details:(.*?)\s*</item_info>", re.DOTALL)
_HISTORY = re.compile(r"\[Purchase History\] ?:(.*?)\[Candidate List\]", re.DOTALL)
_PURCHASE = re.compile(
    r"title:[^\n]*\n- item_id:(\S+)\n- description:(?:(?!\n- item_id:).)*?\n- review:(.*?)\n- rating:(\w+)", re.DOTALL
)


class ReleaseSource:
    """The release's files of `domain` in one folder."""

    def __init__(self, folder: Path, domain: str):
        self.problems = Problems()
        if not folder.is_dir():
            raise InputError(f"source_dir {folder.resolve()}: no such folder; pass --source_dir FOLDER")
        self._train = _find(folder, f"amazon_{domain}_sasrec_train*.json")
        self._test = _find(folder, f"amazon_{domain}_sasrec_test*.json")
        self._vocab = _find(folder, f"amazon_vocab_{domain}*.json")
        self._meta = _find(folder, f"amazon_{domain}_llm_meta*.json")
        self._prompts = [
            path
            for name in ("llm_train_case_1", "llm_train_case_2", "llm_test")
            for path in sorted(folder.glob(f"amazon_{domain}_{name}*.json"))
        ]
        self._items = self._read_items()
        self._reviews: dict[int, tuple[str, str]] = {}

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [self._train, self._test, self._vocab, self._meta, *self._prompts]

    def _read_items(self) -> list[Item]:
        """All items in index order, so that item i of the release has index i here."""
        vocab = read_json(self._vocab)
        rows = read_json(self._meta)
        if not isinstance(vocab, dict) or list(vocab) != [str(i) for i in range(1, len(vocab) + 1)]:
            raise InputError(f"{self._vocab}: expected item indices 1, 2, ... as keys, each with a title")
        if not isinstance(rows, list) or len(rows) != len(vocab):
            raise InputError(f"{self._meta}: expected one row for each of the {len(vocab)} items of {self._vocab.name}")
        items = []
        for number, (row, title) in enumerate(zip(rows, vocab.values(), strict=True), start=1):
            named = _META_TITLE.search(str(row.get("input", "")))
            text = str(row.get("output", ""))
            info = _META_TEXT.search(text)
            if info is None:
                self.problems.add("item whose details do not start a line", f"{self._meta.name}, row {number}")
                info = _META_ONE_LINE.search(text)
            if not named or not info:
                raise InputError(
                    f"{self._meta}, row {number}: no [Item Title] in `input` or no <item_info> in `output`"
                )
            if named.group(1).strip() != title.strip():
                raise InputError(
                    f"{self._meta}, row {number}: title {named.group(1)[:60]!r}, but item {number} of "
                    f"{self._vocab.name} is {title[:60]!r}; the files belong to different versions"
                )
            items.append(Item(info.group(1), clean_text(title), clean_text(info.group(2)), clean_text(info.group(3))))
        return items

    def purchases(self) -> PurchaseTable:
        """The test rows' histories and targets: complete sequences, since each begins with its train row."""
        test = _sequences(self._test, len(self._items))
        train = _sequences(self._train, len(self._items))
        if [user for user, _ in train] != [user for user, _ in test]:
            raise InputError(f"{self._train} and {self._test} do not list the same users in the same order")
        by_sequence: dict[tuple[int, ...], list[int]] = {}
        for row, ((user, whole), (_, start)) in enumerate(zip(test, train, strict=True)):
            if whole[: len(start)] != start:
                raise InputError(
                    f"{self._test}, row {row + 1}: the history of user {user} does not begin with its row in "
                    f"{self._train.name}"
                )
            by_sequence.setdefault(tuple(whole), []).append(row)
            by_sequence.setdefault(tuple(start), []).append(row)
        reviews = self._read_reviews(by_sequence)
        table, line = TableBuilder(), 0
        for row, (user, sequence) in enumerate(test):
            for index in sequence:
                item_id = self._items[index - 1].item_id
                title, rating = reviews.get((row, item_id), ("", None))
                if title:
                    self._reviews[line] = (title, "")
                table.add(user, item_id, 0, rating, line)
                line += 1
        return table.build()

    def _read_reviews(
        self, by_sequence: Mapping[tuple[int, ...], list[int]]
    ) -> dict[tuple[int, str], tuple[str, float]]:
        """(row of the user, item id) -> review title and rating, from the prompts' histories."""
        found: dict[tuple[int, str], tuple[str, float]] = {}
        for path in self._prompts:
            for number, row in enumerate(_rows(path), start=1):
                where = f"{path.name}, row {number}"
                history = _HISTORY.search(str(row.get("input", "")))
                indices = _indices(row, len(self._items), f"{path}, row {number}")
                users = by_sequence.get(tuple(indices), [])
                if not history or len(users) != 1:
                    self.problems.add("prompt that belongs to no single user, its reviews left out", where)
                    continue
                purchases = _PURCHASE.findall(history.group(1))
                if len(purchases) != len(indices) - 1:
                    self.problems.add("prompt with reviews that do not parse", f"{where}: {len(purchases)} found")
                for item_id, review, word in purchases:
                    if word in RATING_WORDS:
                        found[users[0], item_id] = (clean_text(review), float(RATING_WORDS.index(word) + 1))
        return found

    def rationales(self) -> dict[tuple[str, ...], str]:
        """The authors' rationales (`train_case_1`): item ids of the history and the target, in order -> text."""
        found = {}
        for path in self._prompts:
            for number, row in enumerate(_rows(path) if "_llm_train_case_1" in path.name else (), start=1):
                where = f"{path}, row {number}"
                text = answer_format.parse(str(row.get("output", ""))).rationale
                if not text:
                    raise InputError(f"{where}: no complete <think> element in `output`")
                indices = _indices(row, len(self._items), where)
                found[tuple(self._items[index - 1].item_id for index in indices)] = clean_text(text)
        if not found:
            raise InputError("the source has no file *_llm_train_case_1*.json, where the released rationales stand")
        return found

    def titled(self, wanted: set[str]) -> set[str]:
        """Which of the wanted ids have a title (Grocery's item 2276 has none)."""
        untitled = [item.item_id for item in self._items if item.item_id in wanted and not item.title]
        for item_id in untitled:
            self.problems.add("item without title", item_id)
        return wanted - set(untitled)

    def items(self, wanted: set[str]) -> list[Item]:
        """All released items in the release's index order (13 of Grocery's stand in no sequence)."""
        return self._items

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """The review titles that some prompt shows."""
        return {line: review for line, review in self._reviews.items() if line in lines}


def _find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    what = "no file" if not found else f"{len(found)} files ({', '.join(path.name for path in found)})"
    raise InputError(f"{folder}: {what} named {pattern}; expected one of the authors' released files")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects, as the authors released it")
    return rows


def _sequences(path: Path, num_items: int) -> list[tuple[str, list[int]]]:
    """(user id, item indices with the target last) of each row."""
    return [
        (str(row.get("user_id")), _indices(row, num_items, f"{path}, row {number}"))
        for number, row in enumerate(_rows(path), start=1)
    ]


def _indices(row: Mapping[str, Any], num_items: int, where: str) -> list[int]:
    try:
        indices = [int(part) for part in f"{row['output_id']},{row['positive_item_id']}".split(",")]
    except (KeyError, ValueError):
        raise InputError(f"{where}: expected item indices in `output_id` and `positive_item_id`") from None
    if not all(1 <= index <= num_items for index in indices):
        raise InputError(f"{where}: item index outside 1..{num_items}: {indices}")
    if len(indices) < 2:
        raise InputError(f"{where}: user {row.get('user_id')} has {len(indices)} item; needs a history and a target")
    return indices
