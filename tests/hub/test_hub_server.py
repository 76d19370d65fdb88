# SPDX-License-Identifier: Apache-2.0
"""The loopback Hub itself, through the real `huggingface_hub` client and, for bare HTTP, through `http.client`."""

import base64
import hashlib
import http.client
import json

import pytest

from hub_server import OTHER_TOKEN, USER_TOKEN


@pytest.fixture
def connection(hub):
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    yield connection
    connection.close()


def test_folder_round_trip(hub, run_in_hub_process, tmp_path):
    files = {
        "README.md": b"# Title\n",
        "empty.txt": b"",
        "config.json": b"{}",
        "transformer/model.safetensors": bytes(range(256)) * 4096,
        "images/naïve 名.png": b"\x89PNG\0\1\2",
    }
    for path, content in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(content)
    code = """
        import json, sys
        from huggingface_hub import HfApi, get_paths_info, snapshot_download
        api, repo, (source, target, *paths) = HfApi(), "user/folder", sys.argv[1:]
        api.create_repo(repo)
        first = api.upload_folder(repo_id=repo, folder_path=source).oid
        again = api.upload_folder(repo_id=repo, folder_path=source).oid
        snapshot_download(repo, local_dir=target)
        infos = get_paths_info(repo, paths)
        listed = [item.path for item in api.list_repo_tree(repo, "transformer")]
        print(json.dumps({"first": first, "again": again, "lfs": [i.path for i in infos if i.lfs], "listed": listed}))
    """
    result = json.loads(run_in_hub_process(code, tmp_path / "up", tmp_path / "down", *files))

    assert {path: hub.files("user/folder")[path] for path in files} == files
    assert {path: (tmp_path / "down" / path).read_bytes() for path in files} == files
    assert sorted(result["lfs"]) == ["images/naïve 名.png", "transformer/model.safetensors"]
    assert result["listed"] == ["transformer/model.safetensors"]
    assert result["again"] == result["first"]  # unchanged files make no commit
    assert sum(request.path.startswith("/lfs/") for request in hub.requests) == 2  # and are not sent again


def test_commits_delete_and_refuse_a_stale_parent(hub, run_in_hub_process):
    code = """
        from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi
        from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
        api, repo = HfApi(), "user/commits"
        api.create_repo(repo)
        parent = api.model_info(repo).sha
        additions = [Add(name, name.encode()) for name in ("a", "b", "folder/c", "folder/d")]
        head = api.create_commit(repo, additions, commit_message="add").oid
        try:
            api.create_commit(repo, [Add("a", b"stale")], commit_message="stale", parent_commit=parent)
        except HfHubHTTPError as error:
            print(error.response.status_code)
        try:
            api.delete_file("missing", repo)
        except RemoteEntryNotFoundError as error:
            print(error.response.status_code)
        deletions = [Delete("a"), Delete("folder/")]
        api.create_commit(repo, deletions, commit_message="delete", parent_commit=head)
        print(*[commit.title for commit in api.list_repo_commits(repo)], sep=",")
    """
    assert run_in_hub_process(code).splitlines() == ["412", "404", "delete,add,initial commit"]
    assert hub.files("user/commits").keys() == {".gitattributes", "b"}


def test_branches_tags_and_commit_ids_name_revisions(hub, run_in_hub_process):
    code = """
        from pathlib import Path
        from huggingface_hub import HfApi
        api, repo = HfApi(), "user/revisions"
        api.create_repo(repo)
        first = api.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id=repo).oid
        api.create_tag(repo, tag="v1.0")
        api.create_branch(repo, branch="feature/x")
        api.create_branch(repo, branch="main", exist_ok=True)
        api.upload_file(path_or_fileobj=b"2", path_in_repo="f", repo_id=repo)
        api.upload_file(path_or_fileobj=b"3", path_in_repo="f", repo_id=repo, revision="feature/x")
        revisions = (None, "main", "v1.0", "feature/x", first, first[:7])
        print(*[Path(api.hf_hub_download(repo, "f", revision=revision)).read_text() for revision in revisions])
        refs = api.list_repo_refs(repo)
        print(*[ref.name for ref in refs.branches + refs.tags])
        api.delete_tag(repo, tag="v1.0")
        api.delete_branch(repo, branch="feature/x")
        print(*[api.revision_exists(repo, revision) for revision in ("main", first[:6], "v1.0", "feature/x")])
    """
    assert run_in_hub_process(code).splitlines() == [
        "2 2 1 3 1 1",
        "main feature/x v1.0",
        "True False False False",
    ]
    assert hub.files("user/revisions")["f"] == b"2"


ERRORS = """
    from huggingface_hub import HfApi
    api = HfApi()
    def attempt(function, *args, **kwargs):
        try:
            function(*args, **kwargs)
            print("succeeded")
        except Exception as error:
            print(type(error).__name__, error.response.status_code)
"""


def test_errors_name_what_is_missing(run_in_hub_process):
    code = (
        ERRORS
        + """
    api.create_repo("user/errors")
    attempt(api.create_repo, "user/errors")
    attempt(api.create_repo, "user/errors", exist_ok=True)
    attempt(api.create_repo, "other/repo")
    attempt(api.model_info, "user/missing")
    attempt(api.model_info, "gpt2")
    attempt(api.dataset_info, "user/errors")
    attempt(api.hf_hub_download, "user/missing", "config.json")
    attempt(api.model_info, "user/errors", revision="missing")
    attempt(api.hf_hub_download, "user/errors", "config.json", revision="missing")
    attempt(api.hf_hub_download, "user/errors", "config.json")
    attempt(list, api.list_repo_tree("user/errors", "名"))
    attempt(api.upload_file, path_or_fileobj=b"", path_in_repo="f", repo_id="user/missing")
    attempt(api.upload_file, path_or_fileobj=b"", path_in_repo="f", repo_id="user/errors", revision="missing")
    attempt(api.upload_file, path_or_fileobj=b"", path_in_repo="f", repo_id="user/errors", create_pr=True)
    attempt(api.whoami, token="hf_unknown")
    api.delete_repo("user/errors")
    attempt(api.model_info, "user/errors")
    print(api.whoami()["name"])
    """
    )
    assert run_in_hub_process(code).splitlines() == [
        "HfHubHTTPError 409",
        "succeeded",
        "HfHubHTTPError 403",
        "RepositoryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RevisionNotFoundError 404",
        "RevisionNotFoundError 404",
        "RemoteEntryNotFoundError 404",
        "RemoteEntryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RevisionNotFoundError 404",
        "HfHubHTTPError 501",
        "HfHubHTTPError 401",
        "RepositoryNotFoundError 404",
        "user",
    ]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (USER_TOKEN, ["succeeded", "succeeded", "succeeded", "succeeded"]),
        (
            OTHER_TOKEN,
            ["RepositoryNotFoundError 404", "RepositoryNotFoundError 404", "succeeded", "HfHubHTTPError 403"],
        ),
        (None, ["RepositoryNotFoundError 401", "RepositoryNotFoundError 401", "succeeded", "HfHubHTTPError 401"]),
    ],
)
def test_who_may_read_and_write(run_in_hub_process, token, expected):
    setup = """
        from huggingface_hub import HfApi
        for name, private in (("private", True), ("public", False)):
            HfApi().create_repo(f"user/{name}", private=private, exist_ok=True)
            HfApi().upload_file(path_or_fileobj=b"text", path_in_repo="f", repo_id=f"user/{name}")
    """
    run_in_hub_process(setup)
    code = (
        ERRORS
        + """
    attempt(api.model_info, "user/private")
    attempt(api.hf_hub_download, "user/private", "f")
    attempt(api.hf_hub_download, "user/public", "f")
    attempt(api.upload_file, path_or_fileobj=b"text", path_in_repo="f", repo_id="user/public")
    """
    )
    assert run_in_hub_process(code, token=token).splitlines() == expected


def test_cached_files_are_not_sent_again(hub, run_in_hub_process, tmp_path):
    code = """
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
        repo = "user/cached"
        HfApi().create_repo(repo)
        HfApi().upload_file(path_or_fileobj=b"weights", path_in_repo="model.safetensors", repo_id=repo)
        hf_hub_download(repo, "model.safetensors")
        try:
            hf_hub_download(repo, "missing.json")
        except EntryNotFoundError:
            pass
    """
    run_in_hub_process(code, home=tmp_path)
    hub.requests.clear()
    code = """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        print(open(hf_hub_download("user/cached", "model.safetensors")).read())
        print(isinstance(try_to_load_from_cache("user/cached", "missing.json"), str | None))
    """
    path = "/user/cached/resolve/main/model.safetensors"
    assert run_in_hub_process(code, home=tmp_path).splitlines() == ["weights", "False"]
    assert hub.requests == [("HEAD", path, 200)]
    assert run_in_hub_process(code, home=tmp_path, HF_HUB_OFFLINE="1").splitlines() == ["weights", "False"]
    assert len(hub.requests) == 1


def test_model_card(hub, run_in_hub_process):
    code = """
        from huggingface_hub import HfApi, ModelCard
        HfApi().create_repo("user/card")
        card = ModelCard("---\\nlicense: apache-2.0\\n---\\n# Title\\n")
        # Not `card.push_to_hub`, which before huggingface_hub 2 has its metadata checked by huggingface.co in any case.
        HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="user/card")
        card = ModelCard.load("user/card")
        print(card.data.license, card.text.strip())
    """
    assert run_in_hub_process(code).strip() == "apache-2.0 # Title"
    assert hub.files("user/card")["README.md"].startswith(b"---\nlicense")


def test_dataset_streams(hub, run_in_hub_process):
    pytest.importorskip("datasets")
    code = """
        from datasets import Dataset, load_dataset
        from huggingface_hub import HfApi
        for split, rows in (("train", range(6)), ("test", range(3))):
            columns = {"codes": [[i, i + 1] for i in rows], "label": list(rows)}
            Dataset.from_dict(columns).push_to_hub("user/codes", split=split)
        stream = load_dataset("user/codes", split="train", streaming=True)
        print([row["label"] for row in stream], next(iter(stream.skip(4)))["codes"])
        print(load_dataset("user/codes", split="test")["label"][:])
        table = {"repo_id": "user/table", "repo_type": "dataset"}
        HfApi().create_repo(**table)
        HfApi().upload_file(path_or_fileobj=b"a,b\\n1,2\\n", path_in_repo="rows.csv", **table)
        print(next(iter(load_dataset("user/table", streaming=True)["train"])))
    """
    lines = run_in_hub_process(code).splitlines()
    assert lines == ["[0, 1, 2, 3, 4, 5] [4, 5]", "[0, 1, 2]", "{'a': 1, 'b': 2}"]
    assert any(path.endswith(".parquet") for path in hub.files("user/codes", kind="datasets"))


def request(connection, method, path, body=None, **headers):
    headers = {"Authorization": f"Bearer {USER_TOKEN}", **headers}
    connection.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
    response = connection.getresponse()
    return response, response.read()


def commit_lines(key: str, **value):
    yield json.dumps({"key": "header", "value": {"summary": "add"}}).encode() + b"\n"
    yield json.dumps({"key": key, "value": value}).encode() + b"\n"


def test_chunked_bodies_ranges_and_kept_connections(hub, connection):
    request(connection, "POST", "/api/repos/create", json.dumps({"name": "bytes"}))
    first = connection.sock
    assert first is not None
    body = commit_lines("file", path="text", content=base64.b64encode(b"0123456789").decode(), encoding="base64")
    commit = "/api/models/user/bytes/commit/main"
    response, _ = request(connection, "POST", commit, body, **{"Transfer-Encoding": "chunked"})
    assert response.status == 200
    assert hub.files("user/bytes")["text"] == b"0123456789"

    path = "/user/bytes/resolve/main/text"
    for asked, expected, answered in [
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ]:
        response, content = request(connection, "GET", path, Range=asked)
        assert (response.status, content, response.headers["Content-Range"]) == (206, expected, answered)
    response, _ = request(connection, "GET", path, Range="bytes=10-")
    assert (response.status, response.headers["Content-Range"]) == (416, "bytes */10")

    response, content = request(connection, "HEAD", path)
    assert (response.status, response.headers["Content-Length"], content) == (200, "10", b"")
    assert len(response.headers["X-Repo-Commit"]) == 40
    assert response.headers["ETag"] == f'"{hashlib.sha1(b"blob 10" + bytes(1) + b"0123456789").hexdigest()}"'
    assert "X-Linked-Size" not in response.headers
    response, _ = request(connection, "HEAD", "/user/bytes/resolve/main/missing")
    assert (response.status, response.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert len(response.headers["X-Repo-Commit"]) == 40
    assert connection.sock is first


def test_lfs_objects_must_be_announced_and_intact(hub, connection):
    request(connection, "POST", "/api/repos/create", json.dumps({"name": "objects"}))
    oid = hashlib.sha256(b"objects").hexdigest()
    lines = b"".join(commit_lines("lfsFile", path="model.bin", algo="sha256", oid=oid, size=7))
    commit = "/api/models/user/objects/commit/main"
    assert request(connection, "PUT", f"/lfs/{oid}", b"objects")[0].status == 403
    batch = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": 7}]})
    _, answer = request(connection, "POST", "/user/objects.git/info/lfs/objects/batch", batch)
    address = json.loads(answer)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)
    assert request(connection, "PUT", address, b"damaged")[0].status == 400
    assert request(connection, "POST", commit, lines)[0].status == 400
    assert "model.bin" not in hub.files("user/objects")

    assert request(connection, "PUT", address, b"objects")[0].status == 200
    assert request(connection, "POST", commit, lines)[0].status == 200
    response, content = request(connection, "GET", "/user/objects/resolve/main/model.bin")
    assert (content, response.headers["X-Linked-Size"]) == (b"objects", "7")
    assert response.headers["X-Linked-Etag"] == f'"{oid}"'


def test_what_is_not_served_says_so(hub, connection):
    response, answer = request(connection, "GET", "/api/models/user/repo/discussions")
    assert response.status == 501
    assert "discussions" in json.loads(answer)["error"]
    assert hub.requests[-1] == ("GET", "/api/models/user/repo/discussions", 501)
