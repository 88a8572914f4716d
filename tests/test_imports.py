"""Imports go one way: what a layer may import is written here, and every file's imports are read.

python -m pytest tests/test_imports.py
"""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# A module may import what stands before it, and nothing after. Names in one row do not import one another.
ORDER = (
    ("hf_vit.errors", "hf_vit.capabilities", "hf_vit.download", "hf_vit.tiff_check"),
    (
        "hf_vit.atomic_file",
        "hf_vit.private_cache",
        "hf_vit.torchvision_match",
        "hf_vit.image_processing",
        "hf_vit.plot_text",
        "hf_vit.problem_type",
    ),
    ("hf_vit.kernel_table", "hf_vit.image_io", "hf_vit.html_page"),
    ("hf_vit.image_files", "hf_vit.image_tables", "hf_vit.modeling"),
    ("hf_vit.inference", "hf_vit.checkpoints"),
    ("hf_vit.transformers_classifiers",),
    ("hf_vit",),  # what it names: the public surface
    ("hf_vit.interpretability",),
    ("hf_vit.hub", "hf_vit.export"),
    ("hf_vit.cli",),
    ("training",),  # its __init__
    ("training.rng", "training.config"),
    ("training.data", "training.metrics"),
    ("training.reporting",),
    ("training.engine",),
    ("training.sweep",),
    ("training.folds",),
    ("training.build_model", "training.run_report"),
    ("training.train",),
    ("training.python_api",),
    ("training.finetune", "training.pretrain"),
    ("training.evaluation",),
    ("training.studies", "training.score", "training.quickstart", "training.synthetic", "training.shards"),
    ("training.study",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# An installed hf_vit is looked for when it is asked for: in code that travelled to the Hub there is none.
LOOKED_FOR = {
    ("hf_vit.modeling.pretrained_hf_vit", "hf_vit.inference"),
    ("hf_vit.modeling.pretrained_hf_vit", "hf_vit.checkpoints"),
}
# The public names of `training` are loaded when they are used.
LAZY = {"training"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in ("hf_vit", "training") for path in (ROOT / package).rglob("*.py")}


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of the repository that a file imports, also inside functions."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    found = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} if name and name != module_of(path) else set()
    return found


def layer_of(module: str) -> str:
    while module not in LEVEL:
        module = module.rpartition(".")[0]
        assert module, "a module outside of the order"
    return module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_stands_before_it(module):
    own = layer_of(module)
    # `training/__init__.py` and `hf_vit/__init__.py` are layers of their own, and so is each file beside them.
    assert module.count(".") == 0 or own not in ("hf_vit", "training"), f"add {module} to ORDER"
    if module in LAZY:
        return
    for imported in sorted(imports_of(MODULES[module])):
        other = layer_of(imported)
        if other == own or (module, other) in LOOKED_FOR:
            continue
        assert LEVEL[other] < LEVEL[own], f"{module} imports {imported}, which stands above it"


def test_there_is_no_circle():
    edges = {module: imports_of(path, top_level_only=True) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for imported in sorted(edges[module]):
                # A package's __init__ is run first by Python anyway: its own files may be read from it.
                if not module.startswith(f"{imported}.") and not imported.startswith(f"{module}."):
                    visit(imported, (*above, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_the_model_and_the_library_never_import_training():
    for module, path in MODULES.items():
        if module.split(".")[0] == "hf_vit":
            assert not any(name.split(".")[0] == "training" for name in imports_of(path)), module
