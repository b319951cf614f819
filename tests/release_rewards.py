"""The authors' reward formulas, written anew from reference/PAPER.md (sections 2, 3 and 5), with none of our code.

A match is decided by the id, the confidence is looked up by the title among all items of the catalogue (of items that
share a title the last one's), the first element of each kind is read, and any failure makes the reward 0.
"""

import math
import re


def _element(tag, text):
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found and found.group(1).strip()


def collaborative(text, target_id, logits, titles, lambda_, tau):
    """Eq. 2. `logits`: item id -> SASRec's score for this user; `titles`: item id -> title."""
    id_of_title = {title: item_id for item_id, title in titles.items()}
    try:
        confidence = 1 / (1 + math.exp(-logits[id_of_title[_element("item_nm", text)]]))
    except KeyError:
        return 0.0
    if _element("item_id", text) == target_id:
        return 1 + lambda_ * confidence if confidence >= tau else 1.0
    return confidence if confidence >= tau else 0.0


def structure(text):
    """Eq. 3."""
    return float(all(_element(tag, text) for tag in ("think", "item_nm", "item_id")))


_TAGS = [f"<{end}{tag}>" for tag in ("think", "item_nm", "item_id") for end in ("", "/")]


def tags(text):
    """Eq. 4 with six tags."""
    return sum(0.25 for tag in _TAGS if text.count(tag) == 1)


def only_expected_tags(text):
    """The third format reward."""
    return float(all(tag in _TAGS for tag in re.findall(r"</?[A-Za-z_]\w*>", text)))
