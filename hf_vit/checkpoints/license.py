"""Read the license of a checkpoint's model card, which is kept with the weights in every format.

Tests: tests/hf_vit/checkpoints/test_wrappers.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load


@dataclass(frozen=True)
class License:
    """The license in the front matter of a model card.

    Attributes:
        id: the Hub's identifier, such as `"apache-2.0"` or `"other"`.
        name, link: of a license without an identifier.
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
    """The license in the README.md of a folder; None if there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        metadata: Any = metadata_load(card)
    except Exception:  # broken YAML in a card is no reason to refuse the weights
        return None
    identifier = metadata.get("license") if isinstance(metadata, dict) else None
    if isinstance(identifier, list):  # the Hub accepts several
        identifier = ", ".join(map(str, identifier))
    if not isinstance(identifier, str) or not identifier.strip():
        return None
    name, link = (metadata.get(key) for key in ("license_name", "license_link"))
    return License(
        identifier.strip(), name if isinstance(name, str) else None, link if isinstance(link, str) else None
    )
