"""docs/troubleshooting.md quotes messages that the code has.

python -m pytest tests/docs/test_troubleshooting.py
"""

import ast
import re

from tests.conftest import ROOT


def strings(path):
    """Every text of a module, implicit joins joined, with a NUL for what an f-string fills in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


def quoted():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def test_quoted_messages_are_in_the_code():
    files = [path for folder in ("hf_vit", "training") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(text for path in files for text in strings(path))
    messages = quoted()
    assert len(messages) > 40
    for message in messages:
        fragments = map(re.escape, message.split("..."))
        assert re.search(r"[^\n]*".join(fragments), code), message
