"""What every source of interactions offers, so that filters and splits are written once.

A source is asked twice: first for a table of numbers (users, items, times, ratings), which fits in memory for tens of
millions of interactions, then for the texts of the few that the filters keep.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.interactions import InteractionTable, Row, TableBuilder, with_tidy_ids
from twice_rec.data.sources.problems import Problems
from twice_rec.data.sources.values import as_number
from twice_rec.data.sources.values import clean_text as clean_text  # every source needs it
from twice_rec.errors import InputError
from twice_rec.recipe import Settings, key, rule
from twice_rec.records import Item, TrueReasons, UserSequence

_FEWEST_JOINED = 0.01  # share of the reviewed items that the metadata must describe; two domains share next to none


class SourceFormat(Settings):
    """How the files of a source are written."""

    encoding: str = key("utf-8", "encoding of the source's files: utf-8, latin-1, gbk, utf-16, ...")
    rating_scale: list[float] = key([1, 5], "lowest and highest rating of the source; mapped to 1 to 5, others dropped")

    @rule
    def encoding_is_known(self) -> str | None:
        """Python can read the encoding."""
        try:
            "a".encode(self.encoding).decode(self.encoding)
        except (LookupError, ValueError):
            return (
                f"encoding is {self.encoding!r}, which Python does not know; use utf-8, latin-1, cp1252, gbk or utf-16"
            )
        return None

    @rule
    def rating_scale_has_two_ends(self) -> str | None:
        """A scale has a lowest and a highest rating."""
        if len(self.rating_scale) == 2 and self.rating_scale[0] < self.rating_scale[1]:
            return None
        return f"rating_scale is {self.rating_scale}; give the lowest and the highest rating, such as 1 5 or 1 10"


REGISTERED: dict[str, type[Source]] = {}  # name in the recipe -> class


@dataclass(eq=False)
class Source(ABC):
    """A place that interactions come from. `class CsvSource(Source, name="csv")` is the source that recipes call csv.

    Raises:
        InputError: if there is no such folder, or a file in it is missing or empty.
    """

    folder: Path
    domain: str  # what the usual names of the files hold
    reviews_file: str | None = None  # another name
    metadata_file: str | None = None
    metadata_required: bool = True  # whether a missing file is an error; without one no item has a title
    form: SourceFormat = field(default_factory=SourceFormat)

    reads_folder: ClassVar[bool] = True  # whether a recipe must set source_dir
    ties_in_file_order: ClassVar[bool] = False  # how interactions of one moment are ordered; else by item id
    scratch: Path | None = None  # folder for large files on the way, else they are the system's temporary ones
    or_else = ""  # what an error says if there is no folder, behind "pass --source_dir FOLDER"
    without_title = "item without title"  # what `problems` calls an item without title

    def __init_subclass__(cls, name: str) -> None:
        if cls.rows is Source.rows and cls.interactions is Source.interactions:
            raise TypeError(f"source {name}: {cls.__name__} needs rows, or interactions")
        REGISTERED[name] = cls

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise InputError(
                f"source_dir {self.folder.resolve()}: no such folder; pass --source_dir FOLDER{self.or_else}"
            )
        self.problems = Problems()  # what could not be used as it is
        self.interaction_files: list[Path] = []
        self.item_files: list[Path] = []
        self.find_files()

    @abstractmethod
    def find_files(self) -> None:
        """Set `interaction_files` and `item_files`."""

    def find_file(self, given: str | None, usual: Sequence[str], what: str) -> Path:
        """Return the given file or the first usual one (`{domain}` is filled in); InputError if missing or empty."""
        names = [given] if given else [name.replace("{domain}", self.domain) for name in usual]
        for path in (self.folder / name for name in names):
            if path.is_file():
                if path.stat().st_size == 0:
                    raise InputError(f"{path}: the file is empty; fetch it again")
                return path
        domains = [] if given else self._domains(usual)
        found = f"; the folder has the domain{'s' * (len(domains) > 1)} {', '.join(domains[:20])}" if domains else ""
        raise InputError(f"{self.folder}: no file with {what}; looked for {', '.join(names)}{found}")

    def _domains(self, usual: Sequence[str]) -> list[str]:
        """Return the domains whose files of these usual names are in the folder."""
        patterns = [re.escape(name).replace(r"\{domain\}", "(.+?)") for name in usual]  # the most special one first
        names = [path.name for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("meta_")]
        fits = (next(filter(None, (re.fullmatch(pattern, name) for pattern in patterns)), None) for name in names)
        return sorted({fit[1] for fit in fits if fit})

    @property
    def files(self) -> list[Path]:
        """The files that are read, for the manifest."""
        return [*self.interaction_files, *self.item_files]

    def generate(self, folder: Path) -> None:  # noqa: B027 - an optional step
        """Write the raw files of made-up data to `folder`, before anything is read. Other sources do nothing."""

    def rows(self) -> Iterator[Row]:
        """Yield the interactions in the order of the source; records that cannot be used go to `problems`.

        A source that makes a table at once has `interactions` and `review_texts` instead of `rows` and `reviews`; one
        with neither cannot be defined.
        """
        raise NotImplementedError(f"{type(self).__name__} makes its table at once")

    @abstractmethod
    def described(self, wanted: set[str], problems: Problems) -> Iterable[Item]:
        """Yield what the source says of the wanted items, each once; titles may be empty."""

    def interactions(self) -> InteractionTable:
        """Read all interactions, their ids tidied."""
        builder = TableBuilder()
        builder.add_rows(self.rows())
        return with_tidy_ids(builder.table(), self.problems)

    def rating(self, value: object, where: str) -> float | None:
        """Return a rating on the scale of 1 to 5; None, and counted, if it is no number on the source's scale."""
        low, high = self.form.rating_scale
        number = as_number(value)
        if number is None or not low <= number <= high:
            kind = f"review with a rating that is not {low:g} to {high:g}, kept without"
            self.problems.add(kind, f"{where}: {value!r}; see rating_scale")
            return None
        return 1 + 4 * (number - low) / (high - low) if (low, high) != (1, 5) else number

    def titled(self, wanted: set[str]) -> set[str]:
        """Return the ids that have a title; the wanted ones without are counted in `problems`.

        Raises:
            InputError: if the files describe next to none of the wanted items, as files of two domains do.
        """
        described, titled = self.described_ids(wanted)
        if self.item_files and described < _FEWEST_JOINED * len(wanted):
            read, items = (
                ", ".join(path.name for path in files) for files in (self.interaction_files, self.item_files)
            )
            raise InputError(
                f"{self.folder}: of the {len(wanted):,} items of {read}, {items} describes {described:,}; are they "
                "files of two domains? Name files of one by --domain, or --reviews_file and --metadata_file"
                + "".join(f"; {line}" for line in self.problems.lines()[:2])
            )
        if missing := wanted - titled:
            self.problems.add(self.without_title, min(missing), len(missing))
        return titled

    def described_ids(self, wanted: set[str]) -> tuple[int, set[str]]:
        """Return how many of the wanted items are described, and the ids of those that have a title."""
        described = [(item.item_id, bool(item.title)) for item in self.described(wanted, self.problems)]
        return len(described), {item_id for item_id, has_title in described if has_title}

    def items(self, wanted: set[str]) -> list[Item]:
        """Return the described items in the order of the catalogue, by id; titles may be empty.

        A source with its own numbering returns all its items, wanted or not, so that indices agree with it.
        """
        return sorted(self.described(wanted, Problems()), key=lambda item: item.item_id)

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Return (review title, review text) by `line`, for the wanted lines that have a review."""
        return {}

    def review_texts(self, lines: NDArray[np.int64]) -> pl.DataFrame:
        """Return the columns title and text of the reviews of these lines, in their order; empty without a review."""
        found = self.reviews(set(lines.tolist()))
        texts = [found.get(line, ("", "")) for line in lines.tolist()]
        return pl.DataFrame(texts, schema={"title": pl.String, "text": pl.String}, orient="row")

    def oracle_scores(self, sequences: Iterable[UserSequence], catalog: ItemCatalog) -> NDArray[np.float32] | None:
        """Return the true log-probabilities of the test targets [users, items], None if nobody knows them."""
        return None

    def true_reasons(self, sequences: Iterable[UserSequence]) -> Iterable[TrueReasons] | None:
        """Return what speaks for the test interactions, one record per user with one; None if nobody knows it."""
        return None
