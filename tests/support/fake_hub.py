"""A Hugging Face hub on loopback: one repository, its files, with ranges, and what a hub refuses."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = {"main": "a" * 40, "v1": "b" * 40}


class FakeHub:
    """files: name -> content; asked: (method, path, Range) of every request.

    stop_after: bytes of a file after which the connection breaks, once; refuse: status and the hub's error code for all requests
    """

    def __init__(self, files: dict[str, bytes], repo: str = "user/repo"):
        self.files, self.repo = files, repo
        self.asked: list[tuple[str, str, str | None]] = []
        self.stop_after: int | None = None
        self.refuse: tuple[int, str] | None = None
        self.serve_other: dict[str, bytes] = {}  # what is sent in the place of a file
        self.url = ""

    @contextmanager
    def running(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _info(self, revision: str) -> dict:
        siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40,
                     "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                    for name, data in self.files.items()]
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT[revision], "siblings": siblings, "private": False, "tags": []}

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self._answer(body=False)

            def do_GET(self):
                self._answer(body=True)

            def _answer(self, body):
                hub.asked.append((self.command, self.path, self.headers.get("Range")))
                if hub.refuse:
                    return self._send(hub.refuse[0], b"{}", {"X-Error-Code": hub.refuse[1], "X-Error-Message": hub.refuse[1]}, body)
                api = re.fullmatch(rf"/api/models/{hub.repo}(?:/revision/([\w%.-]+))?(?:\?.*)?", self.path)
                if api and (api[1] or "main") in COMMIT:
                    return self._send(200, json.dumps(hub._info(api[1] or "main")).encode(), {"Content-Type": "application/json"}, body)
                if api:
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                file = re.fullmatch(rf"/{hub.repo}/resolve/(\w+)/(.+)", self.path)
                if file and file[2] in hub.files:
                    return self._send_file(file[1], file[2], body)
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

            def _send_file(self, revision, name, body):
                data = hub.serve_other.get(name, hub.files[name])
                etag = hashlib.sha256(hub.files[name]).hexdigest()
                start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers.get("Range") else 0
                headers = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes",
                           "X-Repo-Commit": COMMIT.get(revision, revision)}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._send(206 if start else 200, data[start:], headers, body)

            def _send(self, status, data, headers, body):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body and hub.stop_after is not None and status in (200, 206) and "ETag" in headers:
                    data, hub.stop_after = data[:hub.stop_after], None
                    self.close_connection = True
                if body:
                    self.wfile.write(data)

        return Handler
