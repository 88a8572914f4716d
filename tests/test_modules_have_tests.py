"""Every module has a test file of its name, or says which test file holds it: in its docstring, or, where that is the
text of --help, in a comment.

python -m pytest tests/test_modules_have_tests.py
"""

import ast
import re

import pytest

from tests.test_imports import MODULES, ROOT


TEST_FILES = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("module", sorted(name for name, path in MODULES.items() if path.name != "__init__.py"))
def test_a_module_has_a_test_file(module):
    text = MODULES[module].read_text(encoding="utf-8")
    comments = "".join(re.findall(r"^# Tests: .*", text, re.MULTILINE))
    named = re.findall(r"tests/[\w/]+\.py", (ast.get_docstring(ast.parse(text)) or "") + comments)
    assert all((ROOT / path).is_file() for path in named), named
    own = f"test_{module.rpartition('.')[2]}"
    assert named or own in TEST_FILES, f"write {own}.py, or say in the docstring: Tests: tests/FILE.py."
