"""The other way to get answers: request files for OpenAI's Batch API or vLLM's `run_batch`, which share one format.

`requests-0001.jsonl` has one request a line, named by its key. Whoever answers it, the result file is to lie beside it
as `results-0001.jsonl`. Each run of the stage takes in the result files there are, then writes what is still missing
(what was asked again, self-checks, requests that failed) as the next request file, until nothing is.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from twice_rec.errors import InputError
from twice_rec.files import atomic_path, read_jsonl
from twice_rec.rationales.cache import AnswerCache
from twice_rec.rationales.client import NotACompletion, Request, read_completion

logger = logging.getLogger(__name__)

_MAX_REQUESTS, _MAX_BYTES = 50_000, 190_000_000  # a file; OpenAI takes 50,000 requests and 200 MB


def outstanding(folder: Path) -> list[Path]:
    """The request files without a result file."""
    return [path for path in sorted(folder.glob("requests-*.jsonl")) if not _results_of(path).exists()]


def read_results(folder: Path, cache: AnswerCache, max_attempts: int) -> dict[str, str]:
    """Store the answers of all result files.

    Returns:
        Request key -> why it has no answer, for those that are not worth asking again: refused by the server with a
        4xx status, or failed in `max_attempts` files.

    Raises:
        InputError: for a result file that is not one.
    """
    failed, reasons, refused = Counter[str](), dict[str, str](), set[str]()
    for path in sorted(folder.glob("requests-*.jsonl")):
        results = _results_of(path)
        if not results.exists():
            continue
        for number, row in read_jsonl(results):
            response = row.get("response") or {}
            if not isinstance(row.get("custom_id"), str) or not isinstance(response, dict):
                raise InputError(
                    f"{results}, line {number}: no custom_id and response; expected the result file of {path.name}"
                )
            key, status = row["custom_id"], response.get("status_code")
            if status == 200:
                try:
                    cache.put(key, read_completion(json.dumps(response.get("body"))))
                    continue
                except NotACompletion as error:
                    reasons[key] = f"unusable response: {error}"
            else:
                said = row.get("error") or (response.get("body") or {}).get("error") or "no response"
                reasons[key] = f"HTTP {status}: {said}"[:300] if status else f"batch: {said}"[:300]
                if isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429):
                    refused.add(key)
            failed[key] += 1
    for reason, count in Counter(reasons[key] for key in reasons if key not in cache).most_common(3):
        logger.warning("%d requests without an answer: %s", count, reason)
    return {key: reasons[key] for key, count in failed.items() if key in refused or count >= max_attempts}


def write_requests(folder: Path, requests: Iterable[Request]) -> list[Path]:
    """Write the requests, each once, as the next request file or files; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.stem.rpartition("-")[2]) for path in folder.glob("requests-*.jsonl")), default=0)
    written: list[Path] = []
    seen: set[bytes] = set()
    lines = (_line(request) for request in requests if _is_new(request, seen))
    line = next(lines, None)
    while line is not None:
        path = folder / f"requests-{number:04d}.jsonl"
        with atomic_path(path) as temporary, open(temporary, "wb") as out:
            count = size = 0
            while line is not None and count < _MAX_REQUESTS and size + len(line) <= _MAX_BYTES:
                out.write(line)
                count, size = count + 1, size + len(line)
                line = next(lines, None)
        logger.info("%s: %s requests", path, f"{count:,}")
        written.append(path)
        number += 1
    return written


def instructions(paths: Iterable[Path], model: str) -> str:
    """What the user has to do with request files."""
    lines = ["these requests wait for answers; have each file answered, then run the same command again:"]
    for path in paths:
        results = _results_of(path)
        lines.append(f"  {path}\n    -> {results}")
    lines.append(
        "  OpenAI: upload it with purpose `batch`, create a batch for /v1/chat/completions, download its output"
    )
    lines.append(f"  vLLM: vllm run-batch -i REQUESTS -o RESULTS --model {model}")
    return "\n".join(lines)


def _results_of(path: Path) -> Path:
    return path.with_name(path.name.replace("requests-", "results-"))


def _is_new(request: Request, seen: set[bytes]) -> bool:
    key = bytes.fromhex(request.key)
    new = key not in seen
    seen.add(key)
    return new


def _line(request: Request) -> bytes:
    """One line of the request file; the body goes in as it stands, so that it keeps its hash."""
    head = json.dumps({"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions"})
    return head[:-1].encode() + b', "body": ' + request.body + b"}\n"
