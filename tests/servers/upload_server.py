"""A hub as far as an upload asks it, in this process: repositories, pre-upload, storage of large files, commits."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from servers.hub_server import etag_of

LARGE = (".safetensors",)  # what goes to the storage, not into the commit


class UploadServer:
    """Takes the token and lets its owner write; `repositories` are those that are there.

    Args:
        cut: how often a request ends in a closed connection, by a part of its path.
    """

    def __init__(self, token, owner="me"):
        self.token, self.owner = token, owner
        self.repositories = {}  # name -> {"private", "files": path -> bytes, "commits"}
        self.storage = {}  # SHA-256 -> bytes
        self.cut, self.stored, self.cards = {}, [], []
        self.storage_tokens = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def oid_of(self, name, path):
        content = self.repositories[name]["files"].get(path)
        return None if content is None else etag_of(content, in_git=not path.endswith(LARGE))

    def commit(self, name, lines):
        """Apply the lines of a commit; all of them, or none."""
        files = dict(self.repositories[name]["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.storage[value["oid"]]
        self.repositories[name]["files"] = files
        self.repositories[name]["commits"].append(lines[0]["value"]["summary"])


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def respond(self, status, value=None):
            content = json.dumps({} if value is None else value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def is_cut(self):
            part = next((part for part, left in hub.cut.items() if part in self.path and left), None)
            if part is None:
                return False
            hub.cut[part] -= 1
            self.close_connection = True
            return True

        def is_refused(self, name):
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.respond(401, {"error": "Invalid credentials in Authorization header"})
            elif not name.startswith(f"{hub.owner}/"):
                self.respond(403, {"error": "You don't have the rights"})
            elif name not in hub.repositories:
                self.respond(404, {"error": "Repository not found"})
            else:
                return False
            return True

        def do_GET(self):
            name = self.path.removeprefix("/api/models/").partition("/revision")[0].partition("?")[0]
            if not self.is_refused(name):
                self.respond(200, {"id": name, "sha": "a" * 40, "private": hub.repositories[name]["private"]})

        def do_PUT(self):
            content = self.body()
            if not self.is_cut():
                hub.storage_tokens.add(self.headers.get("Authorization"))
                oid = hashlib.sha256(content).hexdigest()
                hub.storage[oid] = content
                hub.stored.append(oid)
                self.respond(200)

        def do_POST(self):
            body = self.body()
            if self.is_cut():
                return
            if self.path == "/api/validate-yaml":
                hub.cards.append(json.loads(body)["content"])
                self.respond(200, {"warnings": [], "errors": []})
            elif self.path == "/api/repos/create":
                self.create(json.loads(body))
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path):
                name, what = found.groups()
                if not self.is_refused(name):
                    getattr(self, what)(name, body)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
                if not self.is_refused(found[1]):
                    objects = [self.place(row) for row in json.loads(body)["objects"]]
                    self.respond(200, {"transfer": "basic", "objects": objects})
            else:
                self.respond(404)

        def create(self, wanted):
            name = f"{wanted['organization']}/{wanted['name']}"
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.respond(401, {"error": "Invalid credentials in Authorization header"})
            elif wanted["organization"] != hub.owner:
                self.respond(403, {"error": "You don't have the rights to create a model under this namespace"})
            elif name in hub.repositories:
                self.respond(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            else:
                private = wanted.get("visibility") == "private"
                hub.repositories[name] = {"private": private, "files": {}, "commits": []}
                self.respond(200, {"url": f"{hub.url}/{name}"})

        def preupload(self, name, body):
            rows = [
                {
                    "path": row["path"],
                    "uploadMode": "lfs" if row["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": hub.oid_of(name, row["path"]),
                }
                for row in json.loads(body)["files"]
            ]
            self.respond(200, {"files": rows})

        def place(self, row):
            if row["oid"] in hub.storage:
                return row
            return {**row, "actions": {"upload": {"href": f"{hub.url}/storage/{row['oid']}"}}}

        def commit(self, name, body):
            hub.commit(name, [json.loads(line) for line in body.splitlines()])
            self.respond(200, {"commitUrl": f"{hub.url}/{name}/commit/{'b' * 40}", "commitOid": "b" * 40})

    return Handler
