"""Every shell command of README and docs runs, in their order, with small models and images and a local Hub.

Training is cut to two small steps, presets to a small network, generated data sets to 120 images, the curves of
`hf-vit inspect` to one step, the page of `hf-vit demo` is built and not served, and an address gives an image of the
folder; everything else is as written. `python -m NAME` and `accelerate launch -m NAME` run NAME's `main` in this
process.

python -m pytest tests/docs/test_readme_commands.py
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_vit import HFViTConfig, HFViTForImageClassification, save_checkpoint
from tests.conftest import ROOT
from tests.docs.test_readme import PAGES, blocks, commands, prose
from tests.helpers.hub_server import HubServer


TOKEN = "hf_reader_of_the_readme"
CLASSES = [f"class {number}" for number in range(10)]
FILES = list(enumerate((name, copy) for name in CLASSES for copy in range(3)))
RUN = r"""
import importlib, json, re, shlex, shutil, sys
from hf_vit.cli import inputs
from hf_vit.cli.main import main as hf_vit

SHORT = "--max_steps 2 --warmup_steps 1 --per_device_train_batch_size 4 --global_batch_size 4"
SMALL = "--set hidden_size=32 num_hidden_layers=6 num_attention_heads=2 intermediate_size=32"
SHORT += " --per_device_eval_batch_size 64 --dataloader_num_workers 0 --eval_steps 2 --save_steps 1 --logging_steps 1"
inputs.download = lambda address: open("cat.jpg", "rb").read()

def run(line):
    line = line.replace("--model PATH_OR_HUB_ID", "--model stand-in")
    line = line.replace("--dataset PATH_OR_HUB_ID", "--dataset images").replace("--workers 16", "--workers 1")
    line = re.sub(r"(synthetic:\S+@)\d+,\d+(,224)?", r"\g<1>12,10", line)
    words = shlex.split(line)
    if words[0] == "hf-vit":
        return hf_vit(words[1:] + ["--steps", "1"] * (words[1] == "inspect"))
    words = ["python", *words[2:]] if words[:2] == ["accelerate", "launch"] else words
    assert words[:2] == ["python", "-m"], line
    if words[2] in ("training.finetune", "training.pretrain"):
        if "--resume_from_checkpoint" in words:
            shutil.rmtree("out/checkpoint-2")  # something is left to do
        else:
            shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
            words += SHORT.split() + (SMALL.split() if "--preset" in words else [])
    return importlib.import_module(words[2]).main(words[3:])

try:
    import gradio
    gradio.Blocks.launch = lambda page, **options: print("a page of", len(page.blocks), "parts")
except ImportError:
    gradio = None
for line in json.loads(sys.argv[1]):
    if line.startswith("hf-vit demo") and gradio is None:
        continue
    print("==", line, file=sys.stderr, flush=True)
    status = run(line)
    assert not isinstance(status, int) or status == 0, line
"""


# Commands that do not run here, by their beginning: the reason, and where else they run.
NOT_RUN = {
    "make ": "builds environments, or is the tests themselves; test_command_is_accepted looks for the target",
    "pip ": "needs a network; test_command_is_accepted looks for the extras",
    "source ": "a word of the shell, for people",
    "hf auth login": "huggingface_hub's own, asks for a token",
    "sbatch ": "needs Slurm; tests/training/test_launch.py runs slurm.sh with a stand-in for it",
    "accelerate launch --config_file ": "needs several devices; tests/training/test_launch.py parses these commands",
    "hf-vit card model_cards/": "of a card to add; tests/hf_vit/hub/test_model_cards.py renders those that are there",
    "torchrun ": "needs eight GPUs; tests/training/engine/test_distributed.py has several processes",
    "python -m training.study ": "minutes to hours; tests/training/test_study.py runs studies at the scale smoke",
    "python -m benchmarks.mislabelled": "needs CIFAR-10; tests/benchmarks/test_mislabelled.py runs it on few images",
    "python assets/draw_inspection.py": "trains for a minute; test_draw_inspection.py trains smaller ones",
}
PROGRAMS = ("accelerate", "hf", "hf-vit", "make", "pip", "python", "sbatch", "source", "torchrun")
PLACEHOLDER = re.compile(r"\.\.\.|\bMODEL\b")  # a command in a sentence that is not written out


def fenced():
    """The command lines of the shell blocks."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line]


def lines():
    """The command lines that run, each once: those of the shell blocks, then those within sentences."""
    whole = [" ".join(line.split()) for line in commands()]
    whole = [line for line in whole if len(line.split()) > 2 and not PLACEHOLDER.search(line)]
    return list(dict.fromkeys(line for line in fenced() + whole if not line.startswith(tuple(NOT_RUN))))


def test_every_command_runs_or_has_a_reason():
    said = fenced() + [line.split("#")[0].strip() for line in prose().splitlines() if line.startswith("    ")]
    said += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose())]
    said = [line for line in said if line.startswith(tuple(f"{program} " for program in PROGRAMS))]
    run = set(lines())
    for line in said:
        named = len(line.split()) == 2 and line.startswith(("hf-vit ", "accelerate "))  # only its name, in a sentence
        assert line in run or named or PLACEHOLDER.search(line) or line.startswith(tuple(NOT_RUN)), line
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in said), f"{beginning}: no page has it any more"


def test_every_block_is_python_shell_or_a_tree():
    """The trees of README and architecture name folders and modules that exist."""
    trees = {}
    for name, page in PAGES.items():
        for language, block in re.findall(r"^ *```([^\n]*)\n(.*?)```", page, re.DOTALL | re.MULTILINE):
            assert language in ("python", "bash", ""), f"{name}: ```{language}"
            if not language:
                trees[name] = block
    assert set(trees) == {"README.md", "docs/architecture.md"}
    top = ""
    for line in trees["README.md"].splitlines():
        names = re.match(r" *((?:\w+/ +)+)", line)[1].split()
        top = top if line.startswith(" ") else names[0]
        for name in names:
            assert (ROOT / (top + name if line.startswith(" ") else name)).is_dir(), line
    modules = re.findall(r"^(?:\w+/\w+ +)+", trees["docs/architecture.md"], re.MULTILINE)
    assert len(modules) > 15
    for name in " ".join(modules).split():
        assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file(), name


def saved(folder, **fields):
    """A tiny classifier whose answers depend on the image."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = HFViTForImageClassification(HFViTConfig(**size | fields))
    torch.nn.init.normal_(model.classifier.weight)
    if folder is not None:
        model.save_pretrained(folder)
        height, width = model.config.image_size_hw
        ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    return model


def draw(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 36)).save(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands name."""
    saved(tmp_path / "quickstart" / "digits", image_size=16, patch_size=4, num_labels=10)
    names = dict(enumerate(CLASSES))
    saved(tmp_path / "stand-in", image_size=64, patch_size=32, id2label=names)
    save_checkpoint(
        saved(None, image_size=64, patch_size=32, num_hidden_layers=6), tmp_path / "ViT-B_16.npz", format="google-npz"
    )
    for number, name in enumerate(CLASSES, start=1):
        draw(tmp_path / "imagenet" / "validation" / name / f"ILSVRC2012_val_{number:08d}.png", number)
        for split in ("train", "validation"):
            for copy in range(3):
                draw(tmp_path / "images" / split / name / f"{copy}.jpg", 100 * number + copy)
                draw(tmp_path / "copies" / "cifar10" / split / name / f"{copy}.png", 500 * number + copy)
    draw(tmp_path / "images" / "new" / "one.jpg", 7)
    (tmp_path / "real.json").write_text(json.dumps([[place] for place in range(10)]))
    draw(tmp_path / "more" / "some.png", 1)
    draw(tmp_path / "cat.jpg", 2)
    rows = [f"train/{name}/{copy}.jpg,{name}" for name in CLASSES for copy in range(3)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *rows]) + "\n")
    tagged = [f"images/train/{name}/{copy}.jpg,{'|'.join(CLASSES[: number % 3])}" for number, (name, copy) in FILES]
    (tmp_path / "tags.csv").write_text("\n".join(["file,tags", *tagged]) + "\n")
    measured = [f"images/train/{name}/{copy}.jpg,{number},{number / 7}" for number, (name, copy) in FILES]
    (tmp_path / "measured.csv").write_text("\n".join(["file,height,weight", *measured]) + "\n")
    (tmp_path / "cifar10").symlink_to(tmp_path / "copies" / "cifar10")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "images").symlink_to(tmp_path / "images")
    small = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(small).save_pretrained(tmp_path / "facebook" / "dinov2-base")
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetForImageClassification(resnet).save_pretrained(tmp_path / "microsoft" / "resnet-50")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(place):
    said = lines()
    assert len(said) > 20
    with HubServer(users={TOKEN: "owner"}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(said)],
            env=hub.environment(home=place / "home", token=TOKEN) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=3000,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.repositories
    assert TOKEN not in done.stdout + done.stderr
    assert pushed["owner/name"].private and "model.safetensors" in pushed["owner/name"].files("main")[1]
    assert "app.py" in pushed["spaces/owner/name-demo"].files("main")[1]
    written = "exported/model.int8.onnx exported-torch/model.pt2 vit-b16.npz seen/report.html scores/facts.json paper"
    written += " scores.csv table-scores.csv sorted features.npz sheet.png"
    trained = "out out-probe out-small out-tags out-measured out-folds out-448 out-resnet"
    trained += " pretrained letters letters-32 masked streamed"
    for name in [*written.split(), *(f"{folder}/model.safetensors" for folder in trained.split())]:
        assert (place / name).exists(), name
