"""A chat API that misbehaves on purpose, as a process of its own: `python fault_server.py --port 0 --log FILE ...`.

Whether and how a request is answered wrongly is drawn from its content, and for faults of the transport from how often
it has come as well, so that a run that was killed in between gets the same answers as one that was not. Every complete
answer is noted in the log, by the hash of its request, as soon as it is written.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
from collections import Counter

try:
    from servers import moods
except ImportError:  # as a process of its own
    import moods

WORDS = "they like mild teas and crisp oats since the review of honey praised clover over syrup for cakes"
RUBRIC = ("grounded", "causal", "specific", "nothing_invented", "consistent")
TRANSPORT = ("429", "429 seconds", "500", "503", "hang", "half", "not json", "empty choices", "close", "408")
CONTENT = ("broken", "schema", "evidence", "verdict", "refusal", "filter", "length", "twice", "two choices", "nothing")


class Server:
    def __init__(self, options):
        self.options = options
        self.seen = Counter()
        self.log = open(options.log, "a") if options.log else None  # noqa: SIM115 - as long as the process lives

    async def handle(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length.group(1))) if length else b""
                if not await self.respond(head, body, writer):
                    break
        writer.close()

    async def respond(self, head, body, writer):
        head = head.replace(" http://api.example/", " /", 1)  # what a proxy is asked
        key = re.search(r"authorization: Bearer (\S+)", head, re.IGNORECASE)
        key = key.group(1) if key else ""
        if self.options.key and key != self.options.key:
            await send(
                writer, 401, {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}}
            )
            return True
        if self.options.mood and (response := moods.LISTS.get(self.options.mood)) and head.startswith("GET"):
            await send(writer, *response)
            return True
        if head.startswith("GET /v1/models"):
            await send(writer, 200, {"object": "list", "data": [{"id": "annotator", "object": "model"}]})
            return True
        if not head.startswith("POST /v1/chat/completions"):
            await send(writer, 404, {"error": {"message": "no such path"}})
            return True
        asked = json.loads(body)
        if self.options.mood and (response := moods.answer(self.options.mood, head, asked, good, key)):
            if self.log:
                self.log.write(hashlib.sha256(body).hexdigest() + "\n")
                self.log.flush()
            await send(writer, *response)
            return True
        if self.options.limit and sum(len(message["content"]) for message in asked["messages"]) > self.options.limit:
            await send(writer, 400, {"error": {"message": "too long", "type": "BadRequestError"}})
            return True
        stream = asked.pop("stream", False)
        asked.pop("stream_options", None)
        name = hashlib.sha256(json.dumps(asked, separators=(",", ":")).encode()).hexdigest()
        self.seen[name] += 1
        if self.options.quota and sum(self.seen.values()) > self.options.quota:
            error = {
                "message": "You exceeded your current quota",
                "type": "insufficient_quota",
                "code": "insufficient_quota",
            }
            await send(writer, 429, {"error": error})
            return True
        draw = random.Random(f"{self.options.seed} {name} {self.seen[name]}")
        if draw.random() < self.options.transport:
            return await self.fail(draw.choice(TRANSPORT), key, writer)
        if self.options.delay:
            await asyncio.sleep(self.options.delay)
        answer = completion(asked, random.Random(f"{self.options.seed} {name}"), self.options.content)
        if self.log:
            self.log.write(name + "\n")
            self.log.flush()
        await (send_stream(writer, answer) if stream else send(writer, 200, answer))
        return True

    async def fail(self, kind, key, writer):
        """Returns whether the connection stays open."""
        echo = {"error": {"message": f"trouble with Authorization: Bearer {key}", "type": "server_error"}}
        if kind == "hang":
            await asyncio.sleep(60)
        elif kind == "half":
            writer.write(
                b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{"choices": ['
            )
            await writer.drain()
        elif kind == "not json":
            await send(writer, 200, b"<html>bad gateway " + key.encode() + b"</html>")
        elif kind == "empty choices":
            await send(writer, 200, {"id": "x", "choices": [], "usage": None})
        elif kind == "429":
            await send(writer, 429, echo, "retry-after-ms: 20\r\n")
        elif kind == "429 seconds":
            await send(writer, 429, echo, "Retry-After: 0.05\r\n")
        elif kind != "close":
            await send(writer, int(kind), echo)
        return kind not in ("hang", "half", "close")


def completion(asked, draw, share_of_faults):
    prompt = asked["messages"][-1]["content"]
    text, message, finish, choices = good(asked, draw), {}, "stop", 1
    if draw.random() < share_of_faults:
        kind = draw.choice(CONTENT)
        if kind == "broken":
            text = text[: len(text) // 2]
        elif kind == "schema":
            text = json.dumps({"text": "no such keys", "score": 3})
        elif kind == "evidence":
            text = text.replace('"evidence": [', '"evidence": [99, ')
        elif kind == "verdict":
            text = text.replace('"verdict": "', '"verdict": "very ')
        elif kind == "nothing":
            text = ""
        elif kind == "twice":
            text = f"Here it is:\n```json\n{text}\n```\n{text}"
        elif kind == "refusal":
            text, message = None, {"refusal": "I cannot help with that."}
        elif kind == "two choices":
            choices = 2
        else:
            text, finish = text[:40], {"length": "length", "filter": "content_filter"}[kind]
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    tokens = {
        "prompt_tokens": sum(len(m["content"]) for m in asked["messages"]) // 4,
        "completion_tokens": len(text or "") // 4,
    }
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": asked["model"],
        "choices": [{**choice, "index": i} for i in range(choices)],
        "usage": {**tokens, "total_tokens": sum(tokens.values())}, "prompt": len(prompt),
    }  # fmt: skip


def listed(messages, heading):
    """How many products a prompt lists under a heading."""
    return len(re.findall(r"^\d+\. ", messages.partition(heading)[2], re.MULTILINE))


def good(asked, draw):
    messages = "".join(m["content"] for m in asked["messages"])
    if '"nothing_invented"' in messages:
        return json.dumps({name: draw.random() < 0.97 for name in RUBRIC})
    if '"score"' in messages:
        return json.dumps({"why": "as the reviews say", "score": draw.choice((1, 2, 3))})
    if '"candidate"' in messages:
        number = draw.randint(1, listed(messages, "Products:"))
        return json.dumps({"why": "the only tea", "candidate": number})
    if '"choice"' in messages:
        return json.dumps({"choice": draw.randint(1, listed(messages, "Candidates:"))})
    question = next(m["content"] for m in reversed(asked["messages"]) if "Past purchases" in m["content"])
    shown = len(re.findall(r"^\d+\. ", question, re.MULTILINE))
    verdict = draw.choices(("relevant", "weak", "irrelevant"), (7, 2, 1))[0]
    return json.dumps({
        "rationale": " ".join(draw.choices(WORDS.split(), k=draw.randint(25, 60))),
        "verdict": verdict,
        "evidence": sorted(draw.sample(range(1, shown + 1), draw.randint(1, shown))),
        "confidence": round(draw.random(), 2),
    })  # fmt: skip


async def send(writer, status, body, headers=""):
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, bytes) else "application/json"
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(payload)}\r\n{headers}\r\n"
    writer.write(head.encode() + payload)
    await writer.drain()


async def send_stream(writer, answer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def event(value):
        data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    for choice in answer["choices"]:
        message = choice["message"]
        text = message["content"] or ""
        for start in range(0, len(text), 40):
            event({"choices": [{"index": choice["index"], "delta": {"content": text[start : start + 40]}}]})
        last = {"refusal": message["refusal"]} if "refusal" in message else {}
        event({"choices": [{"index": choice["index"], "delta": last, "finish_reason": choice["finish_reason"]}]})
    event({"choices": [], "usage": answer["usage"]})
    event(b"[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", type=float, default=0.0, help="share of requests that get no usable response")
    parser.add_argument("--content", type=float, default=0.0, help="share of answers that are not as asked")
    parser.add_argument("--mood", help="a server of another kind, see moods.py")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before an answer")
    parser.add_argument("--key", help="the only API key that is let in")
    parser.add_argument("--limit", type=int, help="longest prompt in characters")
    parser.add_argument("--quota", type=int, help="requests until the quota is exhausted")
    server = Server(parser.parse_args())
    listening = await asyncio.start_server(server.handle, "127.0.0.1", server.options.port, limit=2**24)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
