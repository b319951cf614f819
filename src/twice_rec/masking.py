"""What looks like a secret, and how it is kept out of everything that is shown or stored.

Secrets come from the environment alone. A recipe or flag that holds one is refused, see `recipe_reader`. Messages of
errors and lines of logs go through `masked`: it hides the values of the environment's secrets, those that a client has
told, and whatever has the form of a secret.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "[hidden]"
BY_VARIABLE = (
    "seems to hold a secret, not shown here; leave it out: secrets come from the environment, such as HF_TOKEN, "
    "WANDB_API_KEY and the variable that api_key_env names (base_url and extra_headers may hold ${NAME})"
)
PLACEHOLDER = re.compile(r"\$\{(\w+)\}")

_SHORTEST = 6  # characters; shorter values are parts of everyday words
_SPECIAL = "bos|cls|end|eos|image|mask|pad|sep|start|stop|think|unk"  # tokens of a tokenizer
_NAME = re.compile(
    r"(?i)api[-_]?key|access[-_]?key|private[-_]?key|subscription|passw|secret|credential|bearer|authori[sz]ation"
    rf"|cookie|signature|(?<!{')(?<!'.join(f'{kind}[-_]' for kind in _SPECIAL.split('|'))})(?<![a-z])token$"
)
_SHORT_NAME = re.compile(r"(?i)^(x[-_])?(auth|key|sig|code|pwd)$")  # too common in texts to mean anything there
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk|xai|nvapi|pplx|csk|glpat|xox[abprs])-(?=[\w-]{0,60}\d)[\w-]{12,}"
    r"|(?:sk|pk|rk|hf|gsk|gh[opsu]|r8|npm)_(?:live_|test_)?[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|AIza[\w-]{8,}|AKIA[A-Z0-9]{12,}|eyJ[\w-]{8,}[\w.-]*)"
)
_SCHEME = re.compile(r"(?i)\b(bearer|basic)(\s+)(?=\S{0,60}[\d=])[\w+/=.~-]{8,}")
_WITH_SCHEME = re.compile(r"(?i)^\s*(bearer|basic)\s+\S")
_LOGIN = re.compile(  # with bounds, so that long texts take no time
    r"(:/{1,2})(?!:?@)[^\s/@'\"]{1,400}@|(?<![^\s'\"/(\[,=])[^\s/:@'\"]{0,100}:[^\s/@'\"]{1,400}@(?=[\w\[])"
)
_QUERY = re.compile(r"((?:[?&;#]|(?<![^\s'\"])(?<!,\s))([\w.-]{1,60})=)(?![\s'\"\[{$])[^&\s'\"#,;]+")
_TOLD = re.compile(
    r"(?i)\b((?:password|passwd|secret|api[-_ ]?key|access[-_]?token)\s*:\s+)(?![\s'\"\[{$])[^\s'\",;]{6,}"
)
_FLAG = re.compile(r"(--([\w-]+)(?:=|\s+))(?!--)\S+")
_QUOTED = re.compile(r"((?<![\w.-])([\w.-]{1,60})(?:\\?[\"'])?\s*[:=]\s*)(\\?[\"'])[^\"'\n]+?\3")
_RUN = re.compile(r"[A-Za-z0-9]{20,}")
_HEX = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
_PASSWORD = re.compile(r"://([^\s/:@]*):([^\s/@]+)@")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)")


class Secrets:
    """Values that appear nowhere."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}  # a value, or another way to write it -> what is shown instead

    def add(self, value: str, shown: str) -> None:
        """Hide a value from now on, however it is written."""
        coded = base64.b64encode(value.encode(errors="surrogateescape")).decode()
        for written in (value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], coded, coded.rstrip("=")):
            if len(written) >= _SHORTEST:
                self._shown.setdefault(written, f"[{shown}]")

    def add_login(self, address: str, shown: str) -> None:
        """Hide the password of an address, by itself and as basic authentication writes it."""
        for user, password in _PASSWORD.findall(address):
            self.add(password, shown)
            self.add(unquote(password), shown)
            self.add(f"{unquote(user)}:{unquote(password)}", shown)

    def hide(self, text: str) -> str:
        """Return the text without the values."""
        for value in sorted(self._shown, key=len, reverse=True):
            text = text.replace(value, self._shown[value])
        return text


KNOWN = Secrets()  # what this process has been told; it holds for as long as the process


def says_secret(name: str) -> bool:
    """Return whether a name is one of a secret; `api_key_env` is that of a variable."""
    return not name.endswith("_env") and bool(_NAME.search(name) or _SHORT_NAME.search(name))


def looks_secret(name: str, value: Any) -> bool:
    """Return whether a value seems to be a secret, by its name or its form; what `${NAME}` stands for is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return says_secret(name) and len(str(value)) >= _SHORTEST
    if not isinstance(value, str) or not value:
        return False
    own = PLACEHOLDER.sub("", value)
    if says_secret(name) and own == value:
        return True
    is_hash = _HEX.fullmatch(own.strip()) is not None and not name.endswith("revision")
    return is_hash or bool(_WITH_SCHEME.search(own)) or _without_forms(own) != own


def secret_keys(values: Mapping[Any, Any], inside: str = "") -> Iterator[str]:
    """Yield the names of keys, however deep, that seem to hold a secret."""
    for key, value in values.items():
        name = str(key)
        if isinstance(value, Mapping):
            yield from secret_keys(value, f"{inside}{_without_forms(name)}.")
        elif isinstance(value, list | tuple):
            yield from secret_keys({f"{name}[{index}]": entry for index, entry in enumerate(value)}, inside)
        elif looks_secret(name.partition("[")[0], value) or _without_forms(name) != name:
            yield f"{inside}{_without_forms(name)}"


def masked(text: str) -> str:
    """Return a text that is to be shown or stored, without secrets."""
    return _without_forms(KNOWN.hide(_of_the_environment().hide(text)))


def masked_values(value: Any) -> Any:
    """Return a value of a recipe, however deep, that is to be stored: its texts without secrets."""
    if isinstance(value, Mapping):
        return {key: masked_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(entry) for entry in value]
    return masked(value) if isinstance(value, str) else value


def masked_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without secrets."""
    kept, after_secret = [], False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            after_secret = says_secret(name)
            kept.append(f"--{name}={HIDDEN}" if after_secret and equals else masked(word))
        else:
            kept.append(HIDDEN if after_secret else masked(word))
    return kept


def _of_the_environment() -> Secrets:
    """The values of variables that are named like secrets, and the passwords in addresses of proxies and others."""
    secrets = Secrets()
    for name, value in os.environ.items():
        if (_is_named(name) or f"_{name}".lower().endswith("_key")) and not value.startswith(("/", "~", ".")):
            secrets.add(value, name)
            secrets.add(value.strip(), name)
        if "@" in value:
            secrets.add_login(value if "://" in value else f"://{value}", name)
    return secrets


def _without_forms(text: str) -> str:
    """The text without what has the form of a secret, or is named like one."""
    text = _PEM.sub(HIDDEN, text)
    text = _LOGIN.sub(lambda found: f"{found[1] or ''}{HIDDEN}@", text)
    text = _QUERY.sub(lambda found: found[1] + HIDDEN if says_secret(found[2]) else found[0], text)
    text = _TOLD.sub(rf"\1{HIDDEN}", text)
    text = _FLAG.sub(lambda found: found[1] + HIDDEN if says_secret(found[2]) else found[0], text)
    text = _QUOTED.sub(
        lambda found: f"{found[1]}{found[3]}{HIDDEN}{found[3]}" if _is_named(found[2]) else found[0], text
    )
    text = _TOKEN.sub(HIDDEN, _SCHEME.sub(rf"\1\2{HIDDEN}", text))
    return _RUN.sub(lambda found: HIDDEN if _is_random(found[0]) else found[0], text)


def _is_named(name: str) -> bool:
    return not name.endswith("_env") and bool(_NAME.search(name))


def _is_random(run: str) -> bool:
    """Whether letters and digits change so often that nobody wrote them; hashes in hexadecimal are shown."""
    kinds = ["digit" if c.isdigit() else "upper" if c.isupper() else "lower" for c in run]
    changes = sum(before != after for before, after in itertools.pairwise(kinds))
    return len(set(kinds)) == 3 and changes * 5 >= len(run) * 2
