"""The words by which the products of a catalogue are alike, learned from its own titles.

A theme is a word or a pair of words that several titles have: `organic`, `gluten-free`, `coconut milk`. Plurals count
as their singular. A product's kind is the theme with which a part of its title ends, since titles name the thing last
(`... medium roast ground coffee, 12-ounce bag`): a theme is a kind if titles' parts often end with it. Measures, brands
and words of packaging are no themes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from twice_rec.catalog import ItemCatalog
from twice_rec.records import Item

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?(?:-[^\W_]+)*|[^\w\s]")
_DETAIL = re.compile(r'"([^"]+)": "([^"]*)"')
_BRAND_KEYS = ("Brand", "Manufacturer")
_SAYS_LITTLE = """
    a about all also always an and any approved are artificial as assorted assortment at available bag bags base
    basket be best better both bottle bottles box boxed boxes brand bulk bundle but buy by can canister cans carton
    case cases certified choice classic collection company compatible contain container contains count ct current
    day days deal delicious dimension dimensions discontinued each edition every farm farms favorite favorites
    favourite fed fl flavor flavors flavour flavours floz fluid food foods for free friendly from full gal gallon
    gift gm good gr grade gram grams great healthy ideal imported in inc inch inches including individual
    individually ingredients is it item its jar jars kg kit kitchen large lb lbs like lite liter llc look looking
    low made made-in manufacturer market may mega mini mix mixed ml more most my natural new no non not of off old
    on one only or original ounce ounces our oz pack packaged packaging packed packet packets packs per perfect
    piece pieces pk plus pouch pouches pound pounds premium product products project pure quality quart ready real
    resealable sampler sealed seen serve serving servings set shipping shop single size sized small snack-size store
    style super supplies supply tank than that the their them these this tin tins to total tub tube two up upc us
    use value varieties variety various vary verified very was we with without wrapped x you your zero
"""  # measures, packaging, praise, and the small words
_NO_THEME = frozenset(_SAYS_LITTLE.split())
_FEWEST_TITLES = 4  # a theme is in at least so many titles
_LARGEST_SHARE = 0.2  # and in at most this share of them, if the catalogue is large
_ENDS = 0.3  # a theme is a kind if it ends a part in this share of its titles
_STARTS = 0.6  # a word that is first in this share of its titles is a brand's, unless it often ends parts
_SMALL = 50  # titles; a smaller catalogue's words are all themes
_PASSED_OVER = {"flavored", "flavoured", "added", "scented"}  # what they say of the thing is in the words around them
_LACKS = {"no", "non", "low", "zero"}
_TOGETHER = 0.15  # two words are a theme if their joint titles are this share of those of either word


def singular(word: str) -> str:
    """Return a word without the ending of a plural: `cookies` and `cookie` are one theme."""
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y" if word[-4] not in "aeiok" else word[:-1]
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "oes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def title_parts(text: str) -> Iterator[list[str]]:
    """Yield runs of words of a title, as they are written. What is no theme, and any mark, ends a run.

    What something is without is one word: `sugar free`, `no added sugar` and `low carb` say nothing of sugar.
    """
    run: list[str] = []
    before = ""
    for word in [*_WORD.findall(text.lower().replace("\u2019", "'").replace("w/", "with ")), "."]:
        if word in _PASSED_OVER:
            continue
        if word == "free" and run:
            run[-1] += "-free"
        elif _is_telling(word):
            run.append(f"{before}-{word}" if before else word)
        elif run:
            yield run
            run = []
        before = word if word in _LACKS else ""


def brand_of(item: Item) -> str:
    """Return an item's brand as its record or its details have it; empty if they have none."""
    found = dict(reversed(_DETAIL.findall(item.details)))
    return item.brand or next((found[name] for name in _BRAND_KEYS if found.get(name)), "")


class Vocabulary:
    """The themes and kinds of a catalogue.

    Args:
        texts: all that prompts show of each item, by which themes are weighed; its titles if None.
    """

    def __init__(self, catalog: ItemCatalog, texts: Iterable[str] | None = None):
        words, pairs, ends, starts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        written = Counter[tuple[str, str]]()  # (theme, how it is written) -> titles
        for item in catalog:
            parts, brand = list(title_parts(item.title)), _brand_stems(item)
            stems = [[stem for stem in _stems(part) if stem not in brand] for part in parts]
            words.update({stem for part in stems for stem in part})
            pairs.update({pair for part in stems for pair in _pairs(part)})
            ends.update({end for part in stems if len(part) > 1 for end in (part[-1], " ".join(part[-2:]))})
            starts.update([_stems(parts[0])[0]] if parts else [])
            written.update({(singular(word), word) for part in parts for word in part})
            written.update({(" ".join(_stems(pair)), " ".join(pair)) for part in parts for pair in pairwise(part)})
        self._size = len(catalog)
        few = self._size < _SMALL
        fewest, most = (1, self._size) if few else (_FEWEST_TITLES, _LARGEST_SHARE * self._size)
        names = {word for word in words if starts[word] >= _STARTS * words[word] and ends[word] < _ENDS * words[word]}
        self._counts = {  # theme -> titles, or texts, that have it
            word: count for word, count in words.items() if fewest <= count <= most and (few or word not in names)
        }
        for pair, count in pairs.items():
            first, second = pair.split()
            together = count >= _TOGETHER * min(words[first], words[second])
            if fewest <= count <= most and together and not {first, second} & (set() if few else names):
                self._counts[pair] = count
        self._kinds = {theme for theme, count in self._counts.items() if ends[theme] >= _ENDS * count}
        self._written: dict[str, str] = {}
        for theme, form in sorted(written, key=lambda entry: (-written[entry], entry)):
            self._written.setdefault(theme, form)
        if texts is not None:
            shown = Counter(theme for text in texts for theme in self.themes(text))
            self._counts = {theme: count for theme, count in shown.items() if count <= most}

    def themes(self, text: str) -> list[str]:
        """Return the themes of a text, pairs before the words that they hold, each once."""
        found: list[str] = []
        for part in title_parts(text):
            stems = _stems(part)
            found += [theme for theme in (*_pairs(stems), *stems) if theme in self._counts]
        return list(dict.fromkeys(found))

    def kind(self, item: Item) -> str | None:
        """Return what an item is, by the first kind that ends a part of its title; None if there is none."""
        for part in title_parts(item.title):
            stems = _stems(part)
            if kind := next((end for end in (" ".join(stems[-2:]), stems[-1]) if end in self._kinds), None):
                return kind
        return None

    def weight(self, theme: str) -> float:
        """Return how much it says that two products share a theme: the log of the catalogue's size over its texts."""
        return math.log(self._size / self._counts[theme]) if theme in self._counts else 0.0

    def written(self, theme: str) -> str:
        """Return a theme as most titles write it."""
        return self._written.get(theme, theme)

    @property
    def all_themes(self) -> list[str]:
        """All themes."""
        return list(self._counts)


def _is_telling(word: str) -> bool:
    return len(word) > 2 and word not in _NO_THEME and not any(character.isdigit() for character in word)


def stems_of(text: str) -> list[str]:
    """Return the words of a text that can be themes, without their plurals."""
    return [stem for part in title_parts(text) for stem in _stems(part)]


def _stems(part: Sequence[str]) -> list[str]:
    return [singular(word) for word in part]


def _pairs(stems: Sequence[str]) -> list[str]:
    return [f"{first} {second}" for first, second in pairwise(stems)]


def _brand_stems(item: Item) -> set[str]:
    return {singular(word) for word in _WORD.findall(brand_of(item).lower())}
