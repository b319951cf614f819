"""The other way to get completions: request files for OpenAI's Batch API or vLLM's `run_batch`, which share one format.

`requests-0001.jsonl` has one request per line, named by its key. Its result file belongs beside it, as
`results-0001.jsonl`, whoever makes it. Each run of the stage reads the result files there are, then writes what is
still missing (questions asked again, self-checks, failed requests) as the next request file, until nothing is.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twice_rec.files import atomic_path
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import NotACompletion, Request, parsed, read_completion, read_usage, server_words
from twice_rec.rationales.faults import Fault, status_fault

logger = logging.getLogger(__name__)

_MAX_REQUESTS, _MAX_BYTES = 50_000, 190_000_000  # per file; OpenAI takes 50,000 requests and 200 MB
_LONGEST, _TOKENS_PER_CHAR = 10**6, 1 / 3  # of a completion, and to estimate tokens that a server does not count
_CUT = (
    "lines that are not whole JSON; the rest of the file is read, and these requests are asked again unless you put "
    "the whole file there first"
)


def outstanding(folder: Path, cache: CompletionCache) -> list[tuple[Path, Path]]:
    """Return the request files that still wait for results, each with the path of its result file.

    A file waits if no line of its results can be read, unless its requests have completions from elsewhere.
    """
    return [
        (path, results)
        for path, results in _files(folder)
        if not any(True for _ in _rows(results, Counter())) and any(key not in cache for key, _ in _requests(path))
    ]


def read_results(folder: Path, cache: CompletionCache) -> dict[str, str]:
    """Store the completions of all result files, and count what the other responses cost.

    What is whole is read; the rest is counted by kind and named.

    Returns:
        Request key -> why it has no completion, for the requests that are not worth sending again: the server refused
        them with a 4xx status that is about the request.
    """
    reasons, refused = dict[str, str](), dict[str, str]()
    known = {key: chars for path, _ in _files(folder) for key, chars in _requests(path)}
    for _, results in _files(folder):
        problems = Counter[str]()
        for row in _rows(results, problems):
            key = row["custom_id"]
            if key not in known:
                problems["lines whose custom_id is in no request file; are these results of another run?"] += 1
            elif key not in cache and (
                fault := _store(Request(b"", key, known[key], _LONGEST), row, cache, results.name)
            ):
                reasons[key] = fault.message
                if fault.refuses:
                    refused[key] = fault.message
        if results.exists() and not any(True for _ in _rows(results, Counter())):
            logger.warning("%s: there is no result in it; its request file still waits", results)
        for problem, count in problems.items():
            logger.warning("%s: %s %s", results, f"{count:,}", problem)
    for reason, count in Counter(reasons[key] for key in reasons if key not in cache).most_common(3):
        logger.warning("%d requests without a completion: %s", count, reason)
    return {key: reason for key, reason in refused.items() if key not in cache}


def _store(request: Request, row: Mapping[str, Any], cache: CompletionCache, file: str) -> Fault | None:
    """Store the completion in a line of results; return what is wrong if there is none."""
    response = row.get("response") if isinstance(row.get("response"), dict) else {}
    status, body = response.get("status_code"), response.get("body")
    text = body if isinstance(body, str) else ""
    if parsed(text) is not None:
        body = parsed(text)
    if status is None and isinstance(body, dict) and body.get("choices"):
        status = 200
    if not str(status).isdigit():
        return Fault(f"batch: {server_words(row.get('error') or body or 'no response')}")
    if int(status) != 200:
        return status_fault(int(status), server_words(row.get("error") or body or "no words"), False, {})
    tokens = read_usage(body, text).estimated(request, _TOKENS_PER_CHAR)
    try:
        completion = read_completion(None if isinstance(body, str) else body, text)
    except NotACompletion as error:
        cache.spend(*tokens, f"unusable response: {error}", f"{file} {request.key}")
        return Fault(f"unusable response: {error}")
    cache.put(request.key, replace(completion, prompt_tokens=tokens[0], completion_tokens=tokens[1]))
    return None


def _rows(results: Path, problems: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a result file, if there is one; count the others in `problems`, by kind."""
    if not results.exists():
        return
    begin = results.open("rb").read(2)
    encoding = "utf-16" if begin in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with open(results, encoding=encoding, errors="replace") as file:
        for line in file:
            if not line.strip("\0\ufeff \t\r\n"):
                continue
            found = parsed(line.strip("\0\ufeff \t\r\n"))
            for row in found if isinstance(found, list) else [found]:
                if isinstance(row, dict) and isinstance(row.get("custom_id"), str):
                    yield row
                elif found is None:
                    problems[_CUT] += 1
                else:
                    problems["lines without a custom_id; expected the result file of this request file"] += 1


def _requests(requests: Path) -> Iterator[tuple[str, int]]:
    """Yield the key and the length in characters of each request of a file."""
    with open(requests, "rb") as file:
        for line in file:
            if found := re.match(rb'\{"custom_id": "([0-9a-f]{64})"', line):
                yield found[1].decode(), len(line)


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
