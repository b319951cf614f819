"""Single values of a source's records: texts, prices, numbers, ids. What cannot be read is empty or None."""

from __future__ import annotations

import html
import math
import re
import unicodedata

from twice_rec import answer_format

# The elements of HTML, old ones included. Only these are markup: "I <3 tea and coffee > water" is text.
_ELEMENTS = (
    "a|abbr|acronym|address|applet|area|article|aside|audio|b|base|basefont|bdi|bdo|bgsound|big|blink|blockquote|body|"
    "br|button|canvas|caption|center|cite|code|col|colgroup|data|datalist|dd|del|details|dfn|dialog|dir|div|dl|dt|em|"
    "embed|fieldset|figcaption|figure|font|footer|form|frame|frameset|h[1-6]|head|header|hgroup|hr|html|i|iframe|img|"
    "input|ins|kbd|label|legend|li|link|main|map|mark|marquee|menu|meta|meter|nav|nobr|noframes|noscript|object|ol|"
    "optgroup|option|output|p|param|picture|pre|progress|q|rp|rt|ruby|s|samp|script|section|select|small|source|span|"
    "strike|strong|style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|track|tt|u|"
    "ul|var|video|wbr"
)
_BARE = "async|autoplay|checked|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|readonly|required|selected"
_ATTRIBUTE = rf"\s+(?:[a-z_:][-\w:.]*\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+)|(?:{_BARE})\b)"
_ANSWER_TAGS = "|".join(map(re.escape, answer_format.TAGS))
_MARKUP = re.compile(
    rf"<!--.{{0,2000}}?-->|<!doctype[^<>]*>|</?(?:{_ELEMENTS})(?:{_ATTRIBUTE})*\s*/?>|{_ANSWER_TAGS}",
    re.IGNORECASE | re.DOTALL,
)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)  # never shown on a page
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")

# What scripts and style sheets hold, and titles do not.
_PROGRAM = re.compile(
    r"\bvar \w+ ?=|\bfunction ?\w*\([^()]*\) ?\{|\(new Date\(|\b(?:document|window)\.\w+ ?[=(]"
    r"|(?:^|[\s};,])[.#@][\w-]+[^{}]{0,200}\{[^{}]{0,200}[:;][^{}]*\}|\w\{[\w-]+ ?:[^{}]*\}"
)
PROGRAM_AS_TITLE = "item whose title is only markup, a page script or a style sheet, taken as none"
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_LONGEST_PRICE = 40  # characters
LATEST_TIME = 32_503_680_000_000  # milliseconds, the year 3000


def clean_text(text: str) -> str:
    """Unescape HTML, drop its elements (Amazon texts hold `<br />`) and answer tags, fold white space; keep the rest.

    What is left is empty or holds a visible character. It holds no answer tag, so no title or review can break the
    answer format.
    """
    if is_clean(text):
        return text
    plain = html.unescape(text).encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair
    if "<" in plain:
        while (without := _MARKUP.sub(" ", _HIDDEN.sub(" ", plain))) != plain:
            plain = without
    folded = " ".join(_CONTROL.sub(" ", plain).split())
    is_visible = folded.isascii() or any(c != " " and unicodedata.category(c) != "Cf" for c in folded)
    return folded if is_visible else ""  # zero-width characters alone are no text


def is_clean(text: str) -> bool:
    """Return whether a text is plain ASCII in which `clean_text` finds nothing to do; most texts are."""
    has_marks = "&" in text or "<" in text or "  " in text or text[:1] == " " or text[-1:] == " "
    return text.isascii() and text.isprintable() and not has_marks


def has_text(value: object) -> bool:
    """Return whether a value is a text, or a list with one, that is not blank."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(part, str) and part.strip() for part in values)


def is_program(text: str) -> bool:
    """Return whether a text is a script or a style sheet of a page."""
    return ("{" in text or "(" in text or "=" in text) and bool(_PROGRAM.search(text))


def clean_price(price: object) -> str | None:
    """Return a price as it is written; None if it is none: a dash, `nan`, a style sheet, another type."""
    number = isinstance(price, (int, float)) and not isinstance(price, bool)
    text = clean_text(str(price)) if number or isinstance(price, str) else ""
    fits = any(map(str.isdigit, text)) and len(text) <= _LONGEST_PRICE and not text.startswith(("-", "−"))
    return text if fits and not is_program(text) else None


def as_number(value: object) -> int | float | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    if isinstance(value, str) and len(value) < 400 and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def as_time(value: object, unit: int) -> int | None:
    """Return a time in whole milliseconds, from 1970 to the year 3000; None for anything else.

    Args:
        unit: milliseconds per unit of the value.
    """
    number = as_number(value)
    return int(number * unit) if number is not None and 0 <= number <= LATEST_TIME / unit else None


def tidy_id(raw: str) -> str:
    """Return an id without blanks around it, its letters as tokenizers write them (NFC)."""
    return unicodedata.normalize("NFC", raw.strip())


def comes_back(item_id: str) -> bool:
    """Return whether an item id can be read again from an answer that names it."""
    if not item_id.isprintable():
        return False
    try:
        return answer_format.parse(answer_format.render({"item_id": item_id})).item_id == item_id
    except ValueError:
        return False
