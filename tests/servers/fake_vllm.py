"""A server that speaks the parts of vLLM's API that rollouts use, and misbehaves as told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeVLLM:
    """Answers in a thread of this process, on a port that it keeps; `with` ends it.

    Args:
        base: the name of its base model.
        answer: token ids of every answer.
        port: 0 for a free one.
        changes: attribute -> value, see the attributes.
    """

    def __init__(self, base, answer, port=0, **changes):
        self.base, self.answer = base, answer
        self.max_model_len = 8192
        self.lora = True  # else load_lora_adapter is unknown
        self.load_error = None  # (status, message) of load_lora_adapter
        self.first_value = 0.0  # log-probability of the first token, whatever top_k is
        self.answers_as = None  # another name than asked for
        self.finish_reason = None
        self.dies_after = None  # completions, then it closes every connection until `revive`
        self.adapters = {}
        self.calls = []  # (path, body) in order
        for name, value in changes.items():
            setattr(self, name, value)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"127.0.0.1:{self._server.server_port}"

    def called(self, path):
        """The bodies of the calls to a path."""
        return [body for name, body in self.calls if name == path]

    def revive(self):
        """Come back as a server that was started again: without adapters."""
        self.dies_after, self.adapters = None, {}

    def respond(self, path, body):
        """(status, body), or None to close the connection."""
        with self._lock:
            if self.dies_after is not None and len(self.called("/v1/completions")) >= self.dies_after:
                return None
            self.calls.append((path, body))
            return self._respond(path, body)

    def _respond(self, path, body):
        if path == "/health":
            return 200, {}
        if path == "/version":
            return 200, {"version": "0.31.0"}
        if path == "/v1/models":
            cards = [{"id": self.base, "parent": None, "root": "/model", "max_model_len": self.max_model_len}]
            cards += [{"id": name, "parent": self.base, "root": root} for name, root in self.adapters.items()]
            return 200, {"data": cards}
        if path == "/v1/load_lora_adapter" and self.lora:
            if self.load_error:
                return self.load_error[0], {"error": {"message": self.load_error[1]}}
            if body["lora_name"] in self.adapters:
                return 400, {"error": {"message": "The lora adapter has already been loaded."}}
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, {}
        if path == "/v1/unload_lora_adapter" and self.lora:
            found = self.adapters.pop(body["lora_name"], None)
            return (200, {}) if found else (404, {"error": {"message": "cannot be found"}})
        if path == "/v1/completions" and body["model"] in self.adapters:
            return 200, {"model": self.answers_as or body["model"], "choices": self._choices(body)}
        return 404, {"error": {"message": f"no {path} for {body}"}}

    def _choices(self, body):
        ids = self.answer[: body["max_tokens"]]
        values = [self.first_value] + [0.0] * (len(ids) - 1)
        reason = self.finish_reason or ("stop" if ids[-1] in body["stop_token_ids"] else "length")
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": values}, "finish_reason": reason}
        return [{"index": index, **choice} for index in reversed(range(body["n"]))]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake = None

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        response = self.fake.respond(self.path, body)
        if response is None:
            self.connection.close()
            return
        status, content = response
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass
