"""A small Hugging Face Hub on the loopback interface: enough of its API for `huggingface_hub` to download from it.

It answers `/api/{models,datasets}/ID[/revision/REV]`, `/api/…/ID/tree/COMMIT` and `/[datasets/]ID/resolve/REV/FILE`,
with ETag, X-Repo-Commit, X-Linked-Etag, X-Linked-Size, Range and 206, and the X-Error-Code of private, gated and
missing repositories. Large files redirect to a second port, as the real hub redirects to its CDN, so that a token that
leaks there is seen. Xet is not advertised. Faults are set per file: cut a body, reset the connection, hold back the
rest of a body, flip a byte, answer with a status. No time decides what happens: clients of this server are given ten
minutes. """
import hashlib
import json
import os
import socket
import struct
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
from huggingface_hub.utils import close_session

LARGE = (".safetensors", ".parquet", ".bin", "tokenizer.json")  # kept as LFS objects, served from the CDN's port


def blob_sha1(body: bytes) -> str:
    "Git's name for a file of these bytes."
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class Repo:
    "One repository: its files by revision, and who may read it."
    files: dict
    kind: str = "model"
    card: dict = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: tuple = ()  # tokens that may read a private or gated repository
    branches: dict = field(default_factory=dict)  # name -> commit
    commits: dict = field(default_factory=dict)  # commit -> files

    def __post_init__(self): self.commit(self.files)

    def commit(self, files: dict, branch: str = "main") -> str:
        "Make `files` the new state of a branch; returns the commit."
        text = branch + json.dumps({name: hashlib.sha256(body).hexdigest() for name, body in sorted(files.items())})
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = dict(files), commit
        return commit


@dataclass
class Fault:
    "What goes wrong with a file's body, and how many more times."
    cut_at: int = -1  # close the connection after so many bytes of the file
    flip_at: int = -1  # invert the byte at this position
    status: int = 0  # answer with this status instead
    reset: bool = False  # … and rudely
    hold_at: int = -1  # send so many bytes of the file, and the rest after `let_go`
    times: int = 1
    let_go: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args): pass
    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()

    def answer(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        hub, cdn = self.server.hub, self.server.is_cdn
        hub.requests.append({"method": self.command, "path": unquote(url.path), "range": self.headers.get("Range"),
                             "token": self.headers.get("Authorization"), "cdn": cdn})
        if cdn: return self.send_file(hub.objects[parts[-1]], parts[-1], parse_qs(url.query)["name"][0])
        if hub.not_a_hub: return self.send(200, b"<html>a proxy's welcome page</html>", {"Content-Type": "text/html"})
        if parts[0] == "api": return self.answer_api(parts[1][:-1], parts[2:], url)
        kind, parts = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        self.answer_file(kind, parts)

    def find(self, kind, parts):
        "The repository that a path names, or None after an error has been sent."
        hub, repo_id = self.server.hub, "/".join(parts[:2])
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token is not None and token not in hub.tokens:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        repo = hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and token not in repo.readers):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def answer_api(self, kind, parts, url):
        repo = self.find(kind, parts)
        if repo is None: return
        what, revision = (parts[2], parts[3]) if len(parts) > 3 else ("revision", "main")
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits: return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if what == "revision":
            return self.send_json({
                "id": "/".join(parts[:2]), "sha": commit, "cardData": repo.card, "private": repo.private, "tags": [],
                "gated": "auto" if repo.gated else False, "siblings": [{"rfilename": name} for name in files]})
        if repo.gated and not self.may_read(repo): return
        names = sorted(files)
        start, page = int(parse_qs(url.query).get("cursor", ["0"])[0]), self.server.hub.page_size
        rows = [self.server.hub.tree_row(name, files[name]) for name in names[start:start + page]]
        following = f"{self.server.hub.url}{url.path}?recursive=True&cursor={start + page}"
        self.send_json(rows, {"Link": f'<{following}>; rel="next"'} if start + page < len(names) else {})

    def may_read(self, repo) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token in repo.readers: return True
        self.refuse(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
        return False

    def answer_file(self, kind, parts):
        repo = self.find(kind, parts)
        if repo is None or (repo.gated and not self.may_read(repo)): return
        revision, name = parts[3], "/".join(parts[4:])
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits: return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        body = repo.commits[commit].get(name)
        if body is None: return self.refuse(404, "EntryNotFound", "Entry not found")
        hub = self.server.hub
        if not name.endswith(LARGE): return self.send_file(body, blob_sha1(body), name, {"X-Repo-Commit": commit})
        sha = hashlib.sha256(body).hexdigest()
        hub.objects[sha] = body
        self.send(302, b"", {"Location": f"{hub.cdn_url}/objects/{sha}?name={name}", "X-Repo-Commit": commit,
                             "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(body))})

    def send_file(self, body, etag, name, headers=None):
        start, fault = 0, None
        if self.command == "GET":
            fault = self.server.hub.faults.get(name)
            fault = fault if fault and fault.times > 0 else None
            if fault: fault.times -= 1
        if fault and fault.status: return self.send(fault.status, b"", {})
        wanted = self.headers.get("Range")
        if wanted: start = int(wanted.removeprefix("bytes=").split("-")[0])
        if start >= len(body) > 0: return self.send(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        headers = {**(headers or {}), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if wanted: headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send(206 if wanted else 200, body[start:], headers, fault, start)

    def send(self, status, body, headers, fault=None, start=0):
        self.send_response(status)
        for key, value in headers.items(): self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD": return
        if fault and fault.flip_at >= start >= 0 and fault.flip_at >= 0:
            at = fault.flip_at - start
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1:]
        end = max(fault.cut_at - start, 0) if fault and fault.cut_at >= 0 else len(body)
        held = max(fault.hold_at - start, 0) if fault and fault.hold_at >= 0 else 0
        try:
            self.wfile.write(body[:held])
            if held: fault.let_go.wait()
            self.wfile.write(body[held:end])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away, as a killed one does
        if end < len(body): self.close_connection = True
        if fault and fault.reset:  # RST instead of FIN
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def send_json(self, value, headers=None):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status, code, message):
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code: headers["X-Error-Code"] = code
        self.send(status, json.dumps({"error": message}).encode(), headers)


class Site(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128  # two clients of several threads come at once; the default is five


class HubServer:
    "`with HubServer({'owner/name': Repo(…)}) as hub:` serves at `hub.url`; every request is in `hub.requests`."

    def __init__(self, repos: dict, tokens: tuple = (), page_size: int = 1000):
        self.repos = {(repo.kind, name): repo for name, repo in repos.items()}
        self.tokens, self.page_size, self.not_a_hub = set(tokens), page_size, False
        self.requests, self.objects, self.faults = [], {}, {}
        self.undo = ExitStack()

    def tree_row(self, name: str, body: bytes) -> dict:
        "A file as the tree listing shows it."
        row = {"type": "file", "path": name, "size": len(body), "oid": blob_sha1(body)}
        if name.endswith(LARGE):
            row["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return row

    def bodies(self) -> list:
        "The requests that fetched the content of a file."
        return [r for r in self.requests if r["method"] == "GET" and not r["path"].startswith("/api/")]

    def start(self, is_cdn: bool) -> str:
        server = Site(("127.0.0.1", 0), Handler)
        server.hub, server.is_cdn = self, is_cdn
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.undo.callback(server.server_close)
        self.undo.callback(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}"

    def __enter__(self):
        # A proxy or an offline switch that is set for the real network does not concern the loopback interface, and on
        # a busy machine its ten seconds without a byte are soon over.
        here = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
        self.undo.enter_context(patch.dict(os.environ, here))
        self.undo.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600))
        self.undo.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", False))
        close_session()
        self.undo.callback(close_session)
        self.cdn_url, self.url = self.start(is_cdn=True), self.start(is_cdn=False)
        return self

    def __exit__(self, *error): self.undo.close()
