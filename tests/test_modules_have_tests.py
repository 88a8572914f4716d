"""Every module has a test file of its name, or its docstring says which test file holds it.

python -m pytest tests/test_modules_have_tests.py
"""

import ast
import re

import pytest

from tests.test_imports import MODULES, ROOT


TEST_FILES = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("module", sorted(name for name, path in MODULES.items() if path.name != "__init__.py"))
def test_a_module_has_a_test_file(module):
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or ""
    named = re.findall(r"tests/[\w/]+\.py", docstring)
    assert all((ROOT / path).is_file() for path in named), named
    own = f"test_{module.rpartition('.')[2]}"
    assert named or own in TEST_FILES, f"write {own}.py, or say in the docstring: Tests: tests/FILE.py."
