"""A folder pushed to a local Hub loads from there in a process that cannot import hf_vit; errors are one line.

python -m pytest tests/hf_vit/hub/test_upload.py
"""

import json
import os
import shutil
import textwrap
import threading
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from transformers import ViTImageProcessor

from hf_vit import HFViTBackbone, HFViTError, HFViTForImageClassification
from hf_vit.hub import model_folder
from hf_vit.hub import upload as upload_module
from hf_vit.hub.model_folder import check_model_folder, files_to_upload
from hf_vit.hub.upload import TRANSPORT_ERROR, Upload, push_folder, push_space
from tests.helpers.compare import same_outputs
from tests.helpers.hub_process import BLOCK_HF_VIT, LABELS, READER, STRANGER, WRITER, run
from tests.helpers.hub_server import HubServer, Repository


@pytest.fixture(scope="module")
def hub():
    with HubServer(users={WRITER: "alice", READER: "alice"}, read_only=(READER,), reserved=("alice/taken",)) as server:
        bert = Repository(commits={"1" * 40: {"config.json": b'{"model_type": "bert"}'}}, refs={"main": "1" * 40})
        server.repositories |= {"alice/bert": bert, "alice/small": Repository(largest=100)}
        yield server


# name: (token, arguments of push_folder after the folder)
PUSHES = {
    "public": (WRITER, {"repo_id": "shapes"}),
    "branch": (WRITER, {"repo_id": "alice/hidden", "private": True, "revision": "trial"}),
    "pull request": (WRITER, {"repo_id": "alice/hidden", "create_pr": True}),
    "edited card": (WRITER, {"repo_id": "alice/edited"}),
    "no token": (None, {"repo_id": "alice/x"}),
    "unknown token": (STRANGER, {"repo_id": "alice/x"}),
    "read-only token": (READER, {"repo_id": "alice/x"}),
    "not mine": (WRITER, {"repo_id": "bob/x"}),
    "no name": (WRITER, {"repo_id": "not a name"}),
    "a data set": (WRITER, {"repo_id": "datasets/alice/x"}),
    "another model": (WRITER, {"repo_id": "alice/bert"}),
    "too large": (WRITER, {"repo_id": "alice/small"}),
    "name taken": (WRITER, {"repo_id": "alice/taken"}),
    "no network": (WRITER, {"repo_id": "alice/x"}),
}


@pytest.fixture(scope="module")
def answers(hub, folder, tmp_path_factory):
    """What each of PUSHES returned or raised, all of them made by one process."""
    home = tmp_path_factory.mktemp("home")
    edited = home / "edited"
    shutil.copytree(folder, edited)
    with (edited / "README.md").open("a") as card:
        card.write("\nA sentence of mine.\n")
    code = """
    import json, sys, time
    time.sleep = lambda seconds: None
    from huggingface_hub import constants
    from hf_vit.hub.upload import push_folder
    answers = {}
    for name, (token, arguments) in json.loads(sys.argv[1]).items():
        if name == "no network":
            constants.ENDPOINT = "http://127.0.0.1:9"
        try:
            answers[name] = push_folder(sys.argv[3 if name == "edited card" else 2], token=token, **arguments)
        except ValueError as error:
            answers[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(answers))
    """
    return run(hub, home, code, json.dumps(PUSHES), folder, edited)


def test_pushed_model_loads_where_hf_vit_cannot_be_imported(hub, folder, answers, tmp_path):
    assert answers["public"] == f"{hub.endpoint}/alice/shapes"
    _, files = hub.repositories["alice/shapes"].files("main")
    wanted = "model.safetensors config.json modeling_hf_vit.py preprocessor_config.json README.md facts.json"
    assert {*wanted.split(), "training_curve.png"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint", "optimizer"))]
    assert 'model="alice/shapes"' in files["README.md"].decode()
    assert len(hub.repositories["alice/shapes"].commits) == 2  # the empty one, and one with everything

    code = BLOCK_HF_VIT + textwrap.dedent("""
    import json, torch
    from PIL import Image
    from transformers import (
        AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
    )
    def logits_of(name, revision="main"):
        model = AutoModelForImageClassification.from_pretrained(name, revision=revision, trust_remote_code=True)
        return model(**pixels).logits.tolist()
    name = "alice/shapes"
    image = Image.new("RGB", (20, 30), (200, 30, 90))
    processor = AutoImageProcessor.from_pretrained(name)
    pixels = processor(image, return_tensors="pt")
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
    features = AutoModel.from_pretrained(name, trust_remote_code=True)(**pixels).pooler_output
    maps = AutoBackbone.from_pretrained(name, trust_remote_code=True)(**pixels).feature_maps
    classify = pipeline("image-classification", model=name, trust_remote_code=True)
    found = {
        "type": AutoConfig.from_pretrained(name, trust_remote_code=True).model_type,
        "logits": logits_of(name),
        "from features": model.classifier(features).tolist(),
        "maps": maps[-1].tolist(),
        "branch": logits_of("alice/hidden", "trial"),
        "pull request": logits_of("alice/hidden", "refs/pr/1"),
        "scores": classify(image, function_to_apply="none"),
    }
    model.push_to_hub("alice/again")
    processor.push_to_hub("alice/again")
    found["pushed again"] = logits_of("alice/again")
    print(json.dumps(found))
    """)
    found = run(hub, tmp_path, code, token=WRITER)
    pixels = ViTImageProcessor.from_pretrained(folder)(Image.new("RGB", (20, 30), (200, 30, 90)), return_tensors="pt")
    with torch.no_grad():
        model = HFViTForImageClassification.from_pretrained(folder).eval()
        expected, maps = model(**pixels).logits, HFViTBackbone.from_pretrained(folder)(**pixels).feature_maps
    assert found["type"] == "hf_vit" and same_outputs(found["maps"], maps[-1])
    for name in ("logits", "from features", "pushed again", "branch", "pull request"):
        assert same_outputs(found[name], expected), name
    scores = {row["label"]: row["score"] for row in found["scores"]}
    assert same_outputs([[scores[LABELS[number]] for number in range(len(scores))]], expected)
    _, again = hub.repositories["alice/again"].files("main")
    assert {name for name in files if name.endswith(".py")} <= set(again)


def test_private_and_gated_repositories_without_a_token_are_one_clear_line(hub, answers, tmp_path):
    hub.repositories["alice/gated"] = Repository(gated=True, **vars_of(hub.repositories["alice/shapes"]))
    code = """
    import contextlib, io, json
    from hf_vit.cli.main import main
    said = {}
    for name in ("alice/gated", "alice/hidden", "alice/nothing"):
        with contextlib.redirect_stderr(io.StringIO()) as caught:
            status = main(["info", name])
        said[name] = [status, caught.getvalue()]
    print(json.dumps(said))
    """
    said = run(hub, tmp_path, code)
    for name, words in (("alice/gated", "gated"), ("alice/hidden", "token"), ("alice/nothing", "token")):
        status, line = said[name]
        assert status == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        assert name in line and words in line, line


def vars_of(repository):
    return {"commits": repository.commits, "refs": repository.refs}


def test_branch_pull_request_and_private(hub, answers):
    repository = hub.repositories["alice/hidden"]
    assert repository.private
    assert not repository.files("main")[1] and "model.safetensors" in repository.files("trial")[1]
    assert answers["pull request"] == f"{hub.endpoint}/alice/hidden/discussions/1"
    assert "model.safetensors" in repository.files("refs/pr/1")[1]


def test_the_command_pushes_to_branches_and_pull_requests(hub, folder, tmp_path):
    code = """
    import contextlib, io, json, sys
    from pathlib import Path
    from hf_vit.cli.main import main
    folder, said = sys.argv[1], []
    def push(*options):
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
            said.append([main(["push", folder, *options]), out.getvalue() + err.getvalue()])
    push("commanded", "--private", "--json")
    push("alice/commanded", "--revision", "trial")
    push("alice/commanded", "--create-pr")
    Path(folder, "history.jsonl").write_text("{}")
    push("alice/commanded", "--create-pr")
    push("alice/commanded", "--space", "--create-pr")
    print(json.dumps(said))
    """
    said = run(hub, tmp_path, code, shutil.copytree(folder, tmp_path / "shapes"), token=WRITER)
    assert [status for status, _ in said] == [0, 0, 2, 0, 2]
    assert json.loads(said[0][1])["url"] == said[1][1].strip() == f"{hub.endpoint}/alice/commanded"
    assert "nothing to propose" in said[2][1] and "a Space is uploaded to its main branch" in said[4][1]
    assert said[3][1].strip() == f"{hub.endpoint}/alice/commanded/discussions/1"
    repository = hub.repositories["alice/commanded"]
    assert repository.private and set(repository.refs) == {"main", "trial", "refs/pr/1"}
    for revision in repository.refs:
        assert {"model.safetensors", "README.md", "facts.json"} <= set(repository.files(revision)[1])
    assert "spaces/alice/commanded" not in hub.repositories


def test_a_card_written_by_hand_is_kept(hub, answers):
    card = hub.repositories["alice/edited"].files("main")[1]["README.md"].decode()
    assert card.endswith("A sentence of mine.\n") and 'model="alice/edited"' not in card


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no token", "no Hugging Face token"),
        ("unknown token", "does not accept this token"),
        ("read-only token", "may not write to alice/x"),
        ("not mine", "may not write to bob/x"),
        ("no name", "'not a name' is not the name of a repository"),
        ("a data set", "'datasets/alice/x' is not the name of a model repository"),
        ("another model", "alice/bert holds a model of type 'bert', this one is 'hf_vit'"),
        ("name taken", "the name alice/taken is taken: choose another"),
        ("too large", "refuses the upload to alice/small: LFS"),
        ("no network", "cannot upload to http://127.0.0.1:9"),
    ],
)
def test_refusals_are_one_line(hub, answers, case, said):
    assert answers[case].startswith("HFViTError: ") and said in answers[case]
    assert len(answers[case].splitlines()) == 1
    assert "alice/x" not in hub.repositories and "bob/x" not in hub.repositories
    assert len(hub.repositories["alice/bert"].commits) == len(hub.repositories["alice/small"].commits) == 1


def test_incomplete_folders_are_named_before_anything_is_sent(hub, folder, tmp_path):
    before = len(hub.requests)
    with pytest.raises(HFViTError, match="no folder"):
        push_folder(tmp_path / "nowhere", "alice/x", token=WRITER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HFViTError, match=r"no config\.json"):
        push_folder(tmp_path / "empty", "alice/x", token=WRITER)
    for name in ("model.safetensors", "resnet_stem.py", "preprocessor_config.json"):
        copy = tmp_path / f"without-{name}"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        with pytest.raises(HFViTError, match=f"lacks {name}"):
            check_model_folder(copy)
    pieces = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    copy = shutil.copytree(folder, tmp_path / "in-pieces")
    (copy / "model.safetensors").rename(copy / pieces["a"])
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": pieces}))
    with pytest.raises(HFViTError, match=f"lacks {pieces['b']}"):
        check_model_folder(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(HFViTError, match="names no weights"):
        check_model_folder(copy)
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("facts.json", "[" * 100_000, "not readable as JSON"),
        ("facts.json", '["model"]', "must hold a JSON object"),
        ("facts.json", {"model": {"architecture": "x"}}, "model.architecture"),
        ("facts.json", {"model": {"image_size": ["a", 1]}}, "holds what training does not write"),
        ("config.json", "[" * 100_000, "not readable as JSON"),
        ("config.json", {"auto_map": ["a.B"]}, "auto_map"),
        ("config.json", {"auto_map": {"AutoConfig": ["a.B", None]}}, "auto_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "names no weights of this folder"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../other/model.safetensors"}}, "names no weights of"),
        ("modeling_hf_vit.py", b"# caf\xe9", "modeling_hf_vit.py is not Python"),
    ],
)
def test_files_of_another_shape_are_one_line_that_names_them(name, content, said, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "shapes")
    monkeypatch.setattr(upload_module, "Upload", lambda *_, **__: SimpleNamespace(
        make=lambda private: None, check_same_kind=lambda *_: None, repo_id="alice/x"
    ))  # fmt: skip
    if isinstance(content, dict):
        stored = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        if "model" in content:
            content = {"model": stored["model"] | content["model"]}
        content = json.dumps(stored | content)
    (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HFViTError, match=said) as error:
        push_folder(copy, "alice/x", token=WRITER)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_token_inside_the_folder_stops_the_upload(folder, tmp_path):
    copy = tmp_path / "leaky"
    shutil.copytree(folder, copy)
    (copy / "history.jsonl").write_text(json.dumps({"hub_token": WRITER}))
    assert "history.jsonl" in files_to_upload(copy)
    with pytest.raises(HFViTError, match="contains your access token") as caught:
        push_folder(copy, "alice/x", token=WRITER)
    assert WRITER not in str(caught.value)
    with pytest.raises(HFViTError, match=r"history\.jsonl contains your access token"):
        push_space(copy, "alice/x", token=WRITER)


def test_what_belongs_to_the_model_goes_and_nothing_else(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "shapes")
    (copy / ".eval_results").mkdir()
    (copy / "mine.png").write_bytes(b"of a card written by hand")
    for name in (
        ".eval_results/owner--data.yaml",
        "history.jsonl",
        "train.log",
        "config_resolved.yaml",
        ".facts.json",
    ):
        (copy / name).write_text("{}")
    code = {path.name for path in folder.glob("*.py")}
    assert len(code) == 5 and set(files_to_upload(copy)) == code | {
        "README.md", "config.json", "facts.json", "history.jsonl", "model.safetensors", "preprocessor_config.json",
        "training_curve.png", "mine.png", ".eval_results/owner--data.yaml",
    }  # fmt: skip


def answered(status):
    """What huggingface_hub raises when the Hub answers so."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status}\nfor {WRITER}", response=response, server_message=f"no:\n{WRITER}")


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        *((answered(status), 5) for status in (408, 429, 500, 502, 503, 504)),
        *((answered(status), 1) for status in (400, 401, 403, 404, 409, 413)),
        (TRANSPORT_ERROR(f"cut\n{WRITER}"), 5),
        (ConnectionError(f"cut {WRITER}"), 5),
        (RuntimeError(f"Error while uploading {WRITER}"), 5),
        (OSError(f"disk\n{WRITER}"), 1),
        (ValueError(f"metadata\n{WRITER}"), 1),
    ],
    ids=lambda value: " ".join(str(value).split()[:1]) if isinstance(value, Exception) else str(value),
)
def test_what_may_pass_is_tried_again_and_no_error_holds_the_token(error, tries, monkeypatch):
    upload, made = Upload("alice/x", WRITER, attempts=5), []

    def fail(*_, **__):
        made.append(error)
        raise error

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(upload.api, "create_commit", fail)
    for create_pr in (False, True):
        made.clear()
        with pytest.raises(HFViTError) as caught:
            upload.commit({}, "message", create_pr=create_pr)
        assert WRITER not in str(caught.value) and len(str(caught.value).splitlines()) == 1
        assert len(made) == (1 if create_pr else tries)  # a second try could open a second pull request


def named_figures(folder, names):
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"figures": names}))


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.png", "a/../../secret.png", "id_rsa", "..\\secret.png", 7]
)
def test_facts_cannot_make_an_upload_of_other_files(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "shapes")
    (tmp_path / "secret.png").write_bytes(b"mine")
    (copy / "id_rsa").write_bytes(b"mine")
    named_figures(copy, [name])
    with pytest.raises(HFViTError, match="names the figure") as caught:
        push_folder(copy, "alice/x", token=WRITER)
    assert str(name) in str(caught.value)


@pytest.mark.parametrize("name", ["secret.png", "secret.json", ".eval_results", "fifo.png"])
def test_links_and_special_files_are_refused_by_name(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "shapes")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "results.yaml").write_text("mine")
    if name == "fifo.png":
        os.mkfifo(copy / name)
    else:
        (copy / name).symlink_to(outside if name == ".eval_results" else outside / "results.yaml")
    with pytest.raises(HFViTError, match=f"{name}.* is (a link|not a regular file)"):
        push_folder(copy, "alice/x", token=WRITER)
    with pytest.raises(HFViTError, match=f"{name}.* is (a link|not a regular file)"):
        push_space(copy, "alice/x", token=WRITER)


def test_a_checkpoint_folder_cannot_link_elsewhere(hub, folder, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "optimizer.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(HFViTError, match=r"optimizer\.safetensors is a link"):
        push_folder(folder, "alice/x", token=WRITER, checkpoint=tmp_path / "checkpoint")


def test_the_token_is_found_in_any_file_and_between_two_blocks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "SCANNED_BYTES", 7)
    copy = shutil.copytree(folder, tmp_path / "shapes")
    (copy / "mine.png").write_bytes(b"\x89PNG....." + WRITER.encode() + b"\x00")
    with pytest.raises(HFViTError, match=r"mine\.png contains your access token"):
        push_folder(copy, "alice/x", token=WRITER)


def test_a_commit_without_an_answer_ends(monkeypatch):
    monkeypatch.setattr(upload_module, "MAX_SILENCE_SECONDS", 0.2)
    upload, asked = Upload("alice/x", WRITER, attempts=5), threading.Event()
    monkeypatch.setattr(upload.api, "create_commit", lambda *_, **__: asked.wait(30))
    with pytest.raises(HFViTError, match=r"has not answered for 0 s: look at alice/x"):
        upload.commit({}, "message")
    asked.set()


def test_tries_end_after_some_time_and_are_said_in_one_line_each(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 50))
    monkeypatch.setattr(upload_module.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    upload = Upload("alice/x", WRITER, attempts=50)

    def fail(*_, **__):
        raise answered(503)

    monkeypatch.setattr(upload.api, "create_commit", fail)
    with pytest.raises(HFViTError, match="answered 503"):
        upload.commit({}, "message")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"alice/x: the Hub answered 503; trying again in {wait} s ({wait + 1} of 50)" for wait in (1, 2)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answered(409), "was changed by somebody else meanwhile: push again"),
        (KeyError("commitUrl"), "answer for alice/x is incomplete"),
        (json.JSONDecodeError("cut", "{", 1), "answer for alice/x was cut off"),
    ],
    ids=["conflict", "empty answer", "cut answer"],
)
def test_what_fails_at_the_commit_is_not_told_as_a_taken_name(error, said, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    upload = Upload("alice/x", WRITER, attempts=2)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(upload.api, "create_commit", fail)
    with pytest.raises(HFViTError, match=said):
        upload.commit({}, "message")
