"""Text in matplotlib figures: `$` is a dollar sign, and letters come from any installed font that has them.

For every figure with class names. matplotlib draws a box and warns for a letter that its default font lacks, such as
Japanese ones, even if another installed font has it.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


# matplotlib's font of boxes, which has every code point
PLACEHOLDER_FAMILY = "Last Resort"
# families with many scripts, tried first
WIDE_FAMILIES = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "IPA", "Takao", "Hiragino", "Yu Gothic", "Meiryo",
                 "MS Gothic", "Malgun", "Nanum", "Microsoft YaHei", "PingFang", "SimHei", "Droid Sans Fallback",
                 "Arial Unicode", "Noto Sans")  # fmt: skip


def families_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Font families that together cover the letters of texts, the default first; and the letters that none has."""
    default = matplotlib.rcParams["font.family"]
    missing = {letter for text in texts for letter in text if letter.isprintable() and not letter.isspace()}
    missing -= {chr(code) for code in _letters(findfont(FontProperties(family=default)))}
    families = list(default)
    for family, path in _installed() if missing else ():
        covered = {letter for letter in missing if ord(letter) in _letters(path)}
        if covered:
            families.append(family)
            missing -= covered
        if not missing:
            break
    return families, missing


@contextmanager
def plain_text(figure: Figure) -> Iterator[set[str]]:
    """Set the fonts of a finished figure's texts, and silence warnings of fonts while it is saved.

    Yields the letters that no font has.

    with plain_text(figure) as missing:
        figure.savefig(path)
    """
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    families, missing = families_for(text.get_text() for text in texts)
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(families)
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield missing
    finally:
        log.setLevel(level)


@cache
def _installed() -> list[tuple[str, str]]:
    """(family, path) of one font of each family that matplotlib finds, those with many scripts first."""
    regular: dict[str, str] = {}
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", str(font.weight) not in "400")):
        regular.setdefault(font.name, font.fname)

    def rank(pair: tuple[str, str]) -> int:
        ranks = [number for number, name in enumerate(WIDE_FAMILIES) if pair[0].startswith(name)]
        return ranks[0] if ranks else len(WIDE_FAMILIES)

    return sorted((pair for pair in regular.items() if not pair[0].startswith(PLACEHOLDER_FAMILY)), key=rank)


@cache
def _letters(path: str) -> frozenset[int]:
    """The code points of a font file; none if it cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
