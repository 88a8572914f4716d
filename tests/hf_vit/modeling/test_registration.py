"""registration.py: `import hf_vit` imports next to nothing, and the Auto classes know our classes all the same.

python -m pytest tests/hf_vit/modeling/test_registration.py
"""

import os
import subprocess
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
from transformers import MODEL_MAPPING

import hf_vit
from hf_vit import HFViTConfig, registration
from tests.conftest import ROOT
from tests.hf_vit.modeling.test_modeling import build


ORDERS = {
    "classes_of_transformers_first": """
        import transformers, hf_vit
        assert "torch" not in sys.modules
        from transformers import ViTForImageClassification
        from transformers import AutoConfig, AutoModelForImageClassification
        class Theirs(transformers.PreTrainedConfig):
            model_type = "theirs"
        AutoConfig.register("theirs", Theirs)
        assert AutoConfig.for_model("vit").hidden_size == 768 and type(AutoConfig.for_model("theirs")) is Theirs
        assert "hf_vit.modeling.modeling_hf_vit" not in sys.modules
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert type(AutoConfig.for_model("theirs")) is Theirs
    """,
    "auto_classes_first": """
        from transformers import AutoModelForImageClassification
        import hf_vit
        model = AutoModelForImageClassification.from_pretrained(folder)
    """,
    "configuration_alone": """
        from hf_vit.modeling.configuration_hf_vit import HFViTConfig
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_config(HFViTConfig.from_pretrained(folder))
    """,
    "threads": """
        import hf_vit
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier
        from transformers import AutoConfig, AutoModelForImageClassification
        ready = Barrier(4)
        def load(number):
            ready.wait()
            return (AutoConfig if number % 2 else AutoModelForImageClassification).from_pretrained(folder)
        with ThreadPoolExecutor(4) as threads:
            model, *_ = threads.map(load, range(4))
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("registration") / "tiny"
    build().save_pretrained(path)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_an_auto_class_finds_ours_in_any_order_of_imports(order, folder):
    lines = ["import sys", "folder = sys.argv[1]", *(line.removeprefix(" " * 8) for line in ORDERS[order].split("\n"))]
    lines += ["print(type(model).__module__, type(model).__name__)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hf_vit.modeling.modeling_hf_vit HFViTForImageClassification\n"


def test_every_table_that_is_written_into_is_watched():
    assert HFViTConfig in MODEL_MAPPING  # registered by now
    for module, names in registration.TABLES.items():
        tables = {name: getattr(value, "_extra_content", ()) for name, value in vars(sys.modules[module]).items()}
        assert {name for name, table in tables.items() if "hf_vit" in table or HFViTConfig in table} == set(names)


def test_public_names():
    assert {"__version__", *hf_vit.ROOMS} == set(hf_vit.__all__) <= set(dir(hf_vit))
    assert hf_vit.checkpoints.load_checkpoint is hf_vit.load_checkpoint
    with pytest.raises(AttributeError, match="'hf_vit' has no attribute 'HFVitModel'"):
        _ = hf_vit.HFVitModel


@pytest.fixture
def looks(monkeypatch):
    """One entry for each time that the classes would have been registered."""
    looks = []
    monkeypatch.setattr(registration, "register", lambda: looks.append("look"))
    return looks


@pytest.mark.parametrize(
    "look",
    [
        lambda entries: "hf_vit" in entries,
        lambda entries: HFViTConfig in entries,
        lambda entries: entries.__setitem__("hf_vit", int),
        list,
        len,
        dict,
        lambda entries: entries.keys(),
        lambda entries: entries.values(),
        lambda entries: entries.items(),
    ],
    ids=["type", "class", "in_our_place", "iter", "len", "copy", "keys", "values", "items"],
)
def test_a_look_that_could_find_ours_registers(look, looks):
    entries = registration.Entries()
    look(entries)
    assert looks


def test_a_look_for_theirs_does_not(looks):
    entries = registration.Entries()
    entries["vit"] = entries[int] = 1
    assert "vit" in entries and int in entries and "bert" not in entries and entries["vit"] == 1
    assert not looks


@pytest.mark.parametrize("mapping", [None, OrderedDict()], ids=["none", "other"])
def test_tables_of_another_kind_are_not_passed_over_in_silence(mapping):
    loader = SimpleNamespace(exec_module=lambda module: setattr(module, "IMAGE_PROCESSOR_MAPPING", mapping))
    module = SimpleNamespace(__name__="transformers.models.auto.image_processing_auto", __spec__=SimpleNamespace())
    with pytest.warns(UserWarning, match=r"another IMAGE_PROCESSOR_MAPPING than hf_vit knows.*import hf_vit\.auto"):
        registration.Replacing(loader).exec_module(module)
