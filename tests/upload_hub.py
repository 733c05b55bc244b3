"""The small hub of hub_server.py, which also takes uploads: repositories are made, large files go through the LFS batch
API, a commit joins them."""
import base64
import hashlib
import json
import os
import threading
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
from hub_server import LARGE, Handler, HubServer, Repo, Site


class UploadHandler(Handler):
    "POST and PUT of the hub's API, beside what the download server answers."

    def do_POST(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length",
                                                    0))) if "chunked" not in self.headers.get("Transfer-Encoding",
                                                    "") else self.chunks()
        hub.requests.append({"method": "POST", "path": path, "cdn": self.server.is_cdn,
                             "token": self.headers.get("Authorization")})
        if (self.headers.get("Authorization") or "").removeprefix("Bearer ") not in hub.tokens:
            return self.refuse(403, None, "You have no right to write here")
        if path == "/api/validate-yaml": return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create": return self.create(json.loads(body))
        repo_id = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        if path.endswith("/preupload/main"): return self.preupload(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"): return self.batch(json.loads(body))
        if path.endswith("/commit/main"): return self.commit(repo_id,
                                                             [json.loads(line) for line in body.splitlines() if line])
        self.refuse(404, "EntryNotFound", f"no such endpoint {path}")

    def chunks(self) -> bytes:
        "A body in chunked transfer coding."
        found = b""
        while size := int(self.rfile.readline(), 16): found, _ = found + self.rfile.read(size), self.rfile.readline()
        self.rfile.readline()
        return found

    def create(self, wanted):
        hub, name = self.server.hub, f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if ("model", name) in hub.repos: return self.send_status(409, {"error": "exists", "url": f"{hub.url}/{name}"})
        hub.repos["model", name] = Repo({}, private=wanted.get("private", wanted.get("visibility") == "private"),
                                        readers=tuple(hub.tokens))
        self.send_json({"url": f"{hub.url}/{name}", "name": name})

    def send_status(self, status, value): self.send(status, json.dumps(value).encode(),
                                                    {"Content-Type": "application/json"})

    def preupload(self, wanted):
        self.send_json({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                                   "shouldIgnore": False}
                                  for f in wanted["files"]]})

    def batch(self, wanted):
        hub = self.server.hub
        place = lambda one: {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
        send = lambda one: {} if one["oid"] in hub.objects else place(one)
        self.send_json({"transfer": "basic", "objects": [{**one, **send(one)} for one in wanted["objects"]]})

    def do_PUT(self):
        hub, oid = self.server.hub, self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append({"method": "PUT", "path": self.path, "cdn": self.server.is_cdn,
                             "token": self.headers.get("Authorization")})
        if hub.broken_puts > 0:
            hub.broken_puts -= 1
            return self.send(403, b"no", {})
        if hashlib.sha256(body).hexdigest() == oid: hub.objects[oid] = body
        self.send(200, b"", {})

    def commit(self, repo_id, lines):
        hub, repo = self.server.hub, self.server.hub.repos["model", repo_id]
        files = dict(repo.commits[repo.branches["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file": files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile": files[value["path"]] = hub.objects[value["oid"]]
        if hub.changes_a_byte: files = {name: body[:-1] + b"?" if name.endswith(".safetensors") else body for name,
                                        body in files.items()}
        commit = repo.commit(files)
        self.send_json({"commitUrl": f"{hub.url}/{repo_id}/commit/{commit}", "commitOid": commit, "success": True})


class UploadHub(HubServer):
    """`with UploadHub({}, tokens=('t',)) as hub:`; `broken_puts` of large files fail, `changes_a_byte` damages what is
    committed."""
    broken_puts, changes_a_byte = 0, False

    def start(self, is_cdn: bool) -> str:
        server = Site(("127.0.0.1", 0), UploadHandler if not is_cdn else Handler)
        server.hub, server.is_cdn = self, is_cdn
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.undo.callback(server.server_close)
        self.undo.callback(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}"

    def __enter__(self):
        self.undo.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True))
        self.undo.enter_context(patch.dict(os.environ, {"HF_HUB_DISABLE_XET": "1"}))
        return super().__enter__()
