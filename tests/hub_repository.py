# SPDX-License-Identifier: Apache-2.0
"""The git-like storage behind `hub_server.py`: files, commits, branches and tags, and the errors that name them."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any


LFS_SUFFIXES = (".bin", ".ckpt", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".tar", ".zip")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """Becomes the answer to a request: `code` is what the client maps to its exception classes."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers["X-Error-Message"] = message.encode("ascii", "replace").decode()
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself stores in place of an LFS file."""
        header = "version https://git-lfs.github.com/spec/v1"
        return f"{header}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        stored = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    title: str
    message: str = ""
    parent: "Commit | None" = None
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def oid(self) -> str:
        tree = sorted((path, file.blob_id) for path, file in self.files.items())
        parent = self.parent.oid if self.parent else None
        return hashlib.sha1(repr((tree, self.title, self.message, parent, self.date)).encode()).hexdigest()

    def describe(self, author: str) -> dict[str, Any]:
        authors = [{"user": author}]
        return {"id": self.oid, "title": self.title, "message": self.message, "date": self.date, "authors": authors}

    @property
    def history(self) -> "list[Commit]":
        """This commit and its ancestors, newest first."""
        return [self, *(self.parent.history if self.parent else [])]


class Repository:
    def __init__(self, kind: str, repo_id: str, private: bool):
        self.kind, self.repo_id, self.private = kind, repo_id, private
        # Like the Hub's, a new repository is not empty, so that its main branch has a commit.
        first = Commit({".gitattributes": File(GIT_ATTRIBUTES, is_lfs=False)}, title="initial commit")
        self.commits = {first.oid: first}
        self.branches = {"main": first}
        self.tags: dict[str, Commit] = {}

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, or a full or abbreviated commit id names."""
        if revision in self.branches or revision in self.tags:
            return (self.branches | self.tags)[revision]
        matches = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
        if len(revision) < 7 or len(matches) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return matches[0]

    def add_commit(self, branch: str, files: dict[str, File], title: str, message: str) -> Commit:
        commit = Commit(files, title, message, parent=self.branches[branch])
        self.commits[commit.oid] = self.branches[branch] = commit
        return commit

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.resolve(revision)
        if path not in commit.files:
            # With this header the client remembers in its cache that the file does not exist.
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        return commit, commit.files[path]

    def tree(self, revision: str) -> dict[str, dict[str, Any]]:
        """All files and folders, by path."""
        entries = {}
        for path, file in self.resolve(revision).files.items():
            for folder in list(PurePosixPath(path).parents)[:-1]:
                oid = hashlib.sha1(str(folder).encode()).hexdigest()
                entries[str(folder)] = {"type": "directory", "path": str(folder), "size": 0, "oid": oid}
            entries[path] = file.describe(path)
        return dict(sorted(entries.items()))
