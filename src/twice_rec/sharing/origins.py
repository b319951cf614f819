"""What is known of the data sources, for the cards of models: where they come from, and their licence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where data comes from. `dataset` is its name on the hub."""

    name: str
    says: str
    licence: str
    dataset: str | None = None
    language: str | None = "en"
    language_name: str = "English"


_NO_LICENCE = (
    "no licence is known to us. Asked for one, its maintainers point to a discussion on the hub "
    "(https://github.com/hyp1231/AmazonReviews2023/issues/21), which we have not read; look at its terms before you "
    "publish this model or earn money with it."
)
_AMAZON = Origin(
    "Amazon Reviews 2023",
    "Reviews by customers of a shop, and descriptions by sellers (arXiv:2403.03952). That all are in English was not "
    "checked.",
    _NO_LICENCE,
    "McAuley-Lab/Amazon-Reviews-2023",
)
_UNKNOWN = Origin(
    "a source that this card does not know", "", "not known.", language=None, language_name="its own"
)  # fmt: skip

_ORIGINS: Mapping[str, Origin] = {
    "synthetic": Origin(
        "the synthetic domain of twice_rec", "A program made it up; no person wrote any of it.", "none is needed."
    ),
    "amazon2023": _AMAZON,
    "amazon2023_5core": _AMAZON,
    "release": Origin(
        "files that the paper's authors released",
        "They are drawn from Amazon Reviews 2023. That all texts are in English was not checked.",
        f"of the release, not known; of Amazon Reviews 2023, {_NO_LICENCE}",
        _AMAZON.dataset,
    ),
    "amazon2014": Origin(
        "Amazon review data of 2014 or 2018", "Reviews by customers of a shop.", "not known; look at its terms."
    ),
    "recbole": Origin(
        "files in RecBole's format",
        "Who made them is not known to this card.",
        "not known; it is that of the files.",
        language=None,
        language_name="that of the files",
    ),
}


def origin_of(source: str | None) -> Origin:
    """Return what is known of a source by its name in `prepare.yaml`."""
    return _ORIGINS.get(source or "", _UNKNOWN)
