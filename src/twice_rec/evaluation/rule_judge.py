"""A judge of rationales for the synthetic domain that is no model: it knows what truly speaks for an interaction.

It reads the claims of a rationale by the words of the domain (its diets, brands and categories), whoever wrote it:

- A taste: a diet or brand with a word of liking or disliking before it in its sentence (`likes`, `always happy with`,
  `does not like`, `avoids`), or behind it if there is none before (`Keto is not for me`).
- A call: a category, or one of its product types, behind a word that leads from the history to what comes next (`so`,
  `calls for`, `goes well with`) in its sentence. A category elsewhere is about the past.
- A whole product title makes no claim, and a name without such a word makes none either, so that a list of all names
  earns nothing.

A claim is true or false of the user, by the tastes and complements that the interactions were drawn from. A liking is
true of what the user likes, a disliking of what the user dislikes, a call of a category that completes the last
interaction's. The last interaction's own category is never false, wherever it stands; another category of the past is
false if no interaction of the history has it and nothing calls for it. A true liking or call that the item has is a
named reason for it. What speaks against the item is whatever the user dislikes about it, whether the rationale says so
or not: reasons for a product whose diet and brand the user avoids satisfy nobody.

Scores: 0, the answer is malformed, or its item is not in the catalogue (any judge; looked up before it is asked).
3, at least two reasons for the item are named, nothing false is said, and nothing speaks against the item. 2, there
are more named reasons than false claims and things against it. 1, anything else. So an item for which there is one
reason gets no 3, whatever is said: a 3 for naming all reasons there are would set such an item above one with two
reasons of which one is named.

Limits: it reads words, not meaning, and not which interaction a claim cites; a reason that is true but that no review
of the history shows counts as one that could have been named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.synthetic import BRANDS, DIETS, PRODUCT_TYPES, SIZES
from twice_rec.random_streams import random_stream
from twice_rec.rationales.reading import attributes
from twice_rec.records import Example, Item, TrueReasons

_WANT = (
    r"(?:likes?|liked|loves?|loved|prefers?|preferred|enjoys?|enjoyed|wants?|wanted|buys?|favou?rs?|fond|keen|happy)"
)
_BAD = (
    r"dislikes?|disliked|hates?|hated|avoids?|avoided|avoiding|rejects?|rejected|blames?|blamed|complains?|complained|"
    r"disappoint\w*|averse|aversion|against|tired of|fed up with|never again|not for"
)
_GOOD = (
    rf"{_WANT}|looks? for|looking for|look for|praises?|praised|favou?rites?|liking|love of|taste for|fan of|"
    r"appreciates?|appreciated|values?|valued|seeks?|chooses?|returns? to|sticks? to|keeps? buying"
)
_NOT = rf"(?:not|never|no longer|hardly|n't|n’t)\s+(?:\w+\s+){{0,2}}?{_WANT}"
_CUE = re.compile(rf"(?P<bad>{_NOT}|\b(?:{_BAD})\b)|(?P<good>\b(?:{_GOOD})\b)", re.IGNORECASE)
_LEADS_ON = re.compile(
    r"\b(?:so|thus|therefore|hence|then|next|calls? for|called for|calling for|goes (?:well )?with|go (?:well )?with|"
    r"pairs? (?:well )?with|suggests?|asks? for|needs?|completes?|completed by|complements?|leads? to)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")


def _named(names: Sequence[str]) -> str:
    """Return a pattern of any of these names, the longest first, with a blank or a hyphen between their words."""
    return "|".join(re.escape(name).replace(r"\ ", r"[\s-]+") for name in sorted(names, key=len, reverse=True))


_CATEGORY_OF = {kind.lower(): category for category, kinds in PRODUCT_TYPES.items() for kind in (*kinds, category)}
_NAME_OF = {name.lower(): name for name in (*DIETS, *BRANDS)}
_TITLE = re.compile(
    rf"\b(?:{_named(DIETS)})[\s-]+(?:{_named(list(_CATEGORY_OF))}),?\s+(?:{_named(SIZES)})\b", re.IGNORECASE
)
_MENTION = re.compile(
    rf"\b(?:(?P<taste>{_named(list(_NAME_OF))})|(?P<category>{_named(list(_CATEGORY_OF))}))\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a rationale says about a diet, brand or category: that it is liked, disliked, called for, or in the past."""

    says: str  # likes, dislikes, calls for, past
    name: str


def claims_of(text: str) -> list[Claim]:
    """Return the claims of a rationale in their order, each once."""
    return list(dict.fromkeys(claim for sentence in _SENTENCE_END.split(text) for claim in _claims_in(sentence)))


def _claims_in(sentence: str) -> Iterator[Claim]:
    sentence = _TITLE.sub(" ", sentence)
    mentions = list(_MENTION.finditer(sentence))
    inside = [match.span() for match in mentions]  # a cue in a name is none
    cues = [c for c in _CUE.finditer(sentence) if not any(a <= c.start() < b for a, b in inside)]
    leads_on = next((match.end() for match in _LEADS_ON.finditer(sentence)), len(sentence))
    for match in mentions:
        name = " ".join(re.split(r"[\s-]+", match[0].lower()))
        if match["category"]:
            yield Claim("calls for" if match.start() >= leads_on else "past", _CATEGORY_OF[name])
        else:
            before = [cue for cue in cues if cue.end() <= match.start()]
            if cue := before[-1] if before else next(iter(cues), None):
                yield Claim("dislikes" if cue["bad"] else "likes", _NAME_OF[name])


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rationale says for and against one item, by what is true of the user."""

    named: tuple[str, ...]  # true reasons for the item that it names
    missing: tuple[str, ...]  # those that it does not name
    false: tuple[Claim, ...]
    against: tuple[str, ...]  # what the user dislikes about the item, said or not

    @property
    def score(self) -> int:
        """1 to 3, see the module."""
        wrong = len(self.false) + len(self.against)
        if len(self.named) >= 2 and not wrong:
            return 3
        return 2 if len(self.named) > wrong else 1

    def __str__(self) -> str:
        wrong = [f"{claim.says} {claim.name}" for claim in self.false]
        parts = {"names": self.named, "leaves out": self.missing, "false": wrong, "against": self.against}
        return "; ".join(f"{says} {', '.join(names)}" for says, names in parts.items() if names) or "names nothing true"


class RuleJudge:
    """Judges by the true reasons of the synthetic domain.

    Args:
        reasons: user -> what speaks for the test interaction.
        seed: of the draws between candidates that a rationale fits equally.
    """

    def __init__(self, catalog: ItemCatalog, reasons: Mapping[str, TrueReasons], seed: int):
        self._catalog, self._reasons, self._seed = catalog, reasons, seed

    def read(self, text: str, example: Example, item: Item) -> Reading:
        """Hold a rationale against what is true of a user, and against an item."""
        true = self._reasons[example.user_id]
        past = [self._catalog[entry.item_id].categories[-1] for entry in example.history]
        claims, own = claims_of(text), set(attributes(item))
        holds = {
            "likes": set(true.likes), "dislikes": set(true.dislikes),
            "calls for": {*true.calls_for, past[-1]}, "past": {*true.calls_for, *past},
        }  # fmt: skip
        reasons = [name for name in (*true.likes, *true.calls_for) if name in own]
        said = {claim.name for claim in claims if claim.says in ("likes", "calls for")}
        return Reading(
            named=tuple(name for name in reasons if name in said),
            missing=tuple(name for name in reasons if name not in said),
            false=tuple(claim for claim in claims if claim.name not in holds[claim.says]),
            against=tuple(name for name in true.dislikes if name in own),
        )

    def score(self, text: str, example: Example, item: Item) -> tuple[int, str]:
        """Return the score of a rationale, 1 to 3, and what decides it."""
        reading = self.read(text, example, item)
        return reading.score, str(reading)

    def choose(self, text: str, example: Example) -> tuple[str, str]:
        """Return the candidate that a rationale fits best, and why: most claims for it less claims against it.

        It knows nothing true of the user here. Equals are drawn from.
        """
        claims = claims_of(text)
        signs = {"likes": 1, "calls for": 1, "dislikes": -1, "past": 0}
        fit = {}
        for item_id in example.candidates:
            own = set(attributes(self._catalog[item_id]))
            fit[item_id] = sum(signs[claim.says] for claim in claims if claim.name in own)
        best = [item_id for item_id in example.candidates if fit[item_id] == max(fit.values())]
        drawn = random_stream(self._seed, "candidate of a rule judge", example.user_id).integers(len(best))
        return best[int(drawn)], f"fits {max(fit.values())} claims, as do {len(best) - 1} others"
