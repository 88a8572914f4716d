"""A strict YAML reader for recipes: refuses what different versions of YAML read as different values.

PyYAML follows YAML 1.1, where `010` is 8, `1:30` is 90, a repeated key silently takes the last value, and tags build
objects. Readers of YAML 1.2 are not installed with transformers; this restricts PyYAML's safe loader instead.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from hf_vit.errors import HFViTError


MAX_DEPTH = 20  # of nested lists and mappings; recipes have three
MAX_BYTES = 1 << 20
KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_:]+")


class StrictLoader(yaml.SafeLoader):
    """Safe loader without tags, aliases, repeated keys, dates, and numbers of other bases."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not for recipes")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} brackets or levels inside each other")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node, deep=False):
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key has to be a word")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse_tag(loader, node):
    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the tag {node.tag} is not for recipes")


def _scalar(loader, node):
    if LEADING_ZERO.fullmatch(node.value) and node.style is None:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {node.value} begins with 0: write a plain number")
    return node.value


# Only these are recognized without quotes: no dates, no `1:30`, no `0x1F`, no `1_000`, no `<<`.
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":", 1)[-1] in ("null", "bool", "float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    list("-+0123456789."),
)
for _first, _pairs in StrictLoader.yaml_implicit_resolvers.items():
    # PyYAML's own pattern of a float comes first and accepts `1:30.5`; ours is the last.
    _floats = [pair for pair in _pairs if pair[0].endswith(":float")][-1:]
    StrictLoader.yaml_implicit_resolvers[_first] = [p for p in _pairs if not p[0].endswith(":float")] + _floats
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(NUMBER.pattern + r"\Z"), list("-+0123456789"))
StrictLoader.yaml_constructors = {
    tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag and tag.rsplit(":", 1)[-1] in KINDS
}
StrictLoader.add_constructor("tag:yaml.org,2002:str", _scalar)
StrictLoader.add_constructor(None, _refuse_tag)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a file.

    Raises:
        HFViTError: not YAML, not UTF-8, not a mapping, or ambiguous between versions of YAML.
    """
    if path.stat().st_size > MAX_BYTES:
        raise HFViTError(f"{path} has {path.stat().st_size:,} bytes: a recipe is lines of `name: value`")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HFViTError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    try:
        values = yaml.load(text, StrictLoader) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise HFViTError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise HFViTError(f"{path}: a recipe is lines of `name: value`")
    return values


def yaml_value(words: str, text: str) -> Any:
    """Parse `text` as YAML.

    Args:
        words: of the command line that it is a part of, for the error.
    """
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, yaml.MarkedYAMLError):
            raise HFViTError(f"{words}: {text!r} is not YAML; brackets and quotes have to be closed") from None
        raise HFViTError(f"{words}: {text[:60]!r}: {error}") from None
