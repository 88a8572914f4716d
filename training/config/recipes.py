"""Find and read the recipe of `--config NAME --variant NAME`.

For parser.py, which checks keys and types of the values. `training/recipes/measured/` holds recipes that were run
here, with score, hardware, number of runs and spread in the header; `published/` those that were not: transcribed from
papers, or our own and not yet run. Both are found by bare name.

A recipe that comes in several sizes or lengths names them, with the keys in which each differs:

    variants:
      base: {preset: vit-base-patch16-192}
      large: {preset: vit-large-patch16-192, set: {drop_path_rate: 0.45}}
    default_variant: base
"""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

from hf_vit.errors import HFViTError

from .strict_yaml import read_yaml


RECIPES = Path(__file__).parents[1] / "recipes"
FOLDERS = ("measured", "published")
ORIGIN = "resolved_from"  # key of a resolved config: the recipe and the variant that it came from

# Recipes of version 0.1.0 that became a variant of another one; the old name is understood for one release.
RENAMED_RECIPES = {
    "bit_hyperrule_small": ("bit_hyperrule", "small"),
    "bit_hyperrule_medium": ("bit_hyperrule", "medium"),
    "bit_hyperrule_large": ("bit_hyperrule", "large"),
    "cifar10_5min": ("cifar10_timed", "5min"),
    "cifar10_15min": ("cifar10_timed", "15min"),
    "deit3_small": ("deit3", "small"),
    "deit3_base": ("deit3", "base"),
    "deit3_large": ("deit3", "large"),
    "layer_decay_base": ("finetune_mae", "base"),
    "layer_decay_large": ("finetune_mae", "large"),
    "plain_vit_s16_90": ("plain_vit_s16", "90"),
    "plain_vit_s16_150": ("plain_vit_s16", "150"),
    "plain_vit_s16_300": ("plain_vit_s16", "300"),
}


@dataclasses.dataclass
class Recipe:
    """A recipe as written, before its values are checked.

    Attributes:
        path: of the file. name, variant: those that the facts name; a resolved config keeps those of its origin.
        common: keys of every variant. variants: keys of each variant, which override the common ones.
    """

    path: Path
    name: str | None
    variant: str | None
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]


def recipe_names() -> list[str]:
    """The bare names of all recipes of the project."""
    return sorted(path.stem for folder in FOLDERS for path in (RECIPES / folder).glob("*.yaml"))


def recipe_path(name: str) -> Path | None:
    """The file of a recipe of the project, by its bare name; None if there is no such recipe."""
    candidates = (RECIPES / folder / f"{name.removesuffix('.yaml')}.yaml" for folder in FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def read_recipe(name: str, variant: str | None = None) -> Recipe:
    """Read a recipe by path or bare name, and choose its variant.

    Args:
        name: path of a YAML file, or name of a recipe of the project. variant: one of its variants; None: the default.

    Raises:
        HFViTError: no such recipe or variant, a variant for a recipe without any, or a missing variant.
    """
    path, renamed_variant = _find(name)
    if renamed_variant is not None:
        if variant is not None:
            raise HFViTError(
                f"--config {name} is {path.stem} --variant {renamed_variant}: give --config {path.stem} with the "
                "--variant that you want"
            )
        variant = renamed_variant
    contents = read_yaml(path)
    origin = contents.pop(ORIGIN, None)
    variants, default = contents.pop("variants", None), contents.pop("default_variant", None)
    if variants is None:
        if variant is not None or default is not None:
            what = f"--variant {variant}" if variant is not None else f"default_variant {default}"
            raise HFViTError(f"{what}: {path} has no variants; leave it out")
        return Recipe(path, *(_origin(path, origin) if origin is not None else (path.stem, None)), contents, {})
    if not isinstance(variants, dict) or not variants or not all(isinstance(v, dict) for v in variants.values()):
        raise HFViTError(f"{path}: variants has to map each name to the keys that it overrides")
    variants = {str(key): values for key, values in variants.items()}
    names = ", ".join(variants)
    if default is not None and str(default) not in variants:
        raise HFViTError(f"{path}: default_variant {default} is not among its variants {names}")
    chosen = variant if variant is not None else default
    if chosen is None:
        raise HFViTError(f"--config {name} has variants and no default: give --variant with one of {names}")
    if str(chosen) not in variants:
        near = difflib.get_close_matches(str(chosen), variants, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise HFViTError(f"--variant {chosen!r}: {path.stem} has the variants {names}{hint}")
    return Recipe(path, path.stem, str(chosen), contents, variants)


def _find(name: str) -> tuple[Path, str | None]:
    """The file, and the variant that an old name stands for; a path or name of version 0.1.0 prints the new one."""
    path = Path(name)
    if path.is_file():
        return path, None
    moved = path.suffix == ".yaml" and path.parent.resolve() == RECIPES  # where all recipes were in version 0.1.0
    if moved or path.parent == Path("."):
        stem = path.name.removesuffix(".yaml")
        new_name, variant = RENAMED_RECIPES.get(stem, (stem, None))
        renamed = recipe_path(new_name)
        if renamed is not None:
            if variant is not None:
                _announce(f"--config {name}", f"--config {new_name} --variant {variant}")
            elif moved:
                _announce(name, str(path.parent / renamed.relative_to(RECIPES)))
            return renamed, variant
    raise HFViTError(f"no recipe {name!r}: give the path of a YAML file, or one of {', '.join(recipe_names())}")


def _announce(old: str, new: str) -> None:
    print(f"{old} is now {new}; the old name goes with the next release", file=sys.stderr)


def _origin(path: Path, origin: Any) -> tuple[str | None, str | None]:
    if not isinstance(origin, dict) or set(origin) != {"recipe", "variant"}:
        raise HFViTError(f"{path}: {ORIGIN} has to be {{recipe: NAME, variant: NAME}}, as a run writes it; remove it")
    recipe, variant = (None if value is None else str(value) for value in (origin["recipe"], origin["variant"]))
    return recipe, variant
