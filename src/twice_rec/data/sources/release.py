"""The authors' released JSON files of one domain, under their sample or their full-data names.

`*_sasrec_{train,test}*.json` hold the sequences as item indices, `amazon_vocab_*.json` and `*_llm_meta*.json` the items
in index order. Reviews and ratings are only in the prompts of `*_llm_{train_case_1,train_case_2,test}*.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twice_rec import answer_format
from twice_rec.data.sources.base import Problems, Row, Source
from twice_rec.data.sources.lines import read_whole_json
from twice_rec.data.sources.values import clean_text, comes_back, tidy_id
from twice_rec.errors import InputError
from twice_rec.prompts import RATING_WORDS
from twice_rec.records import Item

_META_TITLE = re.compile(r"\[Item Title\] ?: ?(.*?)\n\s*\*\*\*Instruction", re.DOTALL)
_META_TEXT = re.compile(r"<item_info> item_id:(\S+)\s*\n- description:(.*?)\n- details:(.*?)\s*</item_info>", re.DOTALL)
# One released row (Grocery, item 2302) lost the line break before its details.
_META_ONE_LINE = re.compile(r"<item_info> item_id:(\S+)\s*\n- description:(.*) details:(.*?)\s*</item_info>", re.DOTALL)
_HISTORY = re.compile(r"\[Purchase History\] ?:(.*?)\[Candidate List\]", re.DOTALL)
_CANDIDATES = re.compile(r"\[Candidate List\] ?:(.*)", re.DOTALL)
_CANDIDATE = re.compile(r"^- item_id:(\S+)", re.MULTILINE)
_INTERACTION = re.compile(
    r"title:[^\n]*\n- item_id:(\S+)\n- description:(?:(?!\n- item_id:).)*?\n- review:(.*?)\n- rating:(\w+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ReleasedPrompt:
    """One released prompt as ids of items, and the answer it is trained or tested with."""

    history: tuple[str, ...]
    candidates: tuple[str, ...]
    target: str
    answer: str


class ReleaseSource(Source, name="release"):
    """The released files of `domain` in one folder."""

    def find_files(self) -> None:
        """Find the files, and read all items at once, because everything else is given by their indices."""
        start, prompts = f"amazon_{self.domain}", ("llm_train_case_1", "llm_train_case_2", "llm_test")
        self._train = self._find(f"{start}_sasrec_train*.json")
        self._test = self._find(f"{start}_sasrec_test*.json")
        self._meta = self._find(f"{start}_llm_meta*.json")
        self._vocab = self._find(f"amazon_vocab_{self.domain}*.json")
        self._prompts = [path for kind in prompts for path in self._files(f"{start}_{kind}*.json")]
        self.interaction_files, self.item_files = [self._train, self._test], [self._vocab, self._meta, *self._prompts]
        self._items = self._read_items()
        self._reviews: dict[int, tuple[str, str]] = {}

    def _files(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.folder.glob(pattern) if path.is_file())

    def _find(self, pattern: str) -> Path:
        found = self._files(pattern)
        if len(found) == 1:
            return found[0]
        what = f"{len(found)} files ({', '.join(path.name for path in found)})" if found else "no file"
        raise InputError(f"{self.folder}: {what} named {pattern}; expected one of the authors' released files")

    def _read_items(self) -> list[Item]:
        """Read all items in index order, so that item i of the release has index i here."""
        vocab, rows = (read_whole_json(path, self.form.encoding) for path in (self._vocab, self._meta))
        if not isinstance(vocab, dict) or list(vocab) != [str(i) for i in range(1, len(vocab) + 1)]:
            raise InputError(f"{self._vocab}: expected item indices 1, 2, ... as keys, each with a title")
        if not isinstance(rows, list) or len(rows) != len(vocab):
            raise InputError(f"{self._meta}: expected one row for each of the {len(vocab)} items of {self._vocab.name}")
        numbered = enumerate(zip(rows, vocab.values(), strict=True), start=1)
        return [self._read_item(number, row, title) for number, (row, title) in numbered]

    def _read_item(self, number: int, row: Any, title: Any) -> Item:
        if not isinstance(row, dict) or not isinstance(title, str):
            raise InputError(f"{self._meta}, row {number}: expected an object, and a title in {self._vocab.name}")
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
        if not comes_back(info.group(1)):
            raise InputError(f"{self._meta}, row {number}: an answer does not give back the id {info.group(1)[:60]!r}")
        return Item(info.group(1), clean_text(title), clean_text(info.group(2)), clean_text(info.group(3)))

    def rows(self) -> Iterator[Row]:
        """Yield the histories and targets of the test rows: whole sequences, because each begins with its train row.

        Raises:
            InputError: if the two files do not list the same users, or no row can be used.
        """
        test, train = (self._sequences(path) for path in (self._test, self._train))
        others = sum(a != b for (a, _), (b, _) in zip(test, train, strict=False) if a and b)
        if len(test) != len(train) or 2 * others > len(test):
            raise InputError(f"{self._train} and {self._test} do not list the same users in the same order")
        rows_of: dict[tuple[int, ...], list[int]] = {}  # whole or training sequence -> rows that have it
        usable = dict[str, tuple[int, list[int]]]()  # user -> row, item indices
        for row, ((user, whole), (trained, start)) in enumerate(zip(test, train, strict=True)):
            where = f"{self._test.name}, row {row + 1}"
            if not user or not trained or not whole or not start:
                continue
            if user != trained:
                self.problems.add("row of another user than its training row, skipped", f"{where}: {user}, {trained}")
            elif whole[: len(start)] != start:
                says = f"the history of user {user} does not begin with its row in {self._train.name}"
                self.problems.add("row that does not continue its training row, skipped", f"{where}: {says}")
            elif user in usable:
                self.problems.add("user with several rows, first kept", f"{where}: {user}")
            else:
                usable[user] = (row, whole)
                rows_of.setdefault(tuple(whole), []).append(row)
                rows_of.setdefault(tuple(start), []).append(row)
        if not usable:
            raise InputError(f"{self._test}: no row can be used; {'; '.join(self.problems.lines()[:3])}")
        reviews, line = self._read_reviews(rows_of), 0
        for user, (row, sequence) in usable.items():
            for index in sequence:
                item_id = self._items[index - 1].item_id
                title, rating = reviews.get((row, item_id), ("", None))
                if title:
                    self._reviews[line] = (title, "")
                yield user, item_id, 0, rating, line
                line += 1

    def _sequences(self, path: Path) -> list[tuple[str, list[int]]]:
        """Return (user id, item indices with the target last) of each row; nothing for what is counted as odd."""
        found = []
        for where, row in self._rows(path):
            user, indices = row.get("user_id"), list[int]()
            if isinstance(user, bool) or not isinstance(user, (str, int)) or not str(user).strip():
                self.problems.add("row whose user_id is not text, skipped", f"{where}: {user!r}")
                user = ""
            try:
                indices = self._indices(row, where)
            except InputError as error:
                self.problems.add("row without a history and a target, skipped", str(error))
            found.append((tidy_id(str(user)), indices))
        return found

    def _read_reviews(self, rows_of: Mapping[tuple[int, ...], list[int]]) -> dict[tuple[int, str], tuple[str, float]]:
        """Return (row of the user, item id) -> review title and rating, from the histories in the prompts."""
        found: dict[tuple[int, str], tuple[str, float]] = {}
        for where, row in self._rows(*self._prompts):
            history = _HISTORY.search(str(row.get("input", "")))
            try:
                indices = self._indices(row, where)
            except InputError as error:
                self.problems.add("prompt without a history and a target, its reviews left out", str(error))
                continue
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
        for where, row in self._rows(*(path for path in self._prompts if "_llm_train_case_1" in path.name)):
            text = answer_format.parse(str(row.get("output", ""))).rationale
            if not text:
                raise InputError(f"{where}: no complete <think> element in `output`")
            found[tuple(self._items[index - 1].item_id for index in self._indices(row, where))] = clean_text(text)
        if not found:
            raise InputError("the source has no file *_llm_train_case_1*.json, which holds the released rationales")
        return found

    def prompts(self, kind: str) -> list[ReleasedPrompt]:
        """Return the released prompts of a kind, such as `llm_test`, in the order of the files.

        Raises:
            InputError: if there is none, or one has no list of candidates with its target.
        """
        found = []
        for where, row in self._rows(*(path for path in self._prompts if f"_{kind}" in path.name)):
            shown = _CANDIDATES.search(str(row.get("input", "")))
            candidates = _CANDIDATE.findall(shown.group(1)) if shown else []
            *history, target = (self._items[index - 1].item_id for index in self._indices(row, where))
            if target not in candidates:
                raise InputError(f"{where}: {len(candidates)} candidates in `input`, and the target is none of them")
            found.append(ReleasedPrompt(tuple(history), tuple(candidates), target, str(row.get("output", ""))))
        if not found:
            raise InputError(f"{self.folder}: no file amazon_{self.domain}_{kind}*.json with prompts")
        return found

    def sequences(self, split: Literal["train", "test"]) -> list[tuple[str, ...]]:
        """Return item ids, the target last, of each row of the training or the test sequences; none of an odd row."""
        rows = self._sequences(self._train if split == "train" else self._test)
        return [tuple(self._items[index - 1].item_id for index in indices) for _, indices in rows]

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
        """Return the indices of a row's items, the target last; InputError if there are none."""
        parts = [part.strip() for part in f"{row.get('output_id')},{row.get('positive_item_id')}".split(",")]
        if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
            raise InputError(f"{where}: expected item indices in `output_id` and `positive_item_id`")
        indices = [int(part) for part in parts]
        if not all(1 <= index <= len(self._items) for index in indices):
            raise InputError(f"{where}: item index outside 1..{len(self._items)}: {indices}")
        return indices

    def _rows(self, *paths: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (file and number, row) of each row; one that is no object is counted and empty."""
        for path in paths:
            rows = read_whole_json(path, self.form.encoding)
            if not isinstance(rows, list) or not any(isinstance(row, dict) for row in rows):
                raise InputError(f"{path}: expected a list of objects, as the authors released it")
            for number, row in enumerate(rows, start=1):
                where = f"{path}, row {number}"
                if not isinstance(row, dict):
                    self.problems.add("row that is no object", where)
                yield where, row if isinstance(row, dict) else {}
