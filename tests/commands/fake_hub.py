"""A server on loopback that speaks what `huggingface_hub` needs for a commit, and keeps the files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories with their files; `token` is the only one that may write."""

    token = "hf_" + "x" * 20

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        parts = path.split("?")[0].strip("/").split("/")
        match (method, *parts):
            case ("POST", "api", "repos", "create"):
                asked = json.loads(body)
                name = (
                    f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
                )
                self.repositories.setdefault(name, {".gitattributes": b""})
                self.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
                return 200, {"url": f"{self.endpoint}/{name}"}
            case ("GET", "api", "models", owner, name) if f"{owner}/{name}" in self.repositories:
                repository = f"{owner}/{name}"
                siblings = [{"rfilename": file} for file in self.repositories[repository]]
                info = {"id": repository, "private": self.private[repository], "siblings": siblings}
                return 200, {**info, "sha": "0" * 40, "tags": [], "downloads": 0, "likes": 0}
            case ("POST", "api", "validate-yaml"):
                return 200, {"errors": [], "warnings": []}
            case ("POST", "api", "models", _, _, "preupload", _):
                return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
            case ("POST", _, _, "info", "lfs", "objects", "batch"):
                asked = json.loads(body)["objects"]
                upload = [{**o, "actions": {"upload": {"href": f"{self.endpoint}/put/{o['oid']}"}}} for o in asked]
                return 200, {"transfer": "basic", "objects": upload}
            case ("PUT", "put", oid):
                assert hashlib.sha256(body).hexdigest() == oid
                self.objects[oid] = body
                return 200, {}
            case ("POST", "api", "models", owner, name, "commit", _):
                files = self.repositories[f"{owner}/{name}"]
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.objects[value["oid"]]
                return 200, {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{self.endpoint}/{owner}/{name}/commit/1",
                }
            case _:
                return 404, {"error": "Repository not found"}

    @staticmethod
    def _mode(path: str) -> dict[str, object]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """A hub on a free port of loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.read_whole()
            status, answer = hub.answer(self.command, self.path, body)
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                status, answer = 401, {"error": "Invalid username or password."}
            data = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def read_whole(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def read_chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = reply

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
