"""Registration with transformers' Auto classes, put off until somebody looks for ours in them.

To register takes the Auto classes, torch and all classes of ours: seconds. `import hf_vit` only watches for the Auto
classes. When transformers imports them, their tables of what others registered become `Entries`, and `auto_classes.py`
registers at the first look that could find ours. That is a call like `from_pretrained`, when all modules are complete.
At the import of the Auto classes it would be too early: modules that ours need are what imports them.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import transformers  # noqa: F401  # not by threads at their first use: it takes its place in sys.modules as it ends


# Modules of transformers, and their tables that `auto_classes.py` writes into.
TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING",),
    "transformers.models.auto.modeling_auto": (
        "MODEL_MAPPING",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING",
        "MODEL_FOR_BACKBONE_MAPPING",
    ),
    "transformers.models.auto.image_processing_auto": ("IMAGE_PROCESSOR_MAPPING",),
}


def register() -> None:
    """Register once. Threads wait for the one that imports, and looks from within that import pass."""
    importlib.import_module(f"{__package__}.auto_classes")


def register_when_looked_for() -> None:
    if WATCH not in sys.meta_path:
        sys.meta_path.insert(0, WATCH)
    if any(name in sys.modules for name in TABLES):  # torch is there too: nothing to put off
        register()


def looking(method: Callable[..., Any]) -> Any:
    """The method of a dict, registering first if it could find ours: it looks at all, or under a key of ours."""

    def look(entries: dict, *arguments: Any) -> Any:
        key = arguments[0] if arguments else "hf_vit"
        if key == "hf_vit" or getattr(key, "__module__", None) == f"{__package__}.modeling.configuration_hf_vit":
            register()
        return method(entries, *arguments)

    return look


class Entries(dict):
    """What others registered, by model type or configuration class; what was put off too, once it is looked for.

    Setting looks as well: who registers something else under our name means it to stay.
    """

    __contains__, __getitem__ = looking(dict.__contains__), looking(dict.__getitem__)
    __setitem__ = looking(dict.__setitem__)
    __iter__, __len__ = looking(dict.__iter__), looking(dict.__len__)
    keys, values, items = looking(dict.keys), looking(dict.values), looking(dict.items)


class Watch(MetaPathFinder):
    """Finds the modules of TABLES where the other finders find them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in TABLES:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None:
            spec.loader = Replacing(spec.loader)
        return spec


class Replacing(Loader):
    """A module's own loader; tables are replaced where the module ends, before anybody has looked into them."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        for name in TABLES[module.__name__]:
            mapping: Any = getattr(module, name, None)
            if getattr(mapping, "_extra_content", None) == {}:
                mapping._extra_content = Entries()
            else:
                warnings.warn(
                    f"this transformers has another {name} than hf_vit knows: its Auto classes find hf_vit after "
                    "`import hf_vit.auto_classes`",
                    stacklevel=2,
                )


WATCH = Watch()
