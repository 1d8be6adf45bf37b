"""A stand-in for the Hugging Face hub on the loopback address: repositories are made, committed to and read."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server holds.

    Attributes:
        url: for HF_ENDPOINT.
        files: by repository and name.
        tokens: the Authorization header of every request that changes something.
        token: the one that may.
    """

    def __init__(self, token):
        self.files, self.tokens, self.token, self.url = {}, [], token, ""


@contextmanager
def hub_server(token):
    """Serves a :class:`Hub` until the block ends."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            hub.tokens.append(self.headers.get("Authorization"))
            if hub.tokens[-1] != f"Bearer {hub.token}":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repository = f"{asked['organization']}/{asked['name']}"
                hub.files.setdefault(repository, {})
                return self.answer({"url": f"{hub.url}/{repository}"})
            repository = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                return self.answer({"files": [{"path": name, **regular} for name in names]})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer({"commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
            return self.answer({"error": self.path}, 404)

        def do_GET(self):
            parts = self.path.strip("/").split("/")  # OWNER/NAME/resolve/REVISION/FILE
            content = hub.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if content is None:
                return self.answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
            return self.send(content, 200, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, content, status=200, **headers):
            self.send(json.dumps(content).encode(), status, **{"Content-Type": "application/json", **headers})

        def send(self, content, status, **headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
