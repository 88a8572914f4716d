"""Upload a metric to the Hub as a Space, for `evaluate.load("owner/real_accuracy")`.

python -m training.metrics.publish real_accuracy owner
"""

# Tests: tests/training/metrics/test_metrics.py

import ast
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token

from hf_vit.errors import HFViTError, Parser, report_error
from hf_vit.hub.upload import one_line_errors


HERE = Path(__file__).parent
METRIC_FOLDERS = sorted(path.parent.name for path in HERE.glob("*/*.py") if path.stem == path.parent.name)
APP = """import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load("{name}.py"))
"""
SPACE_REQUIREMENTS = "evaluate>=0.4.6\nnumpy\nscikit-learn\n"  # scipy comes with it


def space_files(name: str) -> dict[str, str]:
    """The text of each file of a metric's Space.

    Raises:
        HFViTError: no metric of that name.
    """
    if name not in METRIC_FOLDERS:
        raise HFViTError(f"no metric '{name}'; there are {', '.join(METRIC_FOLDERS)}")
    code = (HERE / name / f"{name}.py").read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(code)) or name
    metadata = {
        "title": name.replace("_", " "),
        "sdk": "gradio",
        "app_file": "app.py",
        "license": "apache-2.0",
        "tags": ["evaluate", "metric"],
        "description": about.splitlines()[0],
    }
    use = f'import evaluate\nmetric = evaluate.load("OWNER/{name}")\nhelp(metric)'
    card = f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {name}\n\n{about}\n\n```python\n{use}\n```\n"
    return {
        f"{name}.py": code,
        "README.md": card,
        "app.py": APP.format(name=name),
        "requirements.txt": SPACE_REQUIREMENTS,
    }


def publish(name: str, owner: str, private: bool = False) -> str:
    """Upload a metric to the Space `owner/name`, which is created if needed; returns its address.

    Raises:
        HFViTError: no such metric, no token, no permission, no network.
    """
    files = space_files(name)
    token = get_token()
    if not token:
        raise HFViTError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one with write permission")
    api, repo_id = HfApi(token=token), f"{owner}/{name}"
    operations = [CommitOperationAdd(path, text.replace("OWNER", owner).encode()) for path, text in files.items()]
    with one_line_errors(repo_id, token):
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message=f"Upload {name} with hf_vit", repo_type="space")
    return f"{api.endpoint}/spaces/{repo_id}"


def main(argv: list[str] | None = None) -> str:
    """Publish and print the address; bad input is one line on stderr and exit status 2."""
    parser = Parser(prog="python -m training.metrics.publish", description=__doc__)
    parser.add_argument("name", help=", ".join(METRIC_FOLDERS))
    parser.add_argument("owner", help="user or organization on the Hub")
    parser.add_argument("--private", action="store_true", help="visible only to you")
    try:
        args = parser.parse_args(argv)
        address = publish(args.name, args.owner, args.private)
    except (HFViTError, OSError) as error:
        raise SystemExit(report_error(error)) from None
    print(address)
    return address


if __name__ == "__main__":
    main()
