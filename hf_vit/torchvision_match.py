"""Does the installed torchvision match torch? If not, imports of transformers fail far from the cause.

Answered from the wheels' metadata, since importing such a torchvision fails: the torch that it requires, and the build
(`+cpu`, `+cu130`) in each `version.py`, which the metadata on PyPI lack.
"""

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from .errors import HFViTError, report_error


COMMANDS = ("hf_vit", "training")  # packages of `python -m PACKAGE.MODULE`
STABLE_SINCE = Version("2.14")  # from this torch on, a torchvision also works with later versions


def check_torchvision() -> None:
    """Refuse a torchvision that cannot be imported with this torch; none, or one already imported, is accepted.

    Raises:
        HFViTError: names both versions and the way out.
        SystemExit: the same as one line and status 2, for a command of ours: it cannot catch an error that is raised
            while its module is imported.
    """
    if "torchvision" in sys.modules:
        return
    try:
        mismatch = find_mismatch(distribution("torch"), distribution("torchvision"))
    except (PackageNotFoundError, InvalidVersion, InvalidRequirement):
        return
    if mismatch is None:
        return
    error = HFViTError(mismatch)
    if _is_our_command(sys.orig_argv):
        raise SystemExit(report_error(error))
    raise error


def find_mismatch(torch: Distribution, torchvision: Distribution) -> str | None:
    """What to tell about the pair, or None if they match.

    A torch of another patch release matches. A torchvision that requires no certain torch (built from source) is
    taken to match: whoever built it had that torch.
    """
    torch_build, build = _build_label(torch), _build_label(torchvision)
    version = Version(torch.version)
    needed = [Requirement(text) for text in torchvision.requires or []]
    fits = all(_allows(requirement, version) for requirement in needed if requirement.name == "torch")
    if fits and not _other_build(torch_build, build):
        return None
    index = f" --index-url https://download.pytorch.org/whl/{torch_build}" if torch_build else ""
    return (
        f"torchvision {torchvision.version}{_label(torchvision, build)} does not match torch "
        f"{torch.version}{_label(torch, torch_build)}: pip install '{_matching(version)}'{index}, or pip uninstall "
        "torchvision (hf_vit does not need it)"
    )


def _allows(requirement: Requirement, torch: Version) -> bool:
    pinned = [
        Version(specifier.version).release[:2] for specifier in requirement.specifier if specifier.operator == "=="
    ]
    if pinned:
        return torch.release[:2] in pinned
    return requirement.specifier.contains(torch.base_version)


def _other_build(torch_build: str, build: str) -> bool:
    """Whether torchvision's compiled operators cannot load: built for a GPU that torch is not, or another CUDA."""
    if torch_build == "cpu":
        return build.startswith(("cu", "rocm", "xpu"))
    cuda = [re.fullmatch(r"cu(\d+)\d", name) for name in (torch_build, build)]
    return all(cuda) and cuda[0][1] != cuda[1][1]  # type: ignore[index]


def _build_label(package: Distribution) -> str:
    """`cpu`, `cu130`, ... as its version.py has it; empty where there is none (macOS, built from source)."""
    path = Path(str(package.locate_file(f"{package.name}/version.py")))
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    label = re.search(r"__version__ = '[^'+]*\+((?:cpu|cu|rocm|xpu)[\d.]*)'", text)
    return label[1] if label else ""


def _label(package: Distribution, build: str) -> str:
    return f"+{build}" if build and "+" not in package.version else ""


def _matching(torch: Version) -> str:
    """The torchvision for this torch: 0.21.0 for 2.6.0, 0.28.0 for 2.13.0."""
    if torch >= STABLE_SINCE or torch.major != 2:
        return "torchvision>=0.29"
    return f"torchvision==0.{torch.minor + 15}.{torch.micro}"


def _is_our_command(words: list[str]) -> bool:
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1].split(".")[0] in COMMANDS
    return any(Path(word).stem == "hf-vit" for word in words[:3])
