"""Upload the folder of a trained model to the Hub in one commit; it loads on machines without this package.

`push_folder` first checks that weights, config, the code in config.json and the image processor are complete
(`model_folder.py`). All files go into one commit, so that no revision of the repository is incomplete. Steps are
retried after temporary failures, and a push after an interruption does not send large files again. Every failure is an
`HFViTError` of one line that never contains the token.

Not the `push_to_hub` of model and processor: each makes its own commit, and neither checks the whole folder.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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
from .model_card import FACTS, load_facts, render_card, write_card
from .model_folder import check_model_folder, check_no_secret, files_to_upload, sendable


T = TypeVar("T")

# Base class of all network errors in the HTTP library of huggingface_hub (httpx, later httpx2).
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
TEMPORARY_STATUSES = (408, 429, 500, 502, 503, 504)
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 30.0  # attempts of a step; seconds between them, doubling
MAX_RETRY_SECONDS = 120  # no further attempt of a step begins after this time
MAX_SILENCE_SECONDS = 300  # timeout of a step; an upload has in addition the time for its bytes
SLOWEST_UPLOAD = 100_000  # bytes per second
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
    """Upload a saved model with its code, processor, card and figures; the repository is created if needed.

    Args:
        folder: output of training or `save_pretrained`. Its README.md is rendered again for `repo_id`, unless it was
            edited. Checkpoints and logs in sub-folders are not uploaded.
        repo_id: `owner/name`, or `name` for one of your own.
        private: make a new repository private; an existing one is not changed.
        revision: branch to upload to, created if needed.
        create_pr: open a pull request instead of writing to the branch.
        token: access token with write permission; default: the saved one or HF_TOKEN.
        checkpoint: folder of a checkpoint to upload as `last-checkpoint/`, to resume elsewhere.
        attempts: of each step.

    Returns:
        URL of the repository, or of the pull request.

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
    """Upload the folder of a demo page (`hf_vit.hub.space.write_space`) as a Space; returns its URL."""
    token = needed_token(token)
    inside = [path for path in sorted(Path(folder).rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = {path.relative_to(folder).as_posix(): sendable(path, Path(folder)) for path in inside}
    check_no_secret(files, token)
    upload = Upload(repo_id, token, ATTEMPTS, kind="space")
    upload.make(private=private)
    return upload.commit(files, "Upload a demo page with hf_vit")


def needed_token(token: str | None) -> str:
    """The given or saved token; HFViTError if there is none."""
    token = token or get_token()
    if not token:
        raise HFViTError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one with write permission")
    return token


class Upload:
    """The steps of one upload to a model repository or Space; each is retried after a temporary failure, with one line
    on stderr, and has a timeout.
    """

    def __init__(self, repo_id: str, token: str, attempts: int, kind: str = "model"):
        if re.match(r"(datasets|spaces|models|buckets|kernels)/|https?://", repo_id):
            raise HFViTError(f"'{repo_id}' is not the name of a {kind} repository: write owner/name")
        self.repo_id, self.token, self.attempts, self.kind = repo_id, token, attempts, kind
        self.api = HfApi(token=token)

    def make(self, private: bool) -> None:
        """Create the repository if it does not exist."""
        self.step(self.api.whoami)
        sdk = "gradio" if self.kind == "space" else None

        def create() -> str:
            repository = self.api.create_repo(
                self.repo_id, repo_type=self.kind, private=private, exist_ok=True, space_sdk=sdk
            )
            return repository.repo_id

        self.repo_id = self.step(create, creating=True)

    def make_branch(self, revision: str) -> None:
        self.step(lambda: self.api.create_branch(self.repo_id, branch=revision, exist_ok=True))

    def check_same_kind(self, folder: Path, revision: str | None) -> None:
        """Raise HFViTError if the repository holds a model of another architecture, which would be replaced."""

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

        theirs, ours = self.step(stored), read_settings(folder / "config.json")["model_type"]
        if theirs not in (None, ours):
            raise HFViTError(
                f"{self.repo_id} holds a model of type '{theirs}', this one is '{ours}': take another name"
            )

    def commit(
        self,
        files: Mapping[str, Path],
        message: str,
        *,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload all files in one commit; returns the URL."""

        def send() -> str:
            # new operations for each attempt: large files that have arrived are then found on the Hub, and if only the
            # response to the commit was lost, there is nothing left to do
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            commit = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=self.kind,
                revision=revision,
                create_pr=create_pr,
            )
            if create_pr and commit.pr_url is None:
                raise HFViTError(f"{self.repo_id} holds exactly these files: there is nothing to propose")
            return commit.pr_url or f"{self.api.endpoint}/{'spaces/' * (self.kind == 'space')}{self.repo_id}"

        # a second attempt could open a second pull request: the Hub does not tell whether the first one arrived
        size = sum(path.stat().st_size for path in files.values())
        return self.step(send, attempts=1 if create_pr else self.attempts, extra_seconds=size / SLOWEST_UPLOAD)

    def step(
        self, act: Callable[[], T], attempts: int | None = None, creating: bool = False, extra_seconds: float = 0
    ) -> T:
        """Call `act`, again after temporary failures.

        Args:
            act: a request to the Hub.
            attempts: default: `self.attempts`.
            creating: whether a conflict (409) means that the name is taken.
            extra_seconds: timeout in addition to MAX_SILENCE_SECONDS.
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
    """The result of `act`, or an HFViTError after `seconds` without one.

    In a thread: the HTTP library's timeouts are between two bytes, which a server that keeps a connection open without
    a response can exceed. A thread that times out is abandoned, and ends with the process.
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
    """Silence huggingface_hub's own lines about each of its retries, of which there can be hundreds."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def short_reason(error: BaseException, token: str) -> str:
    """The cause of an error, in a few words without the token."""
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        return f"the Hub answered {response.status_code}"
    return (" ".join(str(error).split())[:120] or type(error).__name__).replace(token, "***")


def is_passing(error: BaseException) -> bool:
    """Whether a retry may help: a busy or failing server, or no network."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, json.JSONDecodeError):  # a truncated response
        return True
    if isinstance(error, RuntimeError):  # a failed transfer of a large file: by LFS with a cause, by Xet without
        return error.__cause__ is None or is_passing(error.__cause__)
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        return error.response.status_code in TEMPORARY_STATUSES
    return isinstance(error, TRANSPORT_ERROR | LocalEntryNotFoundError | ConnectionError)


def address_card(folder: Path, repo_id: str) -> None:
    """Render the card for its repository, unless it was edited."""
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
    """Turn errors of the Hub and the network into an HFViTError that names the cause and the way out.

    Args:
        creating: whether a repository is being created: a conflict (409) then means that its name is taken.
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
        if creating:  # create_repo for the name of something else: the response has no URL
            raise HFViTError(f"the name {repo_id} is taken: choose another") from None
        raise HFViTError(f"the Hub's answer for {repo_id} is incomplete (no {error}): push again") from None
    except json.JSONDecodeError:
        raise HFViTError(
            f"the Hub's answer for {repo_id} was cut off: look whether the upload is there, then push again"
        ) from None
    except ValueError as error:  # the Hub rejects a file, or the metadata of the card
        reason = " ".join(str(error).split()).replace(token, "***")
        raise HFViTError(f"the Hub refuses the upload to {repo_id}: {reason}") from None
    except (TRANSPORT_ERROR, OSError, RuntimeError) as error:
        why = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else str(error)
        reason = " ".join(why.split()).replace(token, "***")
        raise HFViTError(
            f"cannot upload to {constants.ENDPOINT} ({reason}): check the network, then push again"
        ) from None
