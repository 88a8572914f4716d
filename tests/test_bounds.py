"""What `make lowest` installs is what pyproject.toml allows at the least.

python -m pytest tests/test_bounds.py
"""

import tomllib
from collections import defaultdict
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for name in extras if name != "grad-cam" for text in extras[name])]
    bounds = defaultdict(list)
    for requirement in map(Requirement, texts):
        bounds[canonicalize_name(requirement.name)] += [
            Version(one.version) for one in requirement.specifier if one.operator == ">="
        ]
    del bounds["hf-vit"]  # the extras that `dev` puts together
    pins = (ROOT / ".ci" / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in pins if not line.startswith("#"))
    assert {canonicalize_name(name): Version(text) for name, text in pinned.items()} == {
        name: max(versions) for name, versions in bounds.items()
    }
