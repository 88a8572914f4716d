"""One folder, one upload: a trained model becomes a Hub repository that loads on a machine without this package.

`push_folder` looks before it uploads: weights, config, the code that config.json names and the image processor are all
there, or nothing is sent. Every failure is an `HFViTError` of one line that never contains the token.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from hf_vit.errors import HFViTError
from hf_vit.model_card import FACTS, load_facts, render_card, write_card


# The class of every network failure in the HTTP library that huggingface_hub is built on (httpx, later httpx2).
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
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
)
TEXT = (".json", ".jsonl", ".py", ".md", ".svg")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
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

    Returns:
        Address of the repository, or of the pull request.

    Raises:
        HFViTError: the folder is not a complete model, no or wrong token, no permission, no network.
    """
    folder = Path(folder)
    check_folder(folder)
    token = token or get_token()
    if not token:
        raise HFViTError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one with write permission")
    files = files_to_upload(folder)
    check_no_secret(folder, files, token)
    api = HfApi(token=token)
    with one_line_errors(repo_id, token):
        api.whoami()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, constants.DEFAULT_REVISION) and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    address_card(folder, repo_id)
    with one_line_errors(repo_id, token):
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in files_to_upload(folder)],
            commit_message=f"Upload {folder.resolve().name} with hf_vit",
        )
    return commit.pr_url or f"{api.endpoint}/{repo_id}"


def check_folder(folder: Path) -> None:
    """Raise HFViTError unless the folder holds a model that loads by itself."""
    if not folder.is_dir():
        raise HFViTError(f"no folder {folder}: give the one that training or save_pretrained wrote")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HFViTError(f"{folder} is not a model: it has no config.json") from None
    except ValueError as error:
        raise HFViTError(f"{folder / 'config.json'} is not JSON ({error})") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise HFViTError(f"{folder / 'config.json'} names no model_type: it is not the config of a model")
    needed = {f"{target.split('--')[-1].split('.')[0]}.py" for target in config.get("auto_map", {}).values()}
    for name in sorted(needed):
        needed |= siblings(folder, name)
    missing = [name for name in ["preprocessor_config.json", *sorted(needed)] if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.insert(0, "model.safetensors")
    if missing:
        raise HFViTError(
            f"{folder} is incomplete, it lacks {', '.join(missing)}: save the model and its image processor there "
            "with save_pretrained"
        )


def siblings(folder: Path, name: str) -> set[str]:
    """The files of the folder that a travelling file imports, itself included, however deep."""
    found, open_files = set(), [name]
    while open_files:
        name = open_files.pop()
        if name in found or not (folder / name).is_file():
            found.add(name)
            continue
        found.add(name)
        imports = re.findall(r"^\s*from\s+\.(\w+)\s+import", (folder / name).read_text(encoding="utf-8"), re.MULTILINE)
        open_files += [f"{module}.py" for module in imports]
    return found


def files_to_upload(folder: Path) -> list[str]:
    """Names of the files that belong to the model, and of the figures that its facts name."""
    names = {path.name for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()}
    figures = load_facts(folder).get("figures") or [] if (folder / FACTS).is_file() else []
    return sorted(names | {name for name in figures if (folder / name).is_file()})


def check_no_secret(folder: Path, files: list[str], token: str) -> None:
    """Raise HFViTError naming the file that holds the token, if one does."""
    for name in files:
        if name.endswith(TEXT) and token in (folder / name).read_text(encoding="utf-8", errors="replace"):
            raise HFViTError(f"{folder / name} contains your access token: remove it before anything is uploaded")


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
def one_line_errors(repo_id: str, token: str) -> Iterator[None]:
    """Turn whatever the Hub or the network answers into an HFViTError that names the cause and the way out."""
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
            429: "the Hub asks for fewer requests: try again later",
        }
        detail = f"the Hub answered {status} for {repo_id}: {' '.join(str(error.server_message or error).split())}"
        raise HFViTError(causes.get(status, detail).replace(token, "***")) from None
    except (TRANSPORT_ERROR, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()).replace(token, "***")
        raise HFViTError(
            f"cannot upload to {constants.ENDPOINT} ({reason}): check the network, then push again"
        ) from None
