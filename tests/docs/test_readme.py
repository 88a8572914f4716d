"""README and docs do what they say: their Python runs, their commands and options exist, their links lead somewhere.

python -m pytest tests/docs/test_readme.py
"""

import argparse
import importlib
import json
import re
import shlex
import shutil
import statistics
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

import hf_vit
from benchmarks import cifar10_baselines, mislabelled
from benchmarks import run as benchmark
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.main import COMMANDS, build_parser
from tests.conftest import ROOT
from training import quickstart, score, study
from training.config.arguments import FIELDS
from training.config.parser import parse
from training.data.shards import shard_command
from training.data.synthetic import export


SUBJECTS = (
    *("finetuning", "checkpoints", "pretraining", "synthetic-data", "evaluation", "interpretability", "inference"),
    *("export-and-demo", "studies", "platforms", "architecture", "troubleshooting"),
)
NAMES = ["README.md", *(f"docs/{subject}.md" for subject in SUBJECTS), "CONTRIBUTING.md"]
NAMES += ["training/launch/README.md", "model_cards/README.md", "benchmarks/studies/README.md"]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}


def blocks(language):
    """Every fenced block of this language, in the order of the pages."""
    return [block for page in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


def prose():
    """All pages without their fenced blocks."""
    return "\n".join(re.sub(r"```.*?```", "", page, flags=re.DOTALL) for page in PAGES.values())


def commands():
    """Every command line of the pages once: fenced, indented, and in backticks within a sentence."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines += [line.split("#")[0].strip() for line in prose().splitlines() if line.startswith("    ")]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose())]
    starts = ("accelerate launch -m", "hf-vit ", "make ", "pip ", "python -m", "torchrun -m")
    return list(dict.fromkeys(line for line in lines if line.startswith(starts)))


@pytest.fixture
def workplace(tmp_path, monkeypatch, goldens):
    """A folder with the files that the README's commands and code name."""
    torch.manual_seed(0)
    config = HFViTConfig(
        image_size=24, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=10,
    )  # fmt: skip
    HFViTForImageClassification(config).save_pretrained(tmp_path / "quickstart" / "digits")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "quickstart" / "digits")
    shutil.copy(goldens / "vt_token.npz", tmp_path / "ViT-B_16.npz")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.jpg")
    shutil.copytree(ROOT / "training" / "metrics", tmp_path / "training" / "metrics")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config_resolved.yaml").write_text("max_steps: 5\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_in_order(workplace):
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md and docs", "exec"), names)
    assert names["model"].config.image_size == (32, 48) and names["model"].config.num_labels == 37
    assert names["larger"].config.image_size == (48, 64) and names["larger"].config.num_labels == 37
    assert names["maps"][-1].shape[:2] == (1, 2)
    assert names["trainer"].state.global_step == 5
    assert names["hybrid"].config.resnet_depths == ()


def test_what_to_write_now_runs(workplace):
    rows = re.findall(r"^\| (\w+) \| .* \| `([^`]+)` \|$", PAGES["docs/checkpoints.md"], re.MULTILINE)
    assert {"timm", "transformers", "vision_transformer"} == {source for source, _ in rows}
    model = HFViTForImageClassification.from_pretrained("quickstart/digits")
    hf_vit.save_checkpoint(model, "model.safetensors", format="timm")
    hf_vit.save_checkpoint(model, "vit", format="transformers")
    names = {name: getattr(hf_vit, name) for name in hf_vit.__all__}
    names["pixels"] = torch.zeros(1, 3, 24, 24)
    for _, code in rows:
        if not code.startswith("python -m"):  # a command, which test_command_is_accepted looks at
            exec(code, names)
    assert (workplace / "out-vit" / "model.safetensors").is_file() and (workplace / "out.npz").is_file()


def test_what_was_written_for_transformers_gives_the_same(workplace):
    rows = re.findall(r"^\| transformers \| `([^`]+)`.*\| `([^`]+)` \|$", PAGES["docs/checkpoints.md"], re.MULTILINE)
    ours = HFViTForImageClassification.from_pretrained("quickstart/digits").eval()
    hf_vit.save_checkpoint(ours, "vit", format="transformers")
    theirs = ViTForImageClassification.from_pretrained("vit", attn_implementation="eager").eval()
    pixels, compared = torch.randn(2, 3, 24, 24), 0
    for before, now in rows:
        names = {"ViTForImageClassification": ViTForImageClassification, "pixels": pixels}
        answer = eval(before, names | {"model": theirs})
        if isinstance(answer, torch.Tensor):
            torch.testing.assert_close(eval(now, names | {"model": ours}), answer, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared == 2 and len(rows) == 4


def test_there_are_commands_of_every_kind():
    kinds = {" ".join(line.split()[:1]) for line in commands()}
    assert {"python", "hf-vit", "make", "pip"} <= kinds and len(commands()) > 12


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_command_is_accepted(line, workplace):
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    if words[0] == "hf-vit" and len(words) == 2:  # the name of a command, in a sentence
        assert words[1] in COMMANDS
    elif words[0] == "hf-vit":
        build_parser().parse_args(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        for word in words[2:]:
            name, _, value = word.partition("=")
            assert name in ("ARGS", "PROCESSES", "PYTHON", "VENV")
            if name == "ARGS":
                module = {"quickstart": quickstart, "bench": benchmark, "bench-cifar10": cifar10_baselines}[words[1]]
                module.build_parser().parse_args(shlex.split(value))
    elif words[:2] == ["pip", "uninstall"]:
        assert words[2:] == ["torchvision"]
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[([\w,-]+)\]", line)
        for extra in extras[1].split(",") if extras else []:
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), extra
        assert "constraints.txt" not in line or (ROOT / "constraints.txt").is_file()
    else:
        module = words[words.index("-m") + 1].removeprefix("hf_vit.")
        package, script = module.split(".")
        assert (ROOT / package / f"{script}.py").is_file()
        parsers = {
            "score": score.parse_score,
            "study": study.build_parser().parse_args,
            "synthetic": export.parse_export,
            "shards": shard_command.parse_command,
            "mislabelled": mislabelled.build_parser().parse_args,
        }
        parsers.get(script, partial(parse, stage=script))(words[words.index("-m") + 2 :])


def test_options_named_in_sentences_exist():
    own = {"--help", "--config", "--variant", "--multi_gpu", "--seeds"}  # argparse's, accelerate's, the quickstart's
    modules = [importlib.import_module(f"hf_vit.{module}") for module, _ in COMMANDS.values()]
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for module in modules:
        module.add_arguments(parser)
    known = own | {f"--{name}" for name in FIELDS}
    known |= {name for each in (parser, score.build_parser()) for name in each._option_string_actions}
    for name in re.findall(r"`(--[\w-]+)[^`]*`", prose()):
        assert name in known, name


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", page):
            if target.startswith("https://"):
                continue
            file, _, anchor = "".join(target.split()).partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{name}: {target}"


def anchors(page):
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_figures_have_a_background_of_their_own():
    """Dark letters on a transparent background cannot be read on a dark page."""
    figures = {
        (ROOT / name).parent / target
        for name, page in PAGES.items()
        for target in re.findall(r"!\[.*?\]\((.*?)\)", page)
    }
    assert len(figures) == 6
    for path in figures:
        if path.suffix == ".svg":
            first = re.search(r'<path d="M 0 [^"]*"\s+style="([^"]*)"', path.read_text(encoding="utf-8"))
            assert first and first[1] == "fill: #ffffff", path
        else:
            assert Image.open(path).convert("RGBA").getchannel("A").getextrema() == (255, 255), path


@pytest.mark.parametrize(
    ("title", "processor", "instructions"),
    [
        ("Intel Xeon with AMX", "Intel(R) Xeon(R) Processor", "AMX"),
        ("AMD EPYC, Zen 5 (AVX-512)", "AMD EPYC (family 26, model 2)", "AVX-512"),
        ("Zen 5, limited to AVX2", "AMD EPYC (family 26, model 2)", "AVX2"),
        ("AMD EPYC, Zen 4 (AVX-512)", "AMD EPYC (family 25, model 17)", "AVX-512"),
        ("Zen 4, limited to AVX2", "AMD EPYC (family 25, model 17)", "AVX2"),
        ("AMD EPYC, Zen 3 (AVX2)", "AMD EPYC (family 25, model 1)", "AVX2"),
    ],
)
def test_the_tables_of_inference_are_what_was_measured(title, processor, instructions):
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu-inference.json").read_text(encoding="utf-8"))
    points = [
        point
        for point in results
        if point["environment"]["hardware"] == processor and point["environment"]["instructions"] == instructions
    ]
    assert points
    lines = PAGES["docs/inference.md"].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} |"))
    columns = {"optimized": "hf_vit, optimized", "int8": "hf_vit, int8", "transformers": "transformers ViT"}
    names = [columns.get(word.strip(), word.strip()) for word in lines[first].split("|")[2:-1]]
    shown = {}
    for line in lines[first + 2 : first + 2 + len(points)]:
        title, *words = [word.strip() for word in line.split("|")[1:-1]]
        shown[title] = {name: float(word) for name, word in zip(names, words, strict=True) if word}
    measured = {}
    for point in points:
        precision, _, batch = point["title"].removeprefix("inference ").split(", ")
        median = {name: 1e3 * statistics.median(times) / point["images"] for name, times in point["seconds"].items()}
        measured[f"{precision}, {batch}"] = {name: round(median[name], 1) for name in names if name in median}
    assert shown == measured
