"""The trainer's side of a rollout server."""

from __future__ import annotations

import urllib.error
import urllib.request

from twice_rec.artifacts import InputError


def check_server(host: str, port: int, timeout: float = 10.0) -> None:
    """Make sure that a server answers.

    Raises:
        InputError: with its address and the remedy.
    """
    url = f"http://{host}:{port}/health"
    try:
        urllib.request.urlopen(url, timeout=timeout).close()
    except (urllib.error.URLError, TimeoutError) as error:
        raise InputError(f"no rollout server answers at {url} ({error}); start it with grpo_step1.sh first") from None
