"""What can go wrong with a request, and what happens then.

| fault | reaction |
|---|---|
| 429 | every request waits at least Retry-After, then this one is sent again |
| 5xx, 408, 409, timeout, connection refused or cut, body that is not JSON | sent again after a growing wait |
| status 200 without a completion (an error object, a tool call, thoughts alone) | counted; sent again once at most |
| several of the last two kinds of bodies in a row | the run stops |
| an error object that names an HTTP status | what that status does |
| exhausted quota (429 `insufficient_quota`, 402), 401, 403, 404, 407, a redirect to another server | the run stops |
| other 4xx, before any request got a completion | the row stays open; the run stops if a key of ours is refused |
| other 4xx later | this row alone is refused; that is not stored, so that another run sends it again |
| refusal, completion that is cut off or malformed | no fault: it is paid for and stored; `generate` judges it |
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass

from twice_rec.errors import InputError
from twice_rec.masking import masked

AGAIN = (408, 409, 429)  # besides 5xx, the HTTP statuses after which a request may succeed later
_STOPPING = {
    401: "the server does not accept the API key",
    402: "the account has no credit left",
    403: "the API key may not do this",
    404: "the server does not know this path or model; the address of an OpenAI-compatible API usually ends in /v1",
    407: "the proxy wants a user name and a password",
}


class Stopped(InputError):
    """The run cannot go on, or must not; every completion so far is stored."""


class NoCompletion(Exception):
    """There is no completion of a request; the message says why.

    Args:
        refused: the server will not answer this very request.
    """

    def __init__(self, why: str, refused: bool = False):
        super().__init__(why)
        self.refused = refused


@dataclass(eq=False)
class Fault(Exception):
    """One attempt failed."""

    message: str  # what happened; the part before the first colon names the kind
    stops: bool = False  # the run ends
    again: bool = True  # another attempt may succeed
    wait: float | None = None  # seconds that the server asks to wait; None if it does not say
    status: int | None = None  # HTTP status of the response; None if there was none
    unusable: bool = False  # a response with status 200 had no completion in it
    billed: bool = False  # and a model seems to have been paid for it

    def __post_init__(self) -> None:
        self.message = masked(self.message)
        self.args = (self.message,)

    @property
    def refuses(self) -> bool:
        """Whether the server has read the request and will not answer it."""
        return not self.again and not self.stops and self.status is not None and 400 <= self.status < 500


def status_fault(status: int, said: str, quota_is_exhausted: bool, headers: Mapping[str, str]) -> Fault:
    """Return the fault of an HTTP error status; `said` is the server's message."""
    why = "the quota is exhausted" if status == 429 and quota_is_exhausted else _STOPPING.get(status)
    if why is not None:
        return Fault(f"HTTP {status}: {said} ({why})", stops=True, again=False, status=status)
    return Fault(
        f"HTTP {status}: {said}", again=status in AGAIN or status >= 500, wait=retry_after(headers), status=status
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in `retry-after-ms` or `Retry-After` (a number or a date); None if there are none."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())
