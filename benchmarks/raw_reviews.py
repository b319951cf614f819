"""Made-up raw files in the true schema of Amazon Reviews 2023, of any size; what `prepare.py` measures with.

Users and items have power-law counts. As in the real domains there are about half as many users as reviews and one item
per 24 reviews, and a 5-core of about 27 % of the reviews remains. Review texts are log-normal with a mean of 200
characters; some hold HTML, escapes and letters beyond ASCII.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DOMAIN = "Generated"
# Words as JSON strings hold them.
_COMMON = """tea coffee the a is it good very fresh and for my we love this taste bag box price not too sweet great
product would buy again arrived late but packed well kids enjoy them every morning with milk don't flavor, smell.
strong! really? (organic) gluten-free 5-pack I\\u2019m"""
_WORDS = [*_COMMON.split(), '\\"best\\"', "&amp;", "<br", "/>", "caf\\u00e9", "\\ud83d\\ude0a"]
_RARE = 6  # how many of the last words are rare
_PER_USER, _STEEPNESS = 40, 2.3  # most reviews of a user; P(n) ~ n ** -steepness
_START_MS, _SPAN_MS = 1_262_304_000_000, 430_000_000_000  # 2010, thirteen years and more
_CHUNK = 100_000  # rows that are written at once


class Text:
    """A long text of which pieces of whole words are taken; JSON escapes included."""

    def __init__(self, rng: np.random.Generator, words: int = 200_000):
        weights = np.r_[np.ones(len(_WORDS) - _RARE), np.full(_RARE, 0.05)]
        drawn = [_WORDS[i] for i in rng.choice(len(_WORDS), size=words, p=weights / weights.sum())]
        self.whole = " ".join(drawn)
        self._begins = np.r_[0, np.cumsum([len(word) + 1 for word in drawn])][:-1]  # [words]

    def pieces(self, rng: np.random.Generator, lengths: NDArray[np.int64]) -> list[str]:
        """Texts of about these lengths in characters."""
        first = rng.integers(len(self._begins) - 5000, size=len(lengths))
        begins = self._begins[first]
        last = np.minimum(np.searchsorted(self._begins, begins + lengths), len(self._begins) - 1)
        ends = np.maximum(self._begins[last] - 1, begins)
        whole = self.whole
        return [whole[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


def write(folder: Path, reviews: int, seed: int = 0) -> None:
    """Write `Generated.jsonl` and `meta_Generated.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    items = max(200, int(reviews * 0.042))
    _write_reviews(folder / f"{DOMAIN}.jsonl", rng, reviews, items)
    _write_metadata(folder / f"meta_{DOMAIN}.jsonl", rng, items)


def _item_id(number: int) -> str:
    return f"B{number * 2_654_435_761 % 2**32:09X}"


def _counts(rng: np.random.Generator, reviews: int) -> NDArray[np.int64]:
    """How many reviews each user has written."""
    sizes = np.arange(1, _PER_USER + 1)
    shares = sizes**-_STEEPNESS
    counts = rng.choice(sizes, size=reviews, p=shares / shares.sum())
    return counts[: np.searchsorted(np.cumsum(counts), reviews) + 1]


def _write_reviews(path: Path, rng: np.random.Generator, reviews: int, items: int) -> None:
    user = np.repeat(np.arange(n := len(counts := _counts(rng, reviews))), counts)[:reviews]
    names = rng.integers(36**8, size=n)
    weights = np.cumsum((np.arange(1, items + 1) + items / 300) ** -1.0)
    text = Text(rng)
    with open(path, "w", encoding="utf-8") as out:
        for start in range(0, reviews, _CHUNK):
            part = user[start : start + _CHUNK]
            size = len(part)
            item = np.searchsorted(weights, rng.random(size) * weights[-1])
            columns = (
                rng.choice([1, 2, 3, 4, 5], size=size, p=[0.1, 0.05, 0.08, 0.14, 0.63]),
                text.pieces(rng, np.maximum(4, rng.lognormal(2.7, 0.6, size)).astype(np.int64)),
                text.pieces(rng, np.maximum(4, rng.lognormal(4.8, 1.0, size)).astype(np.int64)),
                item,
                part,
                names[part],
                _START_MS + rng.integers(_SPAN_MS, size=size),
                rng.poisson(0.5, size),
                rng.random(size) < 0.93,
            )
            listed = (column if isinstance(column, list) else column.tolist() for column in columns)
            out.writelines(
                f'{{"rating": {rating}.0, "title": "{title}", "text": "{words}", "images": [], "asin": '
                f'"{_item_id(at)}", "parent_asin": "{_item_id(at)}", "user_id": "AE{who:09d}{name:013d}", '
                f'"timestamp": {time}, "helpful_vote": {votes}, "verified_purchase": {str(bought).lower()}}}\n'
                for rating, title, words, at, who, name, time, votes, bought in zip(*listed, strict=True)
            )


def _write_metadata(path: Path, rng: np.random.Generator, items: int) -> None:
    text = Text(rng, 50_000)
    image = "https://m.media-amazon.com/images/I/{}._AC_SL1500_.jpg"
    with open(path, "w", encoding="utf-8") as out:
        for start in range(0, items, _CHUNK):
            size = min(_CHUNK, items - start)
            fields = [text.pieces(rng, np.full(size, length)) for length in (70, 400, 90, 90, 90)]
            prices = rng.random(size).round(2).tolist()
            for row in range(size):
                title, description, *features = (json.loads(f'"{field[row]}"') for field in fields)
                number, price = start + row, prices[row]
                urls = {kind: image.format(f"{kind}{number}") for kind in ("thumb", "large", "hi_res")}
                record = {
                    "main_category": "Grocery",
                    "title": title if row % 500 else "",
                    "average_rating": 4.3,
                    "rating_number": 17,
                    "features": features,
                    "description": [description],
                    "price": None if price < 0.5 else round(price * 40, 2),
                    "images": [{**urls, "variant": f"PT{at:02d}"} for at in range(4)],
                    "videos": [{"title": "a video", "url": image, "user_id": "/shop/x"}] if row % 3 == 0 else [],
                    "store": f"Store {number % 5000}",
                    "categories": ["Grocery & Gourmet Food", "Beverages", f"Kind {number % 100}"],
                    "details": {"Brand": f"Store {number % 5000}", "Item Weight": "12 ounces", "Rank": {"Tea": number}},
                    "parent_asin": _item_id(number),
                    "bought_together": None,
                }
                out.write(json.dumps(record) + "\n")
