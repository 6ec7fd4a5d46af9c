"""A small Hub on 127.0.0.1: as much of its API as uploading a folder and loading from it take."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "a-token-of-the-test"


class Hub:
    """Repositories, each with the files of its one branch, and what was asked of the server."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # sha256 → content
        self.requests: list[str] = []
        self.commits = 0

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def commit(self, repo: str, lines: list[dict]) -> None:
        self.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.objects[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status: int = 200, content=None, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append(f"{self.command} {path}")
        writes = self.command in ("POST", "PUT") and not path.startswith("/upload/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return method(self, body, *found.groups())
        self.answer(404, {"error": "Not found"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if repo in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": self.address(repo)})
        self.hub.repos[repo] = {}
        self.hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.answer(200, {"url": self.address(repo), "name": repo, "id": "1"})

    def address(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def validate(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body, repo, revision):
        large = (".safetensors", ".png")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body, repo):
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": self.address(f"upload/{entry['oid']}"), "header": {}}},
            }
            for entry in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(200, b"")

    def commit(self, body, repo, revision):
        self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        sha = self.hub.sha(repo)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": self.address(f"{repo}/commit/{sha}")})

    def info(self, body, repo, revision=None):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in sorted(self.hub.repos[repo])]
        self.answer(200, {"id": repo, "modelId": repo, "sha": self.hub.sha(repo), "siblings": siblings, "tags": []})

    def resolve(self, body, repo, revision, name):
        files = self.hub.repos.get(repo)
        if files is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": self.hub.sha(repo)}
        if name not in files:
            return self.answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(files[name]).hexdigest()
        self.answer(200, files[name], headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})


_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (r"POST /api/models/(.+?)/preupload/(\w+)", _Handler.preupload),
    (r"POST /(.+?)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /upload/(\w+)", _Handler.upload),
    (r"POST /api/models/(.+?)/commit/(\w+)", _Handler.commit),
    (r"GET /api/models/([^/]+/[^/]+)", _Handler.info),
    (r"GET /api/models/([^/]+/[^/]+)/revision/(\w+)", _Handler.info),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/(\w+)/(.+)", _Handler.resolve),
]


@contextmanager
def hub_stand_in():
    """Yields the hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
