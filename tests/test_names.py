"""A name is looked up once: no two modules define functions or classes of one name, but where it is an interface.

python -m pytest tests/test_names.py
"""

import ast
from collections import defaultdict

from tests.test_imports import MODULES


# What several modules define because something takes any of them.
INTERFACES = {
    "hf_vit.checkpoints.formats": {"matches", "read", "write", "key_mappings", "cannot", "model_type_for"},
    "hf_vit.cli": {"add_arguments", "run"},
    "training": {"main", "build_parser", "run"},  # commands, and what a command starts
}


def is_interface(module: str, name: str) -> bool:
    return any(module.startswith(package) and name in names for package, names in INTERFACES.items())


def test_a_name_is_defined_in_one_module():
    homes = defaultdict(set)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not is_interface(module, node.name):  # outside of its packages such a name counts
                homes[node.name].add(module)
    twice = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert not twice
