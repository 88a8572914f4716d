"""A small Hugging Face Hub on this machine, standard library only, that huggingface_hub talks to through HF_ENDPOINT.

    with HubServer(users={"hf_alice": "alice"}) as hub:
        environment = hub.environment(token="hf_alice", home=tmp_path)   # for a subprocess

It knows what an upload and a download need: whoami, create, validate-yaml, preupload, LFS, commit, branches, pull
requests, info, tree, paths-info, resolve with ranges of bytes, and the errors the Hub answers with. Uploads take the
LFS path (HF_HUB_DISABLE_XET=1). Models, Spaces and data sets ("spaces/owner/name", "datasets/owner/name" in
`repositories`); everything is kept in memory. `faults` makes it a bad day: requests answered with 500 or 429, and
connections cut before the request is read, or in the middle of the answer.
"""

import base64
import hashlib
import json
import os
import random
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".png", ".npz", ".parquet", ".tar")


@dataclass
class Faults:
    """Which requests fail, and how: a fraction `rate` of those whose path begins so, drawn with `seed`."""

    rate: float
    seed: int
    kinds: tuple[str, ...] = ("500", "429", "cut before", "cut after")
    path: str = ""
    most: int = 1 << 30  # so many and no more

    def __post_init__(self):
        self.random, self.lock, self.happened = random.Random(self.seed), threading.Lock(), []

    def draw(self, path: str) -> str | None:
        with self.lock:
            if not path.startswith(self.path) or len(self.happened) >= self.most:
                return None
            kind = self.random.choice(self.kinds) if self.random.random() < self.rate else None
            self.happened += [kind] if kind else []
        return kind


@dataclass
class Repository:
    private: bool = False
    gated: bool = False  # everybody sees it, only its owner reads it
    largest: int = 5 << 30  # bytes of a file
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})  # id: {path: content}
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)
    pull_requests: int = 0

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit id, {path: content}) of a branch, a pull request or a commit."""
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class HubServer:
    """Serves on a free port of the loopback interface while the `with` block lasts.

    Args:
        users: {token: user name}.
        read_only: tokens without write permission.
        reserved: names that nobody can have.
    """

    def __init__(self, users: dict[str, str], read_only: tuple[str, ...] = (), reserved: tuple[str, ...] = ()):
        self.users, self.read_only, self.reserved = users, read_only, reserved
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: Faults | None = None
        self.held = ""  # requests whose path contains this are never answered
        self.holding = threading.Event()  # set once one of them has come
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.port = self.httpd.server_port
        self.endpoint = f"http://localhost:{self.port}"  # LFS lives on 127.0.0.1, as on the Hub on another host

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a subprocess that talks to this server, with caches of its own under `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        ours |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "localhost,127.0.0.1",
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    fault: str | None = None

    def log_message(self, *_):
        """Silence: the tests read `hub.requests`."""

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.fault == "cut after" and not content:
            return self.cut()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.fault == "cut after":
            self.wfile.write(content[: len(content) // 2])
            return self.cut()
        if self.command != "HEAD":
            self.wfile.write(content)

    def cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        path = unquote(address.path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.held and self.hub.held in path:
            self.hub.holding.set()
            return self.connection.recv(1) and None  # until the other side is gone
        self.fault = self.hub.faults.draw(path) if self.hub.faults else None
        if self.fault == "cut before":
            return self.cut()
        if self.fault in ("500", "429"):
            return self.refuse(int(self.fault), "", "a failure on purpose")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.hub.users.get(self.token)
        if self.token and not self.user and not path.startswith("/lfs/"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return getattr(self, name)(*found.groups())
        return self.refuse(404, "", f"no such endpoint: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def owns(self, name: str) -> bool:
        return self.user is not None and self.user == shown(name).split("/")[0]

    def repository(self, name: str, write: bool = False, read: bool = False) -> Repository | None:
        """The repository, or None after an error was answered; `read` is for the contents of its files."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.owns(name)):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if read and found.gated and not self.owns(name):
            message = f"Access to {name} is restricted. You must have access to it and be authenticated."
            self.refuse(403 if self.user else 401, "GatedRepo", message)
            return None
        if write and (not self.owns(name) or self.token in self.hub.read_only):
            self.refuse(403, "", "You don't have the rights to write here")
            return None
        return found

    # -- accounts and repositories -------------------------------------------------------------------------------

    def whoami(self) -> None:
        if not self.user:
            return self.refuse(401, "", "Unauthorized")
        self.answer(200, {"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if self.token in self.hub.read_only or not self.owns(name):
            return self.refuse(403, "", f"You don't have the rights to create a model under {name.split('/')[0]}")
        if name in self.hub.reserved:
            return self.refuse(409, "", "This name is reserved")
        kind = wanted.get("type", "model")
        name = name if kind == "model" else f"{kind}s/{name}"
        reply = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": shown(name)}
        if name in self.hub.repositories:
            return self.answer(409, reply | {"error": "You already created this model repo"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        self.answer(200, reply)

    def validate_yaml(self) -> None:
        wanted = json.loads(self.body)
        errors = card_errors(wanted["content"], wanted["repoType"])
        reply = {"errors": [{"message": message} for message in errors], "warnings": []}
        self.answer(400 if errors else 200, reply)

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        if branch in repository.refs:
            return self.refuse(409, "", "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        self.answer(200, {})

    # -- upload --------------------------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        if repository.files(revision) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        present = repository.files(revision)[1]
        modes = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": etag(path, present[path]) if path in present else None,
            }
            for path in (file["path"] for file in json.loads(self.body)["files"])
        ]
        self.answer(200, {"files": modes})

    def lfs_batch(self, name: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        base = f"http://127.0.0.1:{self.hub.port}/lfs"
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{base}/{item['oid']}"}, "verify": {"href": f"{base}/verify"}}
            error = {"error": {"code": 422, "message": f"file larger than {repository.largest} bytes"}}
            if item["size"] > repository.largest:
                objects.append(item | error)
            else:
                objects.append(item if item["oid"] in self.hub.lfs else item | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_object(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.refuse(400, "", "content does not match its hash")
            self.hub.lfs[oid] = self.body
            return self.answer(200)
        self.part_of(self.hub.lfs[oid], ETag=f'"{oid}"')

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        complete = len(self.hub.lfs.get(wanted["oid"], b"")) == wanted["size"]
        self.answer(200 if complete else 404, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None:
            return
        parent = repository.files(revision)
        if parent is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(parent[1]), ""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                files.pop(value["path"], None)
        new = hashlib.sha1(f"{parent[0]}{len(repository.commits)}".encode()).hexdigest()
        repository.commits[new] = files
        repository.messages.append(message)
        reply = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{new}", "commitOid": new, "success": True}
        if self.query.get("create_pr"):
            repository.pull_requests += 1
            revision = f"refs/pr/{repository.pull_requests}"
            reply["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{repository.pull_requests}"
        repository.refs[revision] = new
        self.answer(200, reply)

    # -- download ------------------------------------------------------------------------------------------------

    def found(self, name: str, revision: str, read: bool = False) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repository(name, read=read)
        files = repository.files(revision) if repository else None
        if repository and files is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def info(self, name: str, revision: str | None) -> None:
        files = self.found(name, revision or "main")
        if files:
            siblings = [{"rfilename": path} for path in sorted(files[1])]
            repository = self.hub.repositories[name]
            reply = {"id": shown(name), "modelId": shown(name), "sha": files[0], "siblings": siblings}
            self.answer(200, reply | {"private": repository.private, "gated": "auto" if repository.gated else False})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        files = self.found(name, revision)
        if not files:
            return
        prefix = f"{folder}/" if folder else ""
        below = [path for path in entries_of(files[1]) if path.startswith(prefix)]
        if folder and not below:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if self.query.get("recursive", "").lower() != "true":
            below = [path for path in below if "/" not in path.removeprefix(prefix)]
        self.answer(200, [described(path, files[1]) for path in below])

    def paths_info(self, name: str, revision: str) -> None:
        files = self.found(name, revision)
        if files:
            wanted = [path.strip("/") for path in parse_qs(self.body.decode())["paths"]]
            self.answer(200, [described(path, files[1]) for path in wanted if path in entries_of(files[1])])

    def resolve(self, name: str, revision: str, path: str) -> None:
        files = self.found(name, revision, read=True)
        if not files:
            return
        commit, content = files[0], files[1].get(path)
        if content is None:
            message = "Entry not found"
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message=message, X_Repo_Commit=commit)
        tag = etag(path, content)
        if path.endswith(LFS_SUFFIXES):
            self.hub.lfs.setdefault(tag, content)  # a test may have put it into the repository by hand
            return self.answer(
                302,
                Location=f"http://127.0.0.1:{self.hub.port}/lfs/{tag}",
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{tag}"',
                X_Linked_Size=str(len(content)),
            )
        self.part_of(content, ETag=f'"{tag}"', X_Repo_Commit=commit)

    def part_of(self, content: bytes, **headers: str) -> None:
        """A file, or the range of its bytes that was asked for (RFC 9110, section 14)."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            return self.answer(416, b"", Content_Range=f"bytes */{len(content)}")
        self.answer(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}", **headers)


def shown(name: str) -> str:
    """A repository's name without the kind in front."""
    return name.removeprefix("spaces/").removeprefix("datasets/")


def entries_of(files: dict[str, bytes]) -> list[str]:
    """Paths of all files and of the folders that hold them."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    return sorted([*files, *folders])


def described(path: str, files: dict[str, bytes]) -> dict[str, object]:
    """What the tree says about a file or folder."""
    if path not in files:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    size, tag = len(files[path]), etag(path, files[path])
    pointer = {"lfs": {"oid": tag, "size": size, "pointerSize": 130}} if path.endswith(LFS_SUFFIXES) else {}
    return {"type": "file", "path": path, "size": size, "oid": tag, **pointer}


def etag(path: str, content: bytes) -> str:
    """sha256 of an LFS file, git's blob hash of another, as the Hub names them."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def card_errors(content: str, kind: str) -> list[str]:
    """What the Hub has against a card: its rules for what we write (docs/hub/model-cards, spaces-config)."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not block:
        return ["no metadata block"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"metadata is not YAML: {error}"]
    errors = [] if isinstance(data, dict) else ["metadata is not a mapping"]
    if kind == "space":
        return errors + [f'"{key}" is required' for key in ("sdk", "app_file") if not data.get(key)]
    licenses = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown")
    errors += [] if data.get("license", "other") in licenses else [f'"license" must be one of {licenses}']
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            errors.append(f'"{key}" must be an array of strings')
    ids = [*data.get("datasets", []), *([data["base_model"]] if "base_model" in data else [])]
    errors += [f'"{name}" is not a repository' for name in ids if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
    for entry in data.get("model-index", []):
        errors += [] if isinstance(entry.get("name"), str) else ['"model-index[].name" is required']
        for result in entry["results"]:
            whole = result.get("task", {}).get("type") and result["dataset"].get("type") and result["dataset"]["name"]
            errors += [] if whole else ['"model-index[].results[]" needs task.type, dataset.type and dataset.name']
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                    errors.append('"metrics[]" needs a type and a value')
    return errors


NAME = r"((?:(?:spaces|datasets)/)?[^/]+/[^/]+)"
REPOSITORY = rf"/api/(?:models/|(?=spaces/|datasets/)){NAME}"
ROUTES = (
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("POST",), rf"{REPOSITORY}/branch/(.+)", "branch"),
    (("POST",), rf"{REPOSITORY}/preupload/(.+)", "preupload"),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), r"/lfs/verify", "lfs_verify"),
    (("GET", "HEAD", "PUT"), r"/lfs/([0-9a-f]{64})", "lfs_object"),
    (("POST",), rf"{REPOSITORY}/commit/(.+)", "commit"),
    (("GET",), rf"{REPOSITORY}(?:/revision/(.+))?", "info"),
    (("GET",), rf"{REPOSITORY}/tree/([^/]+|refs/pr/\d+)(?:/(.+))?", "tree"),
    (("POST",), rf"{REPOSITORY}/paths-info/(.+)", "paths_info"),
    (("GET", "HEAD"), rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", "resolve"),
)
