"""One folder, one upload: a trained model becomes a Hub repository that loads on a machine without this package.

`push_folder` looks before it uploads: weights, config, the code that config.json names and the image processor are all
there, or nothing is sent. What is sent becomes one commit, so that no revision of the repository is half a model.
A step that fails for a moment is tried again, and a push after an interruption finds the large files that arrived.
Every failure is an `HFViTError` of one line that never contains the token.

Nothing leaves the machine that is not a regular file inside the folder: facts.json and links, which somebody else may
have written, cannot name others. Not the `push_to_hub` of model and processor: each makes a commit of its own, and
neither looks at the whole folder.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging

from ..errors import HFViTError
from ..image_processing import read_settings
from .model_card import EVAL_RESULTS, FACTS, REPORT_FILE, load_facts, render_card, shows_report, write_card


T = TypeVar("T")

# The class of every network failure in the HTTP library that huggingface_hub is built on (httpx, later httpx2).
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may fix
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 30.0  # tries of one step; seconds between them, doubling
MAX_RETRY_SECONDS = 120  # no further try of a step begins after that
MAX_SILENCE_SECONDS = 300  # a step without an answer ends then; an upload has in addition the time its bytes need
SLOWEST_UPLOAD = 100_000  # bytes per second
SCANNED_BYTES = 1 << 20  # of a file at a time
UPLOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jsonl",
    "*.py",
    "*.png",
    "*.svg",
    "README.md",
    "LICENSE",
    f"{EVAL_RESULTS}/*.yaml",
)
FIGURES = (".png", ".svg", ".jpg", ".jpeg", ".webp", ".gif")
LAST_CHECKPOINT = "last-checkpoint"  # the folder that transformers' Trainer uses for the same


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    checkpoint: str | Path | None = None,
    attempts: int = ATTEMPTS,
) -> str:
    """Upload a saved model with everything that belongs to it; the repository is made where it does not exist.

    Args:
        folder: what training or `save_pretrained` wrote. Its README.md is rendered anew for `repo_id`, unless it was
            written by hand. Checkpoints and logs in sub-folders stay here.
        repo_id: `owner/name`, or `name` for one of your own.
        private: make a new repository private; one that exists keeps what it is.
        revision: branch to upload to, made where it does not exist.
        create_pr: open a pull request instead of writing to the branch.
        token: access token with write permission; the saved one or HF_TOKEN where None.
        checkpoint: folder of a checkpoint that goes along as `last-checkpoint/`, to go on from elsewhere.
        attempts: tries of each step before it counts as failed.

    Returns:
        Address of the repository, or of the pull request.

    Raises:
        HFViTError: the folder is not a complete model, no or wrong token, no permission, no network, another model
            under that name.
    """
    folder = Path(folder)
    check_model_folder(folder)
    token = needed_token(token)
    files: dict[str, Path] = {name: folder / name for name in files_to_upload(folder)}
    if checkpoint is not None:
        inside = sorted(path for path in Path(checkpoint).iterdir() if not path.is_dir())
        files |= {f"{LAST_CHECKPOINT}/{path.name}": sendable(path, Path(checkpoint)) for path in inside}
    check_no_secret(files, token)
    upload = Upload(repo_id, token, attempts)
    upload.make(private=private)
    upload.check_same_kind(folder, revision)
    if revision not in (None, constants.DEFAULT_REVISION) and not create_pr:
        upload.make_branch(str(revision))
    address_card(folder, upload.repo_id)
    files |= {name: folder / name for name in files_to_upload(folder)}
    message = f"Upload {folder.resolve().name} with hf_vit"
    return upload.commit(files, message, revision=revision, create_pr=create_pr)


def push_space(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the folder of a demo page (`hf_vit.hub.space.write_space`) as a Space; returns its address."""
    token = needed_token(token)
    inside = [path for path in sorted(Path(folder).rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = {path.relative_to(folder).as_posix(): sendable(path, Path(folder)) for path in inside}
    check_no_secret(files, token)
    upload = Upload(repo_id, token, ATTEMPTS, kind="space")
    upload.make(private=private)
    return upload.commit(files, "Upload a demo page with hf_vit")


def needed_token(token: str | None) -> str:
    """The token given or saved."""
    token = token or get_token()
    if not token:
        raise HFViTError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one with write permission")
    return token


class Upload:
    """The steps of one upload to a model repository or Space; each is tried again when it fails for a moment, says so
    in one line, and ends after a limited time.
    """

    def __init__(self, repo_id: str, token: str, attempts: int, kind: str = "model"):
        if re.match(r"(datasets|spaces|models|buckets|kernels)/|https?://", repo_id):
            raise HFViTError(f"'{repo_id}' is not the name of a {kind} repository: write owner/name")
        self.repo_id, self.token, self.attempts, self.kind = repo_id, token, attempts, kind
        self.api = HfApi(token=token)

    def make(self, private: bool) -> None:
        """Find or create the repository."""
        self.step(self.api.whoami)
        sdk = "gradio" if self.kind == "space" else None

        def create() -> str:
            made = self.api.create_repo(
                self.repo_id, repo_type=self.kind, private=private, exist_ok=True, space_sdk=sdk
            )
            return made.repo_id

        self.repo_id = self.step(create, creating=True)

    def make_branch(self, revision: str) -> None:
        self.step(lambda: self.api.create_branch(self.repo_id, branch=revision, exist_ok=True))

    def check_same_kind(self, folder: Path, revision: str | None) -> None:
        """Raise HFViTError if the repository holds a model of another architecture, which this one would bury."""

        def stored() -> str | None:
            try:
                path = hf_hub_download(self.repo_id, "config.json", revision=revision, token=self.token)
            except LocalEntryNotFoundError:  # the network, not the repository
                raise
            except (EntryNotFoundError, RevisionNotFoundError):
                return None
            try:
                return json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
            except (ValueError, AttributeError, RecursionError):
                raise HFViTError(
                    f"config.json of {self.repo_id} is not JSON: fix or delete it on the Hub, or delete {path}"
                ) from None

        there, ours = self.step(stored), read_settings(folder / "config.json")["model_type"]
        if there not in (None, ours):
            raise HFViTError(
                f"{self.repo_id} holds a model of type '{there}', this one is '{ours}': take another name"
            )

    def commit(
        self,
        files: Mapping[str, Path],
        message: str,
        *,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """All files in one commit; returns the address."""

        def send() -> str:
            # Made anew for each try: large files that arrived are then found on the Hub, and an answer that was lost
            # after the commit shows as nothing left to do.
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            done = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=self.kind,
                revision=revision,
                create_pr=create_pr,
            )
            if create_pr and done.pr_url is None:
                raise HFViTError(f"{self.repo_id} holds exactly these files: there is nothing to propose")
            return done.pr_url or f"{self.api.endpoint}/{'spaces/' * (self.kind == 'space')}{self.repo_id}"

        # A second try could open a second pull request: whether the first one arrived cannot be asked.
        size = sum(path.stat().st_size for path in files.values())
        return self.step(send, attempts=1 if create_pr else self.attempts, extra_seconds=size / SLOWEST_UPLOAD)

    def step(
        self, act: Callable[[], T], attempts: int | None = None, creating: bool = False, extra_seconds: float = 0
    ) -> T:
        """Do one thing, again if it fails for a moment.

        Args:
            act: what is done.
            attempts: tries, `self.attempts` where None.
            creating: whether a conflict (409) means that the name is taken.
            extra_seconds: time that the step may take beyond MAX_SILENCE_SECONDS.
        """
        attempts, began = attempts or self.attempts, time.monotonic()
        with one_line_errors(self.repo_id, self.token, creating), quiet_hub():
            for attempt in range(1, attempts + 1):
                try:
                    return within(MAX_SILENCE_SECONDS + extra_seconds, act, self.repo_id)
                except (HfHubHTTPError, TRANSPORT_ERROR, OSError, RuntimeError, json.JSONDecodeError) as error:
                    if not is_passing(error) or attempt == attempts:
                        raise
                    if time.monotonic() - began > MAX_RETRY_SECONDS:
                        raise
                    wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                    reason = short_reason(error, self.token)
                    print(
                        f"{self.repo_id}: {reason}; trying again in {wait:.0f} s ({attempt + 1} of {attempts})",
                        file=sys.stderr,
                    )
                time.sleep(wait)
        raise AssertionError("unreachable: one_line_errors raises")


def within(seconds: float, act: Callable[[], T], repo_id: str) -> T:
    """The result of `act`, or an HFViTError after so many seconds without one.

    In a thread of its own: the HTTP library's time limits are between two bytes, and a server that keeps a connection
    open without an answer has none. The thread is left behind, and ends with the process.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(act())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise HFViTError(
            f"the Hub has not answered for {seconds:.0f} s: look at {repo_id}, which may be complete, then push again"
        )
    return result[0]


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without huggingface_hub's own lines about each of its retries (hundreds on a bad day): a step says it once."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def short_reason(error: BaseException, token: str) -> str:
    """What failed, in a few words without the token."""
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        return f"the Hub answered {response.status_code}"
    return (" ".join(str(error).split())[:120] or type(error).__name__).replace(token, "***")


def is_passing(error: BaseException) -> bool:
    """Whether another try may fix it: a busy or broken server, a network that was away."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, json.JSONDecodeError):  # an answer that was cut; the next try finds what it was about
        return True
    if isinstance(error, RuntimeError):  # a large file's transfer that failed: over LFS with its cause, over Xet bare
        return error.__cause__ is None or is_passing(error.__cause__)
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        return error.response.status_code in PASSING
    return isinstance(error, TRANSPORT_ERROR | LocalEntryNotFoundError | ConnectionError)


def check_model_folder(folder: Path) -> None:
    """Raise HFViTError unless the folder holds a model that loads by itself."""
    if not folder.is_dir():
        raise HFViTError(f"no folder {folder}: give the one that training or save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise HFViTError(f"{folder} is not a model: it has no config.json")
    config = read_settings(folder / "config.json")
    if not config.get("model_type"):
        raise HFViTError(f"{folder / 'config.json'} names no model_type: it is not the config of a model")
    targets = config.get("auto_map") or {}
    if not isinstance(targets, dict) or not all(isinstance(target, str) for target in targets.values()):
        raise HFViTError(f"{folder / 'config.json'}: 'auto_map' must give each class one file.Name")
    needed = {f"{target.split('--')[-1].split('.')[0]}.py" for target in targets.values()}
    for name in sorted(needed):
        needed |= siblings(folder, name)
    missing = [name for name in ["preprocessor_config.json", *sorted(needed)] if not (folder / name).is_file()]
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()] + missing
    if missing:
        raise HFViTError(
            f"{folder} is incomplete, it lacks {', '.join(missing)}: save the model and its image processor there "
            "with save_pretrained"
        )


def weight_files(folder: Path) -> list[str]:
    """The files that hold the weights: one, or the pieces that an index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    named = read_settings(index).get("weight_map")
    names = list(named.values()) if isinstance(named, dict) else []
    if not names or not all(isinstance(name, str) and PurePosixPath(name).name == name for name in names):
        raise HFViTError(f"{index} names no weights of this folder: save the model again with save_pretrained")
    return sorted(set(names))


def siblings(folder: Path, name: str) -> set[str]:
    """The files of the folder that a travelling file imports, itself included, however deep."""
    names, open_files = set(), [name]
    while open_files:
        name = open_files.pop()
        if name in names or not (folder / name).is_file():
            names.add(name)
            continue
        names.add(name)
        try:
            code = (folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise HFViTError(f"{folder / name} is not Python in UTF-8: save the model again") from None
        imports = re.findall(r"^\s*from\s+\.(\w+)\s+import", code, re.MULTILINE)
        open_files += [f"{module}.py" for module in imports]
    return names


def files_to_upload(folder: Path) -> list[str]:
    """Names of the files that belong to the model, of its scores, and of the figures and the page its facts name.

    Raises:
        HFViTError: one of them is a link or no regular file, or the facts name a figure outside of the folder.
    """
    paths = (path for pattern in UPLOADED for path in folder.glob(pattern))
    names = {path.relative_to(folder).as_posix() for path in paths if path.name[0] != "."}  # half-written ones
    facts = load_facts(folder) if (folder / FACTS).is_file() else {}
    figures = facts.get("figures") or []
    if shows_report(facts) and (folder / REPORT_FILE).exists():  # it holds images: only where the card links it
        names.add(REPORT_FILE)
    for name in figures if isinstance(figures, list) else [figures]:
        path = PurePosixPath(str(name))
        if path.is_absolute() or ".." in path.parts or "\\" in str(name) or path.suffix.lower() not in FIGURES:
            raise HFViTError(
                f"{folder / FACTS} names the figure '{name}', which is no image file inside the folder: remove it "
                "from 'figures'"
            )
        if (folder / name).exists():
            names.add(path.as_posix())
    for name in names:
        sendable(folder / name, folder)
    return sorted(names)


def sendable(path: Path, folder: Path) -> Path:
    """The path of a regular file that lies in the folder itself.

    Raises:
        HFViTError: it is a link, or reached by one, or a folder, FIFO or device: a folder that somebody else made
            could make an upload of any file of this machine.
    """
    steps = [path, *(parent for parent in path.parents if folder in parent.parents)]
    link = next((step for step in steps if step.is_symlink()), None)
    if link is not None:
        raise HFViTError(f"{link} is a link: nothing outside of {folder} is uploaded; put the file itself there")
    if not path.is_file():
        raise HFViTError(f"{path} is not a regular file: remove it from the folder")
    return path


def check_no_secret(files: Mapping[str, Path], token: str) -> None:
    """Raise HFViTError naming the file that holds the token, if one does, whatever its kind."""
    secret = token.encode()
    for path in files.values():
        with path.open("rb") as file:
            tail = b""
            while block := file.read(SCANNED_BYTES):
                window = tail + block
                if secret in window:
                    raise HFViTError(f"{path} contains your access token: remove it before anything is uploaded")
                tail = window[-len(secret) :]


def address_card(folder: Path, repo_id: str) -> None:
    """Render the card for the repository it goes to; one that somebody edited stays as it is."""
    card = folder / "README.md"
    if not (folder / FACTS).is_file():
        return
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        addressed = re.search(r'model="([^"]+)"', text)
        if text != render_card(load_facts(folder), folder, addressed[1] if addressed else None):
            return
    write_card(folder, repo_id)


@contextmanager
def one_line_errors(repo_id: str, token: str, creating: bool = False) -> Iterator[None]:
    """Turn whatever the Hub or the network answers into an HFViTError that names the cause and the way out.

    Args:
        creating: whether a repository is being made, where a conflict means that its name is taken.
    """
    try:
        yield
    except HFValidationError as error:
        raise HFViTError(f"'{repo_id}' is not the name of a repository: write owner/name") from error
    except OfflineModeIsEnabled as error:
        raise HFViTError("huggingface_hub is offline: unset HF_HUB_OFFLINE to upload") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        causes = {
            401: "the Hub does not accept this token: run `hf auth login` with one that has write permission",
            403: f"this token may not write to {repo_id}: use one with write permission, or another name",
            404: f"the Hub has no {repo_id}, or does not show it to this token",
            409: f"the name {repo_id} is taken: choose another"
            if creating
            else f"{repo_id} was changed by somebody else meanwhile: push again",
            413: f"a file is too large for {repo_id}: save it in pieces, save_pretrained(..., max_shard_size='5GB')",
            429: "the Hub asks for fewer requests: try again later",
        }
        detail = f"the Hub answered {status} for {repo_id}: {' '.join(str(error.server_message or error).split())}"
        raise HFViTError(causes.get(status, detail).replace(token, "***")) from None
    except HFViTError:
        raise
    except KeyError as error:
        if creating:  # create_repo of a name that something else has: the answer lacks an address
            raise HFViTError(f"the name {repo_id} is taken: choose another") from None
        raise HFViTError(f"the Hub's answer for {repo_id} is incomplete (no {error}): push again") from None
    except json.JSONDecodeError:
        raise HFViTError(
            f"the Hub's answer for {repo_id} was cut off: look whether the upload is there, then push again"
        ) from None
    except ValueError as error:  # the Hub takes a file, or the metadata of the card, for wrong
        reason = " ".join(str(error).split()).replace(token, "***")
        raise HFViTError(f"the Hub refuses the upload to {repo_id}: {reason}") from None
    except (TRANSPORT_ERROR, OSError, RuntimeError) as error:
        why = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else str(error)
        reason = " ".join(why.split()).replace(token, "***")
        raise HFViTError(
            f"cannot upload to {constants.ENDPOINT} ({reason}): check the network, then push again"
        ) from None
