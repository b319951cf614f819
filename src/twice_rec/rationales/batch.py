"""The other way to get completions: request files for OpenAI's Batch API or vLLM's `run_batch`, which share one format.

`requests-0001.jsonl` has one request per line, named by its key. Its result file belongs beside it, as
`results-0001.jsonl`, whoever makes it. Each run of the stage reads the result files there are, then writes what is
still missing (questions asked again, self-checks, failed requests) as the next request file, until nothing is.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import atomic_path, read_jsonl
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import NotACompletion, Request, read_completion
from twice_rec.rationales.faults import AGAIN

logger = logging.getLogger(__name__)

_MAX_REQUESTS, _MAX_BYTES = 50_000, 190_000_000  # per file; OpenAI takes 50,000 requests and 200 MB


def outstanding(folder: Path) -> list[tuple[Path, Path]]:
    """Return the request files without a result file, each with the path of the one it needs."""
    return [(path, results) for path, results in _files(folder) if not results.exists()]


def read_results(folder: Path, cache: CompletionCache, max_attempts: int) -> dict[str, str]:
    """Store the completions of all result files.

    Returns:
        Request key -> why it has no completion, for the requests that are not worth sending again: the server refused
        them with a 4xx status, or they failed in `max_attempts` files.

    Raises:
        InputError: if a result file has a line that is no result.
    """
    attempts, reasons = Counter[str](), dict[str, str]()
    for key, response, row in _results(folder):
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            try:
                cache.put(key, read_completion(json.dumps(body)))
                continue
            except NotACompletion as error:
                reasons[key] = f"unusable response: {error}"
        else:
            said = row.get("error") or (body or {}).get("error") or "no response"
            reasons[key] = (f"HTTP {status}: {said}" if status else f"batch: {said}")[:300]
        refused = isinstance(status, int) and 400 <= status < 500 and status not in AGAIN
        attempts[key] += max_attempts if refused else 1
    for reason, count in Counter(reasons[key] for key in reasons if key not in cache).most_common(3):
        logger.warning("%d requests without a completion: %s", count, reason)
    return {key: reasons[key] for key, count in attempts.items() if count >= max_attempts}


def _results(folder: Path) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield (request key, response, the whole row) of every line of every result file."""
    for path, results in _files(folder):
        for number, row in read_jsonl(results) if results.exists() else ():
            response = row.get("response") or {}
            if not isinstance(row.get("custom_id"), str) or not isinstance(response, dict):
                raise InputError(
                    f"{results}, line {number}: no custom_id and response; expected the result file of {path.name}"
                )
            yield row["custom_id"], response, row


def write_requests(folder: Path, requests: Iterable[Request]) -> None:
    """Write the requests, each once, as the next request file or files."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.stem.rpartition("-")[2]) for path, _ in _files(folder)), default=0)
    lines = _lines(requests)
    line = next(lines, None)
    while line is not None:
        path = folder / f"requests-{number:04d}.jsonl"
        with atomic_path(path) as temporary, open(temporary, "wb") as out:
            count = 0
            while line is not None and count < _MAX_REQUESTS and out.tell() + len(line) <= _MAX_BYTES:
                count += 1
                out.write(line)
                line = next(lines, None)
        logger.info("%s: %s requests", path, f"{count:,}")
        number += 1


def instructions(waiting: Iterable[tuple[Path, Path]], model: str) -> str:
    """Return what the user has to do with the files of `outstanding`."""
    lines = ["these requests wait for completions; have each file answered, then run the same command again:"]
    lines += [f"  {path}\n    -> {results}" for path, results in waiting]
    lines += [
        "  OpenAI: upload it with purpose `batch`, create a batch for /v1/chat/completions, download its output",
        f"  vLLM: vllm run-batch -i REQUESTS -o RESULTS --model {model}",
    ]
    return "\n".join(lines)


def _files(folder: Path) -> list[tuple[Path, Path]]:
    """Return the request files in order, each with the path of its result file."""
    requests = sorted(folder.glob("requests-*.jsonl"))
    return [(path, path.with_name(path.name.replace("requests-", "results-"))) for path in requests]


def _lines(requests: Iterable[Request]) -> Iterator[bytes]:
    """Yield one line per different request; its body goes in byte by byte, so that it keeps its hash."""
    seen: set[str] = set()
    for request in requests:
        if request.key not in seen:
            seen.add(request.key)
            head = json.dumps({"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions"})
            yield head[:-1].encode() + b', "body": ' + request.body + b"}\n"
