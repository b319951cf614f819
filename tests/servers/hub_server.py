"""A hub as far as a download asks it, in this process: HEAD and GET of a file, a redirect to its storage, ranges."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class HubServer:
    """`files` are those of the dataset, by path; what it does wrong is set by the other attributes.

    Args:
        statuses: path -> HTTP status of its HEAD.
        broken: path -> how often its content ends after half of what is left.
        sent: path -> other content than what is announced.
    """

    def __init__(self, files):
        self.files = files
        self.statuses, self.broken, self.sent = {}, {}, {}
        self.ranges, self.names_hashes, self.waits = True, True, threading.Event()
        self.waits.set()  # cleared: content stops after half, and the connection stays
        self.contents_left = None  # after so many, every further one is answered by 503
        self.asked = []  # of the storage: (path, first byte)
        self.heads = []
        self.tokens = {"hub": set(), "storage": set()}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.waits.set()
        self._server.shutdown()
        self._server.server_close()

    def begins(self, path):
        """The first bytes that the storage was asked for."""
        return [start for asked, start in self.asked if asked == path]


def etag_of(content, in_git=False):
    if in_git:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def path_in_repository(self):
            _, found, rest = self.path.partition("/resolve/")
            revision, _, path = rest.partition("/")
            return (path, revision) if found and self.path.startswith("/datasets/McAuley-Lab/") else (None, None)

        def respond(self, status, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            if status != 206 and "Content_Length" not in headers:
                self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self):
            path, revision = self.path_in_repository()
            hub.heads.append((path, revision))
            hub.tokens["hub"].add(self.headers.get("Authorization"))
            if path in hub.statuses:
                return self.respond(hub.statuses[path])
            if path not in hub.files:
                return self.respond(404, X_Error_Code="EntryNotFound")
            content = hub.files[path]
            in_git = path.endswith(".valid.csv")
            if not hub.names_hashes:
                return self.respond(200, Content_Length=len(content), X_Repo_Commit=COMMIT)
            etag = f'"{etag_of(content, in_git)}"'
            if in_git:
                return self.respond(200, ETag=etag, Content_Length=len(content), X_Repo_Commit=COMMIT)
            location = f"http://localhost:{hub.port}/storage/{path}?X-Amz-Signature=secret"
            return self.respond(
                302, X_Linked_Etag=etag, X_Linked_Size=len(content), X_Repo_Commit=COMMIT, Location=location
            )

        def do_GET(self):
            path, _ = self.path_in_repository()
            if path is not None and not path.endswith(".valid.csv"):
                hub.tokens["hub"].add(self.headers.get("Authorization"))
                return self.respond(302, Location=f"http://localhost:{hub.port}/storage/{path}?X-Amz-Signature=secret")
            path = path or self.path.removeprefix("/storage/").partition("?")[0]
            hub.tokens["storage"].add(self.headers.get("Authorization"))
            return self.send_content(path)

        def send_content(self, path):
            content = hub.sent.get(path, hub.files[path])
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and hub.ranges else 0
            hub.asked.append((path, start))
            if hub.contents_left is not None:
                if not hub.contents_left:
                    return self.respond(503)
                hub.contents_left -= 1
            if start >= len(content):
                return self.respond(416, Content_Range=f"bytes */{len(content)}")
            rest = content[start:]
            place = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            self.respond(206 if start else 200, Content_Length=len(rest), **place)
            half = rest[: len(rest) // 2]
            if not hub.waits.is_set():
                self.wfile.write(half)
                hub.waits.wait()
                self.close_connection = True
            elif hub.broken.get(path, 0):
                hub.broken[path] -= 1
                self.wfile.write(half)
                self.close_connection = True
            else:
                self.wfile.write(rest)
            return None

    return Handler
