# SPDX-License-Identifier: Apache-2.0
"""
A Hugging Face Hub in memory, served over HTTP on 127.0.0.1, for tests that need the real `huggingface_hub` client.

It keeps models and data sets as git-like repositories (commits, branches, tags, LFS objects), knows a few users by
their tokens, and answers with the headers and error codes that the client's behaviour depends on. Files of public and
private repositories, uploads in one piece ("basic" LFS transfer) and reads by range are covered; pull requests,
discussions, search, Xet storage and `.gitignore` are not: a request outside the list of routes is answered 501.

    with HubServer() as hub:
        subprocess.run([sys.executable, "script.py"], env=hub.environment(temporary_home), check=True)
        hub.files("user/repo")["config.json"]

The client reads its environment at import time: run it in a fresh interpreter.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repository import LFS_SUFFIXES, File, HubError, Repository


USER_TOKEN, OTHER_TOKEN = "hf_token_of_user", "hf_token_of_other"
LFS_THRESHOLD = 10 * 1024 * 1024


class LoggedRequest(NamedTuple):
    method: str
    path: str
    status: int


@dataclass
class Request:
    method: str
    path: str  # still percent-encoded: a slash inside a revision is not a separator
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = "/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+(?:/[^/]+)??)"
GIT = "/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+(?:/[^/]+)??)"


def route(method: str, pattern: str) -> Callable:
    def register(answer: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), answer))
        return answer

    return register


class HubServer:
    """
    Args:
        tokens (`dict[str, str]`, *optional*):
            Users by access token. Each may write to repositories in the namespace of their own name. Defaults to the
            users `user` and `other`.
    """

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = tokens or {USER_TOKEN: "user", OTHER_TOKEN: "other"}
        self.requests: list[LoggedRequest] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.expected_uploads: dict[str, int] = {}
        self.lock = threading.Lock()
        self.http = HubHTTPServer(("127.0.0.1", 0), HubRequestHandler)
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception_info) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home: str | Path, token: str | None = USER_TOKEN) -> dict[str, str]:
        """The environment of a client process that knows only this Hub, with its caches under `home`."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment.update(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1")
        environment.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What a repository holds at a revision, by path."""
        with self.lock:
            files = self.repositories[kind, repo_id].resolve(revision).files
        return {path: file.content for path, file in files.items()}

    def answer(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, answer in ROUTES:
            if route_method == method and (match := pattern.fullmatch(request.path)):
                arguments = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
                with self.lock:
                    request.user = self.authenticate(request)
                    response = answer(self, request, **arguments)
                return response if isinstance(response, Response) else Response(json.dumps(response).encode())
        raise HubError(501, f"{request.method} {request.path} is not part of this test Hub")

    def authenticate(self, request: Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def address(self, kind: str, repo_id: str) -> str:
        return f"{self.url}/{repo_id}" if kind == "models" else f"{self.url}/{kind}/{repo_id}"

    def repository(self, request: Request, kind: str | None, repo_id: str, write: bool = False) -> Repository:
        repository = self.repositories.get((kind or "models", repo_id))
        owns = request.user == repo_id.split("/")[0]
        if repository is None or (repository.private and not owns):
            # The Hub does not tell a missing repository from one that the reader may not see.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and not owns:
            raise HubError(403 if request.user else 401, f"You need write access to {repo_id}")
        return repository

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": request.user, "fullname": request.user, "orgs": [], "auth": token}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create_repository(self, request):
        namespace = request.json.get("organization") or request.user
        if request.user is None or namespace != request.user:
            raise HubError(403 if request.user else 401, f"You cannot create a repository under {namespace}")
        kind, repo_id = (request.json.get("type") or "model") + "s", f"{namespace}/{request.json['name']}"
        if kind not in ("models", "datasets"):
            raise HubError(501, f"Repositories of type {request.json['type']} are not part of this test Hub")
        url = self.address(kind, repo_id)
        if (kind, repo_id) in self.repositories:
            error = f"You already created this {kind[:-1]} repo: {repo_id}"
            return Response(json.dumps({"error": error, "url": url}).encode(), status=409)
        private = request.json.get("visibility") == "private"
        self.repositories[kind, repo_id] = Repository(kind, repo_id, private)
        return {"url": url, "name": repo_id}

    @route("DELETE", "/api/repos/delete")
    def delete_repository(self, request):
        kind = (request.json.get("type") or "model") + "s"
        repo_id = f"{request.json.get('organization') or request.user}/{request.json['name']}"
        self.repository(request, kind, repo_id, write=True)
        del self.repositories[kind, repo_id]
        return {}

    @route("GET", API + "(?:/revision/(?P<revision>[^/]+))?")
    def repository_info(self, request, kind, repo_id, revision):
        repository = self.repository(request, kind, repo_id)
        commit = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        dates = {"createdAt": commit.history[-1].date, "lastModified": commit.date}
        counts = {"downloads": 0, "likes": 0, "gated": False, "disabled": False, "tags": []}
        names = {"_id": commit.oid[:24], "id": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid}
        return {**names, **dates, **counts, "private": repository.private, "siblings": siblings}

    @route("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def list_tree(self, request, kind, repo_id, revision, path):
        tree = self.repository(request, kind, repo_id).tree(revision)
        if path and tree.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        parent = PurePosixPath(path or "")
        return [
            entry
            for name, entry in tree.items()
            if PurePosixPath(name).parent == parent or (recursive and parent in PurePosixPath(name).parents)
        ]

    @route("POST", API + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request, kind, repo_id, revision):
        tree = self.repository(request, kind, repo_id).tree(revision)
        paths = parse_qs(request.body.decode()).get("paths", [])
        return [tree[path.rstrip("/")] for path in paths if path.rstrip("/") in tree]

    @route("GET", API + "/commits/(?P<revision>[^/]+)")
    def list_commits(self, request, kind, repo_id, revision):
        history = self.repository(request, kind, repo_id).resolve(revision).history
        return [commit.describe(author=repo_id.split("/")[0]) for commit in history]

    @route("GET", API + "/refs")
    def list_refs(self, request, kind, repo_id):
        repository = self.repository(request, kind, repo_id)

        def describe(folder, references):
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.oid} for n, c in references.items()]

        branches, tags = describe("heads", repository.branches), describe("tags", repository.tags)
        return {"branches": branches, "tags": tags, "converts": []}

    @route("POST", API + "/branch/(?P<name>[^/]+)")
    def create_branch(self, request, kind, repo_id, name):
        repository = self.repository(request, kind, repo_id, write=True)
        if name in repository.branches:
            raise HubError(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.resolve(request.json.get("startingPoint", "main"))
        return {}

    @route("POST", API + "/tag/(?P<revision>[^/]+)")
    def create_tag(self, request, kind, repo_id, revision):
        repository = self.repository(request, kind, repo_id, write=True)
        if request.json["tag"] in repository.tags:
            raise HubError(409, f"Tag already exists: {request.json['tag']}")
        repository.tags[request.json["tag"]] = repository.resolve(revision)
        return {}

    @route("DELETE", API + "/(?P<folder>branch|tag)/(?P<name>[^/]+)")
    def delete_reference(self, request, kind, repo_id, folder, name):
        repository = self.repository(request, kind, repo_id, write=True)
        references = repository.branches if folder == "branch" else repository.tags
        if name not in references or name == "main":
            raise HubError(404, f"There is no {folder} {name} to delete", "RevisionNotFound")
        del references[name]
        return {}

    @route("POST", API + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, request, kind, repo_id, revision):
        stored = self.repository(request, kind, repo_id, write=True).resolve(revision).files
        answers = []
        for file in request.json["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            is_lfs = binary or file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_THRESHOLD
            oid = stored[file["path"]].etag if file["path"] in stored else None
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @route("POST", GIT + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, request, kind, repo_id):
        self.repository(request, kind, repo_id, write=True)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in request.json["objects"]]
        for item in objects:
            if item["oid"] not in self.lfs_objects:  # without actions the client skips what is stored already
                self.expected_uploads[item["oid"]] = item["size"]
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, request, oid):
        # As with the Hub's signed links, having been given the address is the permission to write.
        if oid not in self.expected_uploads:
            raise HubError(403, f"LFS object {oid} was not announced")
        if (hashlib.sha256(request.body).hexdigest(), len(request.body)) != (oid, self.expected_uploads[oid]):
            raise HubError(400, f"The uploaded bytes are not LFS object {oid}")
        self.lfs_objects[oid] = request.body
        return {}

    @route("POST", API + "/commit/(?P<revision>[^/]+)")
    def commit(self, request, kind, repo_id, revision):
        repository = self.repository(request, kind, repo_id, write=True)
        if "create_pr" in request.query:
            raise HubError(501, "Pull requests are not part of this test Hub")
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repository.branches[revision]
        files, header = dict(head.files), {}
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile" and value["oid"] in self.lfs_objects:
                files[value["path"]] = File(self.lfs_objects[value["oid"]], is_lfs=True)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
            elif key == "deletedFile":
                raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            else:
                raise HubError(400, f"Cannot commit {key} {value}")
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = repository.add_commit(revision, files, header.get("summary", ""), header.get("description", ""))
        url = f"{self.address(kind, repo_id)}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url}

    @route("GET", GIT + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request, kind, repo_id, revision, path):
        commit, file = self.repository(request, kind, repo_id).file(revision, path)
        # LFS content is served from here: the client would follow a redirect on one host and lose X-Repo-Commit.
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream" if file.is_lfs else "text/plain; charset=utf-8"
        if file.is_lfs:
            headers.update({"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))})
        size = len(file.content)
        if not (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "").strip())):
            return Response(file.content, headers=headers)
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last or 0), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(file.content[start:stop], status=206, headers=headers)


class HubHTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class HubRequestHandler(BaseHTTPRequestHandler):
    server: HubHTTPServer
    protocol_version = "HTTP/1.1"  # keeps connections open, as the client expects
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits for 40 ms

    def handle_request(self) -> None:
        body = self.read_body()
        parts = urlsplit(self.path)
        request = Request(self.command, parts.path, parse_qs(parts.query), self.headers, body)
        try:
            response = self.server.hub.answer(request)
        except HubError as error:
            response = Response(json.dumps({"error": str(error)}).encode(), error.status, error.headers)
        except Exception as error:  # a fault of this server, or a body it cannot read
            traceback.print_exc()
            response = Response(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), status=500)
        self.server.hub.requests.append(LoggedRequest(self.command, unquote(parts.path), response.status))
        self.send_response(response.status)
        for name, value in {"Content-Type": "application/json", **response.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line that ends the body
            pass
        return b"".join(chunks)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that streams may leave before the end of an answer
            super().handle()

    def log_message(self, format: str, *arguments) -> None:
        pass  # the requests are in `HubServer.requests`
