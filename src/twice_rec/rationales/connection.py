"""How the client reaches its server: the API key, names from the environment, the proxy; and what is kept secret.

Secrets come from the environment alone. Recipes name the variables (`api_key_env`, and `${NAME}` in `base_url` and
`extra_headers`), so recipes, manifests and logs can be shown to anybody. What comes from a server is searched for the
values before it goes anywhere.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from twice_rec.errors import InputError
from twice_rec.masking import PLACEHOLDER, Secrets
from twice_rec.rationales.recipe import ClientConfig

_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
# What people paste with a key -> how it is told.
_PASTED = (
    (r"^\s*$", "is empty"),
    (r"[\r\n]", "holds a line break"),
    (r"(?i)^\s*(authorization|bearer)\b[:\s]", "begins with Bearer or Authorization, which is added by itself"),
    (r"^\s*\$", "holds the name of a variable, not its value"),
    (r"^\s*(export\s+)?[A-Z][A-Z0-9_]*=.", "holds a name and = before the key"),
    ("[\"'`\u2018-\u201f\u00ab\u00bb\u2039\u203a]", "holds quotation marks"),
    ("[\\s\u200b-\u200f\u2060\ufeff]", "holds a blank"),
    (r"[^\x21-\x7e]", "holds characters that are no latin letters, digits or signs"),
)


@dataclass(frozen=True, slots=True)
class Proxy:
    """What stands between.

    Args:
        variable: the environment variable that names it.
        url: its address with a scheme; it may hold a password.
        shown: its address without what must not be seen.
    """

    variable: str
    url: str
    shown: str


def read_api_key(variable: str) -> str:
    """Return the API key in an environment variable.

    Raises:
        InputError: if there is none, or something was pasted with it; names the variable, never the value.
    """
    value = os.environ.get(variable)
    if value is None:
        raise InputError(
            f"the environment variable {variable} is not set; export the API key in it, or set api_key_env to null for "
            "a server without keys"
        )
    for pattern, fault in _PASTED:
        if re.search(pattern, value):
            raise InputError(
                f"the environment variable {variable} {fault}; export the bare API key in it, or set api_key_env to "
                "null for a server without keys"
            )
    return value


def filled(text: str, key: str, secrets: Secrets) -> str:
    """Return the text of a recipe key with every `${NAME}` replaced by that environment variable.

    Raises:
        InputError: if a variable is not set, or cannot stand in a header or an address.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise InputError(f"{key} names the environment variable {match[1]}, which is not set")
        if re.search(r"[^\x20-\x7e]", found) or found != found.strip():
            raise InputError(
                f"the environment variable {match[1]}, named by {key}, holds a line break, an outer blank or "
                "characters that are not latin; export the bare value in it"
            )
        secrets.add(found, match[1])
        return found

    return PLACEHOLDER.sub(value, text)


def address(config: ClientConfig, secrets: Secrets) -> tuple[str, dict[str, Any]]:
    """Return the base URL without its query, and the query, which goes with every request."""
    url = filled(config.base_url, "base_url", secrets)
    secrets.add_login(url, "base_url")
    parts = urlsplit(url)
    query: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        query[name] = [*query[name], value] if name in query else [value]
    single = {name: values[0] if len(values) == 1 else values for name, values in query.items()}
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", "")), single


def proxy_for(url: str, secrets: Secrets) -> Proxy | None:
    """Return the proxy that the environment names for an address; None if there is none.

    Raises:
        InputError: if it is not one that the openai package can use.
    """
    known, parts = urllib.request.getproxies(), urlsplit(url)
    scheme = parts.scheme if known.get(parts.scheme) else "all"
    found = known.get(scheme, "")
    if not found or _goes_direct(parts.hostname or "", parts.port, known.get("no", "")):
        return None
    variable = next(name for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "the system") if _is_set(name))
    url = found.strip() if "://" in found else f"http://{found.strip()}"
    secrets.add_login(url, variable)
    way_out = f"correct or unset it, or put {parts.hostname} into NO_PROXY"
    try:
        proxy = urlsplit(url)
        where = f"{proxy.hostname}:{proxy.port}" if proxy.port else proxy.hostname
    except ValueError:
        raise InputError(f"{variable} does not hold the address of a proxy; {way_out}") from None
    if proxy.scheme.lower() not in _PROXY_SCHEMES or not proxy.hostname or re.search(r"\s", url):
        allowed = ", ".join(f"{name}://" for name in _PROXY_SCHEMES)
        raise InputError(
            f"{variable} does not hold the address of a proxy: expected one of {allowed} and HOST:PORT; {way_out}"
        )
    if proxy.scheme.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise InputError(
            f"{variable} names a SOCKS proxy at {where}, which needs the package socksio: pip install socksio; or "
            f"{way_out}"
        )
    return Proxy(variable, url, f"{proxy.scheme}://{where}")


def _is_set(name: str) -> bool:
    return name in os.environ or name == "the system"


def _goes_direct(host: str, port: int | None, no_proxy: str) -> bool:
    """Return whether a host is in NO_PROXY: as a name, a domain, with a port, an address, a network, or by `*`."""
    for entry in (entry.strip().lower() for entry in no_proxy.split(",")):
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:
            pass
        name, _, its_port = entry.rpartition(":") if re.search(r"[^:]:\d+$", entry) else (entry, "", "")
        if its_port and int(its_port) != port:
            continue
        domain = name.strip("[]").removeprefix("*").lstrip(".")
        if entry == "*" or (domain and (host == domain or host.endswith(f".{domain}"))):
            return True
    return False


def open_transport(proxy: Proxy | None, connections: int) -> Any:
    """Return an HTTP transport with so many connections, all of them kept, and this proxy alone.

    The openai package itself keeps 100, and builds every proxy of the environment, also those that are for others.
    Certificates come from the environment as usual.

    Raises:
        InputError: if the environment names certificates that cannot be read.
    """
    import httpx2

    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    try:
        return httpx2.AsyncHTTPTransport(limits=limits, proxy=None if proxy is None else httpx2.Proxy(proxy.url))
    except OSError as error:  # ssl.SSLError is one too
        raise InputError(f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: {error}") from None
