"""Requests per second of stage 1's client against a chat server that takes 200 ms per completion, 64 at a time.

    python benchmarks/rationale_client.py [--quick]
    python benchmarks/rationale_client.py --memory [--quick]

Everything a run does is timed: prompts, hashes, HTTP, the flushed cache, parsing. The bound is 64 / 0.2 s = 320
requests per second; ours over it is the ratio. Beside it, without cache and parsing, the openai client's usual
`chat.completions.create`. The server runs in a process of its own. With --memory: the peak resident memory of the
client for 1,000 and for 50,000 requests, each in a fresh process, the server answering at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import PromptFormat, annotation_instructions
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.generate import Collected, Questions, collect
from twice_rec.rationales.recipe import ClientConfig, SamplingConfig
from twice_rec.records import Example, Interaction, Item

ROOT = Path(__file__).parents[1]
LATENCY, CONCURRENCY = 0.2, 64
WORDS = [
    "dark",
    "mild",
    "roast",
    "organic",
    "crisp",
    "salted",
    "honey",
    "ginger",
    "lemon",
    "oat",
    "rice",
    "bean",
    "whole",
]
FIELDS = ["title", "category", "description"]


async def serve(latency: float) -> None:
    """Answer every request alike after `latency` seconds; prints the port."""
    annotation = {"rationale": " ".join(WORDS * 8), "verdict": "relevant", "evidence": [1, 2], "confidence": 0.9}
    choice = {"index": 0, "message": {"role": "assistant", "content": json.dumps(annotation)}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2500, "completion_tokens": 200, "total_tokens": 2700}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    models = _response({"object": "list", "data": [{"id": "m"}]})
    answer = _response({**head, "choices": [choice], "usage": usage})

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = asked.partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                if asked.startswith(b"post"):
                    await asyncio.sleep(latency)
                writer.write(answer if asked.startswith(b"post") else models)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=512)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


def _response(body: object) -> bytes:
    payload = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


def examples(catalog: ItemCatalog, count: int, seed: int) -> Iterator[Example]:
    """Users with ten random purchases and a random next one."""
    draw, ids = random.Random(seed), catalog.ids
    for number in range(count):
        *past, target = draw.sample(ids, 11)
        history = tuple(Interaction(item, rating=float(draw.randint(1, 5)), review_title="Good") for item in past)
        yield Example(f"u{number}", history, (target,), target)


def questions() -> tuple[ItemCatalog, Questions]:
    """Made-up items and our own exemplars: prompts of about 10,000 characters."""
    draw = random.Random(0)
    text = lambda count: " ".join(draw.choices(WORDS, k=count))
    catalog = ItemCatalog(
        Item(f"B{n:05d}", f"{text(8)} {n}", text(30), categories=("Food", draw.choice(WORDS))) for n in range(2000)
    )
    # A rationale's prompt shows no ids, but a format needs them.
    shown = PromptFormat(prompt_history_fields=FIELDS, prompt_candidate_fields=[*FIELDS, "item_id"])
    exemplars = load_exemplars(ROOT / "recipes/exemplars/grocery.json")
    instructions = annotation_instructions(shown, exemplars, 150, False)
    return catalog, Questions(catalog, shown, instructions, SamplingConfig(model="m"))


def ours(port: int, count: int, seed: int) -> float:
    """Seconds for `count` rows through the whole client."""
    catalog, asked = questions()
    config = ClientConfig(
        base_url=f"http://127.0.0.1:{port}/v1", api_key_env=None, concurrency=CONCURRENCY, timeout_seconds=30.0,
        max_attempts=3, max_failures_in_a_row=5, backoff_max_seconds=5.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, CompletionCache(Path(folder) / "completions.jsonl") as cache:
        start = time.perf_counter()
        collected = Collected(asked, cache)
        figures = asyncio.run(collect(examples(catalog, count, seed), collected, config))
        seconds = time.perf_counter() - start
    assert not collected.failures
    assert figures["requests_answered"] == figures["requests_sent"] == count
    return seconds


def usual_client(port: int, count: int, seed: int) -> float:
    """Seconds for the same requests by `chat.completions.create`, whose answers are dropped."""
    from openai import AsyncOpenAI

    catalog, asked = questions()

    async def run() -> float:
        client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        rows = examples(catalog, count, seed)
        start = time.perf_counter()

        async def work() -> None:
            for row in rows:
                await client.chat.completions.create(**json.loads(next(asked.annotate(row)).body))

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return time.perf_counter() - start

    return asyncio.run(run())


def peak_memory(port: int, count: int) -> float:
    """Peak resident memory in MiB of a fresh process that makes `count` requests."""
    command = [sys.executable, __file__, "--child", str(count), "--port", str(port)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round; with --memory 1,000 and 5,000 requests")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve(arguments.serve))
        return
    if arguments.child:
        ours(arguments.port, arguments.child, 0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    latency = 0.0 if arguments.memory else LATENCY
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(latency)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        row = _memory(port, arguments.quick) if arguments.memory else _speed(port, arguments.quick)
    finally:
        server.kill()
        server.wait()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({**row, "machine": machine}))


def _memory(port: int, quick: bool) -> dict[str, object]:
    few, many = 1_000, 5_000 if quick else 50_000
    small, large = peak_memory(port, few), peak_memory(port, many)
    return {
        "name": "rationale_client_memory", "peer": f"{few:,} requests", "ratio": round(small / large, 3),
        "ours": round(large, 1), "theirs": round(small, 1), "unit": f"MiB at the peak, {many:,} requests",
    }  # fmt: skip


def _speed(port: int, quick: bool) -> dict[str, object]:
    count, rounds = (2_000, 1) if quick else (4_000, 3)
    rates, usual, cpu = [], [], []
    ours(port, CONCURRENCY, rounds)  # imports
    for number in range(rounds):
        used = time.process_time()
        rates.append(count / ours(port, count, number))
        cpu.append(1e3 * (time.process_time() - used) / count)
        usual.append(count / 4 / usual_client(port, count // 4, number))
        print(f"round {number + 1}: ours {rates[-1]:.1f}/s, chat.completions.create {usual[-1]:.1f}/s", flush=True)
    bound, rate = CONCURRENCY / LATENCY, statistics.median(rates)
    return {
        "name": "rationale_client", "peer": "bound 64 / 0.2 s", "ratio": round(rate / bound, 3), "ours": round(rate, 1),
        "theirs": bound, "unit": "requests/s", "chat_completions_create": round(statistics.median(usual), 1),
        "cpu_ms_a_request": round(statistics.median(cpu), 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
