"""The synthetic domain: a made-up grocery shop in the raw schema of Amazon Reviews 2023, with known true probabilities.

The next interaction of a user is drawn from softmax(u) over the items the user has not had yet. For user p and item i

    u(p, i) = taste * t(p, i) + complement * [category of i completes the last interaction's] + cohort * [same cohort]
              + popularity * b(i) + brand * f(brand of i)

- t: liked diets and brands count +1 each, disliked ones -1. Ratings and reviews say so in words.
- complements: each category calls for two others; item descriptions name them.
- cohort: users and items carry one of a few hidden labels that no text shows; only interactions reveal it.
- b: a standard normal draw per item.
- f: how sought-after a brand is by everyone, of mean 0 and variance 1 over the brands; no text shows it.

The five strengths are recipe keys. Everything is drawn from one seed. Only the oracle may look at
`next_item_log_probabilities`; a model sees what the raw files hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.amazon import Amazon2023
from twice_rec.files import write_jsonl
from twice_rec.progress import progress
from twice_rec.recipe import Settings, key
from twice_rec.records import TrueReasons, UserSequence

T = TypeVar("T")

# What a review tells: its rating, the kind of its title (`title_kinds`), and what its text says of the user's taste: a
# place in DIETS + BRANDS, and the feeling for it, 1 or -1.
ReviewCode = tuple[int, int, int, int]

# Category -> its product types.
PRODUCT_TYPES: dict[str, tuple[str, ...]] = {
    "Tea": ("Green Tea", "Black Tea", "Chai", "Oolong", "Rooibos"),
    "Coffee": ("Ground Coffee", "Espresso Beans", "Cold Brew", "Instant Coffee"),
    "Pasta": ("Penne", "Spaghetti", "Fusilli", "Lasagna Sheets"),
    "Sauces": ("Tomato Sauce", "Pesto", "Curry Sauce", "Salsa"),
    "Crackers": ("Rye Crackers", "Rice Crackers", "Seed Crackers", "Breadsticks"),
    "Spreads": ("Peanut Butter", "Almond Butter", "Apricot Jam", "Hummus"),
    "Cereal": ("Granola", "Muesli", "Corn Flakes", "Porridge Oats"),
    "Plant Milk": ("Oat Milk", "Almond Milk", "Soy Milk", "Coconut Milk"),
    "Chocolate": ("Dark Chocolate", "Milk Chocolate", "Truffles", "Cocoa Nibs"),
    "Snack Bars": ("Protein Bars", "Date Bars", "Nut Bars", "Oat Bars"),
    "Spices": ("Paprika", "Curry Powder", "Oregano", "Cinnamon"),
    "Rice": ("Basmati Rice", "Jasmine Rice", "Risotto Rice", "Wild Rice"),
}
CATEGORIES = tuple(PRODUCT_TYPES)
BRANDS = (
    "Alderbrook", "Birchway", "Calloway", "Dunmore", "Elmhurst", "Fairmoor", "Glenrock", "Hazelton",
    "Ironwood", "Juniper", "Kestrel", "Larkfield", "Marlowe", "Northgate", "Oakhaven", "Pinecrest",
)  # fmt: skip
DIETS = ("Organic", "Vegan", "Gluten Free", "Sugar Free", "Keto", "Low Sodium")
SIZES = ("Small Bag", "Large Bag", "Gift Box", "Value Box", "Twin Pack", "Family Pack", "Sampler")
COHORTS = 8
MIN_INTERACTIONS, MAX_INTERACTIONS = 6, 15  # per user
MAX_ITEMS = len(DIETS) * len(SIZES) * sum(map(len, PRODUCT_TYPES.values()))  # as many as there are titles

# Review titles; x is a diet or a brand.
PRAISE = ("Love that it is {x}", "{x} is what I look for", "Always happy with {x}")
BLAME = ("{x} is not for me", "I do not like {x}", "Never again {x}")
NEUTRAL_GOOD = ("Good product", "Does the job", "Would buy again")
NEUTRAL_BAD = ("Nothing special", "Expected more", "Just okay")
DIET_TASTES, BRAND_TASTES = (2, 1), (3, 2)  # how many every user likes and dislikes
_RATING, _PER_FEELING, _RATING_SPREAD = 3.4, 1.2, 0.6  # its mean without feelings, what each adds, its deviation
_START_MS = 1_577_836_800_000  # 2020-01-01
_DAY_MS = 86_400_000
_BATCH = 4096  # users at a time; bounds the memory of [B, N]


class SyntheticConfig(Settings):
    """The size of the synthetic domain, and the strengths of its five forces; 0 switches one off."""

    synthetic_users: int = key(20_000, "number of users of the synthetic domain", ge=1)
    synthetic_items: int = key(500, "number of items of the synthetic domain, no more than titles", ge=50, le=MAX_ITEMS)
    synthetic_taste: float = key(2.2, "strength of taste for diets and brands, which text shows")
    synthetic_complement: float = key(2.4, "strength of complements between categories, which text shows")
    synthetic_cohort: float = key(2.6, "strength of the hidden cohort, which only interactions show")
    synthetic_popularity: float = key(0.5, "strength of the popularity of single items")
    synthetic_brand: float = key(1.0, "strength of the popularity of brands, which only interactions show")


class SyntheticSource(Amazon2023, name="synthetic"):
    """The synthetic domain, written as raw files and then read as any domain of 2023 is."""

    reads_folder = False

    def __init__(self, config: SyntheticConfig, domain: str, seed: int):
        super().__init__(Path(), domain)
        self._config, self._seed = config, seed

    def find_files(self) -> None:
        """Find nothing: the files that Amazon2023 looks for are not there before `generate`."""

    def generate(self, folder: Path) -> None:
        """Draw the domain and write its raw files."""
        self._drawn = SyntheticDomain(self._config, self._seed)
        self._drawn.write(folder, self.domain)
        self.folder = folder
        super().find_files()

    @property
    def drawn(self) -> SyntheticDomain:
        """The domain with all that is hidden about it; there once `generate` has drawn it."""
        return self._drawn

    def oracle_scores(self, sequences: Iterable[UserSequence], catalog: ItemCatalog) -> NDArray[np.float32]:
        """See `SyntheticDomain.test_log_probabilities`."""
        return self._drawn.test_log_probabilities(list(sequences), catalog)

    def true_reasons(self, sequences: Iterable[UserSequence]) -> Iterator[TrueReasons]:
        """See `SyntheticDomain.test_reasons`."""
        return self._drawn.test_reasons(sequences)


class SyntheticDomain:
    """N items and U users with all that is hidden about them; an item is named by its position, not by an index."""

    def __init__(self, config: SyntheticConfig, seed: int):
        self.config = config
        # One generator per purpose, so that the items do not depend on the number of users.
        item_seed, user_seed, self._interaction_seed, self._review_seed = np.random.SeedSequence(seed).spawn(4)
        rng, n = np.random.default_rng(item_seed), config.synthetic_items  # the items
        titles: dict[tuple[int, int, int, int], None] = {}  # a title does not name the brand: each is used once
        while len(titles) < n:
            category = int(rng.integers(len(CATEGORIES)))
            kind = int(rng.integers(len(PRODUCT_TYPES[CATEGORIES[category]])))
            titles[category, kind, int(rng.integers(len(DIETS))), int(rng.integers(len(SIZES)))] = None
        self.category, self._kind, self.diet, self._size = np.array(list(titles)).T  # int [N] each
        self.brand = rng.integers(len(BRANDS), size=n)  # [N]
        self.cohort = rng.integers(COHORTS, size=n)  # [N]
        base = rng.standard_normal(n)  # [N], b of the formula
        self.price = rng.integers(200, 2500, size=n) / 100
        self.item_ids = _ids(rng, n, "B0", 8)  # like Amazon's ASINs
        self.complements = np.zeros((len(CATEGORIES), len(CATEGORIES)), dtype=bool)  # [C, C], row calls for column
        for row in range(len(CATEGORIES)):
            others = [c for c in range(len(CATEGORIES)) if c != row]
            self.complements[row, rng.choice(others, size=2, replace=False)] = True
        fame = rng.standard_normal(len(BRANDS))  # [B], f of the formula
        fame = (fame - fame.mean()) / fame.std()
        self.appeal = config.synthetic_popularity * base + config.synthetic_brand * fame[self.brand]  # [N]
        rng, u = np.random.default_rng(user_seed), config.synthetic_users  # the users
        self.user_cohort = rng.integers(COHORTS, size=u)  # [U]
        self.diet_taste = _tastes(rng, u, len(DIETS), *DIET_TASTES)  # [U, D]
        self.brand_taste = _tastes(rng, u, len(BRANDS), *BRAND_TASTES)  # [U, B]
        self.num_interactions = rng.integers(MIN_INTERACTIONS, MAX_INTERACTIONS + 1, size=u)  # [U]
        self.user_ids = _ids(rng, u, "A", 27)
        self._codes: list[Any] = [None] * u

    def taste(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return t(p, i) of the formula: float32 [len(users), N], between -2 and 2."""
        return self.diet_taste[users][:, self.diet] + self.brand_taste[users][:, self.brand]

    def next_item_log_probabilities(
        self, users: Sequence[int] | NDArray[np.int64], histories: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """Return the true log-probabilities of each user's next interaction: float32 [B, N], -inf for the history.

        Args:
            users: [B], positions in `user_ids`.
            histories: [B], item positions (0..N-1) so far, in order; may be empty.
        """
        config, people = self.config, np.asarray(users, dtype=np.int64)  # [B]
        utility = config.synthetic_taste * self.taste(people)  # [B, N]
        utility += config.synthetic_cohort * (self.user_cohort[people][:, None] == self.cohort[None, :])
        utility += self.appeal.astype(np.float32)[None, :]
        for row, history in enumerate(histories):
            if len(history):
                called_for = self.complements[self.category[history[-1]], self.category]  # [N]
                utility[row] += config.synthetic_complement * called_for
                utility[row, list(history)] = -np.inf
        top = utility.max(axis=1, keepdims=True)  # [B, 1]
        return utility - top - np.log(np.exp(utility - top).sum(axis=1, keepdims=True))

    @cached_property
    def histories(self) -> list[list[int]]:
        """Every user's interactions in order, as item positions. Users are drawn together, one step at a time."""
        rng = np.random.default_rng(self._interaction_seed)
        histories: list[list[int]] = [[] for _ in range(self.config.synthetic_users)]
        for step in range(int(self.num_interactions.max())):
            active = np.flatnonzero(self.num_interactions > step)
            for start in range(0, len(active), _BATCH):
                part = active[start : start + _BATCH]  # [B]
                logs = self.next_item_log_probabilities(part, [histories[user] for user in part])  # [B, N]
                # Adding Gumbel noise and taking the largest draws from the softmax.
                noise = rng.gumbel(size=logs.shape).astype(np.float32)  # [B, N]
                for user, item in zip(part.tolist(), (logs + noise).argmax(axis=1).tolist(), strict=True):
                    histories[user].append(item)
        return histories

    def test_log_probabilities(self, sequences: Sequence[UserSequence], catalog: ItemCatalog) -> NDArray[np.float32]:
        """Return the oracle's scores: float32 [len(sequences), len(catalog)], column j for catalogue index j + 1.

        They are the true log-probabilities of the test target, or of the interaction after the last if there is none.
        """
        user_at, item_at = ({one: at for at, one in enumerate(ids)} for ids in (self.user_ids, self.item_ids))
        columns = [item_at[item_id] for item_id in catalog.ids]
        users = [user_at[sequence.user_id] for sequence in sequences]
        histories = []
        for user, sequence in zip(users, sequences, strict=True):
            past = self.histories[user]
            end = len(past) if sequence.test is None else past.index(item_at[sequence.target("test").item_id])
            histories.append(past[:end])
        parts = (slice(start, start + _BATCH) for start in range(0, len(users), _BATCH))
        return np.concatenate(
            [self.next_item_log_probabilities(users[part], histories[part])[:, columns] for part in parts]
        )

    def test_reasons(self, sequences: Iterable[UserSequence]) -> Iterator[TrueReasons]:
        """Yield what speaks for and against each item as the test interaction of each user who has one.

        Cohort and popularity do too, but no text shows them.
        """
        user_at, item_at = ({one: at for at, one in enumerate(ids)} for ids in (self.user_ids, self.item_ids))
        for sequence in sequences:
            if sequence.test is not None:
                user = user_at[sequence.user_id]
                past = self.histories[user]
                last = past[past.index(item_at[sequence.target("test").item_id]) - 1]
                tastes = dict(zip((*DIETS, *BRANDS), (*self.diet_taste[user], *self.brand_taste[user]), strict=True))
                likes, dislikes = (tuple(name for name in tastes if tastes[name] == sign) for sign in (1, -1))
                called_for = np.flatnonzero(self.complements[self.category[last]]).tolist()
                yield TrueReasons(sequence.user_id, likes, dislikes, tuple(CATEGORIES[c] for c in called_for))

    def metadata(self) -> Iterator[dict[str, Any]]:
        """Yield one record per item, in the schema of the raw metadata of 2023."""
        for j, item_id in enumerate(self.item_ids):
            category = CATEGORIES[self.category[j]]
            kind = PRODUCT_TYPES[category][self._kind[j]]
            brand, diet, size = BRANDS[self.brand[j]], DIETS[self.diet[j]], SIZES[self._size[j]]
            calls_for = " and ".join(CATEGORIES[c] for c in np.flatnonzero(self.complements[self.category[j]]))
            yield {
                "main_category": "Grocery",
                "title": f"{diet} {kind}, {size}",
                "average_rating": 4.0,
                "rating_number": 0,
                "features": [diet, f"Made by {brand}"],
                "description": [f"{kind} for every day. Goes well with {calls_for}."],
                "price": float(self.price[j]),
                "images": [],
                "videos": [],
                "store": brand,
                "categories": ["Grocery & Gourmet Food", category],
                "details": {"Brand": brand, "Diet": diet, "Category": category},
                "parent_asin": item_id,
                "bought_together": None,
            }

    def reviews(self) -> Iterator[dict[str, Any]]:
        """Yield one record per interaction, in the schema of the raw reviews of 2023, user after user."""
        rng = np.random.default_rng(self._review_seed)
        for user, history in enumerate(self.histories):
            codes = []
            draws = rng.random((len(history) + 1, 8)).tolist()
            noise = rng.standard_normal(len(history)).tolist()
            time = _START_MS + int(draws[-1][0] * 365 * _DAY_MS)
            for item, draw, deviation in zip(history, draws, noise, strict=False):
                time += int((1 + 29 * draw[0]) * _DAY_MS)
                rating, title, text, code = self._review(user, item, deviation, draw[1:6])
                codes.append(code)
                yield {
                    "rating": float(rating),
                    "title": title,
                    "text": text,
                    "images": [],
                    "asin": self.item_ids[item],
                    "parent_asin": self.item_ids[item],
                    "user_id": self.user_ids[user],
                    "timestamp": time,
                    "helpful_vote": int(3 * draw[6]),
                    "verified_purchase": draw[7] < 0.95,
                }
            self._codes[user] = codes

    def _review(
        self, user: int, item: int, deviation: float, draw: Sequence[float]
    ) -> tuple[int, str, str, ReviewCode]:
        """Return rating, title and text that agree with the user's taste for the item's diet and brand; what they tell.

        Args:
            deviation: a standard normal draw, for whatever else moves the rating.
            draw: five uniform draws that choose words.
        """
        diet = float(self.diet_taste[user, self.diet[item]])
        brand = float(self.brand_taste[user, self.brand[item]])
        rating = min(5, max(1, round(_RATING + _PER_FEELING * (diet + brand) + _RATING_SPREAD * deviation)))
        kind = _pick(title_kinds(diet, brand, rating), draw[0])
        words = (NEUTRAL_GOOD, NEUTRAL_BAD, PRAISE, PRAISE, BLAME, BLAME)[kind]
        title = _pick(words, draw[1]).format(x=BRANDS[self.brand[item]] if kind % 2 else DIETS[self.diet[item]])
        # The text is about the user's taste at large, whatever the item.
        names, taste = _pick(((DIETS, self.diet_taste[user]), (BRANDS, self.brand_taste[user])), draw[2])
        spoken: int = _pick(np.flatnonzero(taste), draw[3])
        verb = "I usually buy" if taste[spoken] > 0 else "I usually avoid"
        code = (rating, kind, int(spoken) + (len(DIETS) if names is BRANDS else 0), int(taste[spoken]))
        return rating, title, f"{title}. {verb} {names[spoken]}.", code

    def review_codes(self) -> list[list[ReviewCode]]:
        """Return what the reviews tell, per user and interaction; writes them first if nobody has."""
        if None in self._codes:
            for _ in self.reviews():
                pass
        return self._codes

    def write(self, folder: Path, domain: str) -> None:
        """Write `<domain>.jsonl` and `meta_<domain>.jsonl`, the files of the 2023 set."""
        for name, rows in ((f"meta_{domain}.jsonl", self.metadata()), (f"{domain}.jsonl", self.reviews())):
            write_jsonl(folder / name, progress(rows, desc=f"writing {name}", unit="row"))


def review_probabilities() -> NDArray[np.float64]:
    """Return the probability of each rating and kind of title of a review, given the feelings for the item.

    [5, 6, 3, 3]: rating 1 to 5, kind of title, feeling for the diet 1, 0 or -1, feeling for the brand.
    """
    table = np.zeros((5, 6, 3, 3))
    for i, diet in enumerate((1, 0, -1)):
        for j, brand in enumerate((1, 0, -1)):
            mean = _RATING + _PER_FEELING * (diet + brand)
            below = [0.0, *(_normal((edge - mean) / _RATING_SPREAD) for edge in (1.5, 2.5, 3.5, 4.5)), 1.0]
            for rating in range(1, 6):
                kinds = title_kinds(diet, brand, rating)
                table[rating - 1, kinds, i, j] = (below[rating] - below[rating - 1]) / len(kinds)
    return table


def title_kinds(diet: float, brand: float, rating: int) -> list[int]:
    """Return the kinds of title that a review may have, each as likely, given the feelings for diet and brand.

    A title speaks of a feeling that goes with the rating: 2 praises the diet, 3 the brand, 4 blames the diet, 5 the
    brand. If there is none, it says nothing of taste: 0 is good, 1 bad.
    """
    felt = [
        (which, feeling) for which, feeling in ((0, diet), (1, brand)) if feeling and (feeling > 0) == (rating >= 3)
    ]
    return [(2 if feeling > 0 else 4) + which for which, feeling in felt] or [0 if rating >= 4 else 1]


def _normal(value: float) -> float:
    """Return the probability that a standard normal draw is below a value."""
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _pick(options: Sequence[T] | NDArray[Any], draw: float) -> T:
    """Return the option that a uniform draw in [0, 1) falls on."""
    return options[int(draw * len(options))]


def _ids(rng: np.random.Generator, count: int, prefix: str, length: int) -> list[str]:
    """Return distinct ids of capital letters and digits behind a prefix."""
    alphabet = np.array(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[prefix + "".join(alphabet[rng.integers(36, size=length)])] = None
    return list(ids)


def _tastes(rng: np.random.Generator, users: int, things: int, liked: int, disliked: int) -> NDArray[np.float32]:
    """Return float32 [users, things]: +1 for `liked` random things of each user, -1 for `disliked` others."""
    order = rng.permuted(np.tile(np.arange(things), (users, 1)), axis=1)
    taste = np.zeros((users, things), dtype=np.float32)
    np.put_along_axis(taste, order[:, :liked], 1.0, axis=1)
    np.put_along_axis(taste, order[:, liked : liked + disliked], -1.0, axis=1)
    return taste
