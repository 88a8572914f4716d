"""The license of a checkpoint's model card: it travels with the weights, whatever format they are written in.

Tests: tests/hf_vit/checkpoints/test_wrappers.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load


@dataclass(frozen=True)
class License:
    """As the front matter of a model card says it.

    Attributes:
        id: the Hub's identifier, such as `"apache-2.0"` or `"other"`.
        name, link: of a license that has no identifier.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def metadata(self) -> dict[str, str]:
        """The entries of a model card's front matter."""
        entries = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in entries.items() if value is not None}

    def is_non_commercial(self) -> bool:
        """Whether its name says so (CC BY-NC and kin)."""
        words = f"{self.id} {self.name or ''}".lower().replace("_", "-").split()
        return any("nc" in word.split("-") or "noncommercial" in word or "non-commercial" in word for word in words)


def read_license(folder: Path) -> License | None:
    """From the README.md of a folder; None where there is none, or it says nothing readable."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        metadata: Any = metadata_load(card)
    except Exception:  # a card is prose: broken YAML in it is no reason to refuse the weights
        return None
    stated = metadata.get("license") if isinstance(metadata, dict) else None
    if isinstance(stated, list):  # the Hub accepts several
        stated = ", ".join(map(str, stated))
    if not isinstance(stated, str) or not stated.strip():
        return None
    name, link = (metadata.get(key) for key in ("license_name", "license_link"))
    return License(stated.strip(), name if isinstance(name, str) else None, link if isinstance(link, str) else None)
