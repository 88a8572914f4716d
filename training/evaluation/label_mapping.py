"""Match the classes of a data set with the outputs of a classifier.

For score_model.py. Classes are matched by name. If one does not match, the error suggests the nearest names;
classes are never matched by position. imagenet.yaml holds ImageNet's classes and those of its variants.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hf_vit.errors import HFViTError, listed


IMAGENET = Path(__file__).with_name("imagenet.yaml")
BY_NUMBER = "number"
OF_THE_DATA = "data"
REAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")
MIN_OWN_AMONG_REAL = 0.5  # of the images, whose own class is among their ReaL labels
MAX_SUGGESTED = 5  # pairs in an error message


@dataclass(frozen=True)
class LabelMatch:
    """The output of each class of the data, among the outputs that compete.

    Attributes:
        places: int64 (classes of the data,), the index of its output among `columns`.
        columns: outputs of the head that compete; None: all. names: of these. how: in a few words, for the facts.
    """

    places: np.ndarray
    columns: np.ndarray | None
    names: list[str]
    how: str


@cache
def imagenet() -> dict[str, Any]:
    """`wnids` and `names` (1000 each), and `subsets`: name to class numbers."""
    content = yaml.safe_load(IMAGENET.read_text(encoding="utf-8"))
    pairs = [next(iter(entry.items())) for entry in content["classes"]]
    return {"wnids": [p[0] for p in pairs], "names": [p[1] for p in pairs], "subsets": content["subsets"]}


def match_labels(
    data_names: Sequence[str],
    head_names: Sequence[str],
    label_map: str | None = None,
    label_subset: str | None = None,
) -> LabelMatch:
    """Match the classes of the data with the outputs of the head.

    Args:
        label_map: "number" (class i is output i), or a JSON or YAML file of `class of the data: output or its number`.
        label_subset: the outputs that compete: "data" (those that the data has), "imagenet_a", "imagenet_r", or a file
            with one output's number per line; data classes count in it by number unless their names match.

    Raises:
        HFViTError: a class without an output; two classes with the same one; an unknown map or subset.
    """
    subset = None if label_subset in (None, OF_THE_DATA) else subset_columns(str(label_subset), len(head_names))
    if label_map not in (None, BY_NUMBER):
        places, how = places_of_map(str(label_map), data_names, head_names), f"by {Path(str(label_map)).name}"
    elif label_map == BY_NUMBER or (subset is not None and len(subset) == len(data_names) and unnamed(data_names)):
        places, how = by_number(data_names, head_names, subset), "by number"
    else:
        places, how = by_name(data_names, head_names)
    twice = [data_names[i] for i in np.flatnonzero(np.bincount(places, minlength=1)[places] > 1)]
    if twice:
        raise HFViTError(f"several classes of the data are mapped to the same output of the model: {listed(twice)}")
    columns = np.sort(places) if label_subset == OF_THE_DATA else subset
    if columns is None:
        names = dict(enumerate(head_names))
        if unnamed(head_names):
            names |= dict(zip(places.tolist(), data_names))
        return LabelMatch(places, None, list(names.values()), how)
    outside = [data_names[i] for i in np.flatnonzero(~np.isin(places, columns))]
    if outside:
        raise HFViTError(f"classes of the data are not in --label_subset {label_subset}: {listed(outside)}")
    narrowed = np.argsort(columns)[np.searchsorted(columns, places, sorter=np.argsort(columns))]
    how = f"{how}, {len(columns)} of {len(head_names)} outputs compete"
    return LabelMatch(narrowed, columns, [head_names[i] for i in columns], how)


def subset_columns(name: str, outputs: int) -> np.ndarray:
    """The class numbers of a known subset, or of a file with one number per line."""
    subsets = imagenet()["subsets"]
    if name in subsets:
        columns = subsets[name]
    elif Path(name).is_file():
        words = Path(name).read_text(encoding="utf-8-sig").split()
        if not all(word.isdecimal() for word in words):
            raise HFViTError(f"--label_subset {name}: expected one class number per line")
        columns = [int(word) for word in words]
    else:
        raise HFViTError(f"--label_subset {name}: neither a file nor one of data, {', '.join(subsets)}")
    if not columns or max(columns) >= outputs or len(set(columns)) < len(columns):
        raise HFViTError(f"--label_subset {name}: numbers must differ and lie within the head's 0..{outputs - 1}")
    return np.array(columns, dtype=np.int64)


def unnamed(names: Sequence[str]) -> bool:
    """Whether names are only numbers: 0, 1, ... or LABEL_0, LABEL_1, ..., in any order."""
    return numbers_of_names(names) is not None


def numbers_of_names(names: Sequence[str]) -> list[int] | None:
    """The numbers in names such as 7, 007 or LABEL_7; None unless all names are different numbers."""
    matches = [re.fullmatch(r"(?:LABEL_)?(\d+)", name, re.ASCII) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if len(numbers) == len(names) == len(set(numbers)) else None


def by_number(data_names: Sequence[str], head_names: Sequence[str], subset: np.ndarray | None = None) -> np.ndarray:
    """Class i is output i, or the i-th of the subset; i is the number in its name, else its position."""
    outputs = np.arange(len(head_names)) if subset is None else subset
    numbers = numbers_of_names(data_names) or list(range(len(data_names)))
    if max(numbers, default=-1) >= len(outputs):
        raise HFViTError(
            f"label {max(numbers)} of the data is outside the model's {len(outputs)} outputs "
            f"(0..{len(outputs) - 1}), {listed(list(head_names))}: this model was made for other classes; where they "
            "are the same, give --label_map FILE with `class of the data: class of the model` for each"
        )
    return outputs[numbers]


def by_name(data_names: Sequence[str], head_names: Sequence[str]) -> tuple[np.ndarray, str]:
    """Equal names, then equal numbers, then ImageNet's wnids, then names that differ only in spelling.

    Never by position: folders named 0, 1, 10, 11, 2 are not in the order of their numbers.
    """
    places = {name: place for place, name in enumerate(head_names)}
    if len(places) == len(head_names) and set(data_names) <= set(places):
        return np.array([places[name] for name in data_names], dtype=np.int64), "by name"
    if list(data_names) == list(head_names):  # with a name twice
        return np.arange(len(data_names)), "by name"
    numbers, head_numbers = numbers_of_names(data_names), numbers_of_names(head_names)
    if numbers is not None or head_numbers is not None:
        return by_written_number(data_names, head_names), "by number"
    wnids = imagenet()["wnids"]
    if set(data_names) <= set(wnids) and len(head_names) == len(wnids):
        return np.array([wnids.index(name) for name in data_names]), "by ImageNet's class ids"
    by_spelling = spelled_places(head_names)
    matches = [by_spelling.get(spelling(name), same_place(name, i, head_names)) for i, name in enumerate(data_names)]
    missing = [name for name, number in zip(data_names, matches) if number is None]
    if missing:
        raise HFViTError(mismatch(missing, data_names, head_names))
    return np.array(matches, dtype=np.int64), "by name, whatever the spelling"


def by_written_number(data_names: Sequence[str], head_names: Sequence[str]) -> np.ndarray:
    """By the numbers in the names of the data or of the outputs, if both have the same number of classes.

    Raises:
        HFViTError: the numbers of classes differ, or a number of one side does not exist on the other.
    """
    numbers, head_numbers = numbers_of_names(data_names), numbers_of_names(head_names)
    if len(data_names) != len(head_names):
        by_number(data_names, head_names)  # raises its own error for too many classes
        raise HFViTError(
            f"the data has {len(data_names)} classes, the model {len(head_names)} outputs, and one of them has no "
            "class names: give --label_subset where the data has some of the model's classes, or --label_map "
            "number if class i is output i"
        )
    if numbers is None:
        raise HFViTError(
            f"the model's outputs have no names ({listed(list(head_names))}), the data's classes have "
            f"({listed(list(data_names))}): give --label_map number if the classes in this order are the outputs in "
            "theirs, or --label_map FILE with `class of the data: number of the output` for each"
        )
    output_of = dict(zip(head_numbers if head_numbers is not None else range(len(head_names)), range(len(head_names))))
    unmatched = [name for name, number in zip(data_names, numbers) if number not in output_of]
    if unmatched:
        raise HFViTError(
            f"classes {listed(unmatched)} of the data are not among the numbers of the model's outputs "
            f"({listed(list(head_names))}): give --label_map FILE with `class of the data: class of the model` for "
            "each"
        )
    return np.array([output_of[number] for number in numbers], dtype=np.int64)


def spelling(name: str) -> str:
    """A name in lower case without punctuation; space, dash and underscore are the same."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold())) or name


def same_place(name: str, number: int, head_names: Sequence[str]) -> int | None:
    """The output with the same number, if it has the same name: ImageNet has two classes `crane`."""
    return number if number < len(head_names) and spelling(head_names[number]) == spelling(name) else None


def spelled_places(names: Sequence[str]) -> dict[str, int]:
    """Outputs by spelling, of the whole name or of a synonym (between commas); without spellings of two outputs."""
    places: dict[str, int] = {}
    for spellings in ([name.split(",") for name in names], [[name] for name in names]):
        numbers: dict[str, set[int]] = {}
        for number, words in enumerate(spellings):
            for word in words:
                numbers.setdefault(spelling(word), set()).add(number)
        for word, outputs in numbers.items():
            if len(outputs) == 1:
                places[word] = min(outputs)
            else:
                places.pop(word, None)
    return places


def mismatch(missing: Sequence[str], data_names: Sequence[str], head_names: Sequence[str]) -> str:
    """The error for classes that the model does not have, with the nearest that it has."""
    pairs = [f"{name!r}: {near!r}" for name, near in suggested_map(missing[:MAX_SUGGESTED], head_names).items()]
    more = f" and {len(missing) - MAX_SUGGESTED} more" if len(missing) > MAX_SUGGESTED else ""
    return (
        f"{len(missing)} of the data's {len(data_names)} classes are not among those of the model "
        f"({listed(head_names)}); the nearest are {', '.join(pairs)}{more}. Give --label_map FILE (JSON or YAML) with "
        "`class of the data: class of the model` for each"
    )


def suggested_map(data_names: Sequence[str], head_names: Sequence[str]) -> dict[str, str]:
    """For each class of the data the nearest of the model."""
    spelled = {spelling(name): name for name in head_names}
    nearest = {
        name: difflib.get_close_matches(spelling(name), spelled, n=1, cutoff=0.0)[:1] or [next(iter(spelled))]
        for name in data_names
    }
    return {name: spelled[spellings[0]] for name, spellings in nearest.items()}


def places_of_map(path: str, data_names: Sequence[str], head_names: Sequence[str]) -> np.ndarray:
    """Outputs as given in a file."""
    if not Path(path).is_file():
        raise HFViTError(f"--label_map {path}: no such file, and not `{BY_NUMBER}`")
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        table = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise HFViTError(f"--label_map {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise HFViTError(f"--label_map {path}: expected `class of the data: class of the model`, one for each class")
    table = {str(key): value for key, value in table.items()}
    missing = [name for name in data_names if name not in table]
    if missing:
        raise HFViTError(f"--label_map {path} has no entry for {listed(missing)}")
    number_of = {name: number for number, name in enumerate(head_names)}
    outputs = [table[name] if type(table[name]) is int else number_of.get(str(table[name])) for name in data_names]
    unknown = [
        table[name] for name, number in zip(data_names, outputs) if number is None or not 0 <= number < len(head_names)
    ]
    if unknown:
        raise HFViTError(f"--label_map {path} names outputs that the model does not have: {listed(unknown)}")
    return np.array(outputs, dtype=np.int64)


# -- ImageNet-ReaL ---------------------------------------------------------------------------------------------------


def read_real_labels(path: str) -> list[list[int]]:
    """The lists of `real.json`, in the order of the validation set's file names.

    Args:
        path: the JSON file, or a folder that holds it.

    Raises:
        HFViTError: no such file, or not lists of class numbers.
    """
    file = Path(path) / "real.json" if Path(path).is_dir() else Path(path)
    try:
        lists = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError:
        raise HFViTError(
            f"--real_labels {path}: no such file; real.json is in github.com/google-research/reassessed-imagenet"
        ) from None
    except (ValueError, RecursionError) as error:
        raise HFViTError(f"--real_labels {file} is not JSON ({error})") from None
    good = isinstance(lists, list) and all(
        isinstance(row, list) and all(isinstance(label, int) and label >= 0 for label in row) for row in lists
    )
    if not good or not any(lists):
        raise HFViTError(f"--real_labels {file}: expected a list with a list of class numbers for each image")
    return lists


def real_rows(lists: Sequence[Sequence[int]], names: Sequence[str], rows: Sequence[int], total: int) -> np.ndarray:
    """The ReaL labels of images, int64 (N, largest number of labels), padded with -1.

    Args:
        names: of the images; the number in ILSVRC2012_val_%08d, from 1, is that of the image's list.
        rows: index of each image in its source, used if the names have no numbers. total: images in the source.

    Raises:
        HFViTError: the images cannot be matched with the lists.
    """
    numbers = [REAL_FILE.search(name) for name in names]
    if all(numbers):
        places = [int(match[1]) - 1 for match in numbers if match]
    elif total == len(lists):
        places = [int(row) for row in rows]
    else:
        raise HFViTError(
            f"ReaL labels of {len(lists):,} images, but the split has {total:,}, and their names are not "
            "ILSVRC2012_val_00000001 and so on: give the whole validation set in the order of its file names"
        )
    if max(places) >= len(lists) or min(places) < 0:
        raise HFViTError(f"image number {max(places) + 1} has no ReaL label: the file has {len(lists):,} lists")
    table = np.full((len(places), max(len(lists[place]) for place in places) or 1), -1, dtype=np.int64)
    for row, place in enumerate(places):
        table[row, : len(lists[place])] = lists[place]
    return table


def check_real(real: np.ndarray, places: np.ndarray) -> None:
    """Raise HFViTError if the ReaL labels seem to be those of other images.

    Args:
        real: int64 (N, any), padded with -1. places: int64 (N,), the outputs of the images' own classes, about 90 %
            of which are among the ReaL labels.
    """
    counted = (real >= 0).any(1)
    fraction = (real == places[:, None]).any(1)[counted].mean() if counted.any() else 1.0
    if fraction < MIN_OWN_AMONG_REAL:
        raise HFViTError(
            f"the ReaL labels name the images' own class in {fraction:.0%} of {int(counted.sum()):,} cases (about "
            "90 % is usual): images or outputs are not in ImageNet's order"
        )
