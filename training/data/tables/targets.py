"""Labels other than one class per image: several labels (multi-label), or numbers (regression).

For path_tables.py, arrow_tables.py and in_memory.py; columns.py reads one class per image. Several labels are bool (n,
K), numbers float32 (n, K), classes int64 (n,), so that the array alone tells the problem type.

Tests: tests/training/test_problem_types.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError, listed
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

from ..sources import Columns
from .columns import refuse_ids


Cells = Mapping[str, Sequence[Any]]  # values by column
YES, NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
SEPARATORS = ("|", ";", ",")
DOUBTFUL_SEPARATORS = ("|", ";")  # class names have commas: "tench, Tinca tinca"
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
HALF = 0.5


def read_targets(
    name: str, cells: Cells, columns: Columns, one_class: Callable[[], tuple[np.ndarray, list[str]]]
) -> tuple[np.ndarray, list[str]]:
    """Labels of all rows, by `columns.problem_type` or a guess from the cells.

    Args:
        cells: of the columns of labels; numbers of a ClassLabel as their names.
        one_class: reads the only column as one class per image.

    Returns:
        int64 (n,), bool (n, K) or float32 (n, K), and the names of the classes, labels or numbers.

    Raises:
        HFViTError: cells that do not fit the problem type, or are ambiguous.
    """
    problem = columns.problem_type or guess(name, cells, columns.separator)
    if columns.separator is not None and problem != MULTI_LABEL:
        raise HFViTError(f"--label_separator is for several labels of an image, not for --problem_type {problem}")
    if problem == SINGLE_LABEL:
        if len(cells) > 1:
            raise HFViTError(f"--problem_type {problem} reads one column: --label_column names {listed(list(cells))}")
        return one_class()
    if problem == REGRESSION:
        return numbers(name, cells, columns.label_names)
    return several_labels(name, cells, columns)


def guess(name: str, cells: Cells, separator: str | None) -> str:
    """The problem type that the cells imply.

    Raises:
        HFViTError: they are ambiguous.
    """
    if separator is not None:
        return MULTI_LABEL
    if len(cells) > 1:
        return guess_of_columns(name, cells)
    ((column, values),) = cells.items()
    filled = [value for value in values if not is_empty(value)]
    if filled and all(is_list(value) for value in filled):
        items = [item for value in filled for item in value]
        return (
            REGRESSION
            if items and all(is_number(i) for i in items) and any(i != int(i) for i in items)
            else MULTI_LABEL
        )
    parsed = [as_float(value) for value in filled]
    if filled and None not in parsed:
        fractions = [number for number in parsed if number is not None and not float(number).is_integer()]
        if fractions and all(map(math.isfinite, fractions)) and len(fractions) < HALF * len(filled):
            raise HFViTError(
                f"column '{column}' of '{name}' holds {len(fractions):,} fractions, such as {fractions[0]:g}, among "
                f"{len(filled):,} numbers: give --problem_type {REGRESSION} if these are measurements, correct them "
                "if they are classes"
            )
        return REGRESSION if fractions else SINGLE_LABEL
    if filled and all(isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()) for value in filled):
        raise HFViTError(
            f"column '{column}' of '{name}' holds {filled[0].strip()!r}: write decimals with a point if these are "
            "numbers, give --label_separator ',' if they are several labels"
        )
    for mark in DOUBTFUL_SEPARATORS:
        split = [value for value in filled if isinstance(value, str) and mark in value]
        parts = {part.strip() for value in filled if isinstance(value, str) for part in value.split(mark)}
        alone = {value for value in filled if isinstance(value, str) and mark not in value}
        if split and (
            len(parts) < len(set(map(str, filled))) or any(p.strip() in alone for v in split for p in v.split(mark))
        ):
            raise HFViTError(
                f"column '{column}' of '{name}' has '{mark}' in {len(split):,} of {len(filled):,} labels, such as "
                f"{split[0][:60]!r}: give --label_separator '{mark}' if these are several labels, "
                f"--problem_type {SINGLE_LABEL} if they are names"
            )
    return SINGLE_LABEL


def guess_of_columns(name: str, cells: Cells) -> str:
    """The problem type of several columns: one per label (0 or 1), or one per number."""
    marks = [[as_mark(value) for value in values] for values in cells.values()]
    if all(None not in column for column in marks):
        per_row = [sum(map(bool, row)) for row in zip(*marks)]
        if all(count == 1 for count in per_row):
            raise HFViTError(
                f"each row of '{name}' has one 1 among {listed(list(cells))}: give --problem_type {MULTI_LABEL} if an "
                "image may have several labels or none, else a column with the name of its class"
            )
        return MULTI_LABEL
    filled = [value for values in cells.values() for value in values if not is_empty(value)]
    if all(as_float(value) is not None for value in filled):
        return REGRESSION
    raise HFViTError(
        f"columns {listed(list(cells))} of '{name}' hold {first_bad(cells, as_float)}: several columns of labels hold "
        "0 or 1 (one column a label) or numbers (regression); choose one column with --label_column otherwise"
    )


# -- several labels ------------------------------------------------------------------------------------------------


def several_labels(name: str, cells: Cells, columns: Columns) -> tuple[np.ndarray, list[str]]:
    """bool (n, K) from one column per label, lists, or text with a separator; an empty cell has no label."""
    ((column, values),) = list(cells.items())[:1]
    filled = [value for value in values if not is_empty(value)]
    if columns.separator is not None and len(cells) > 1:
        raise HFViTError(f"--label_separator splits one column: --label_column names {listed(list(cells))}")
    if len(cells) > 1 or (columns.separator is None and filled and all(as_mark(v) is not None for v in filled)):
        return columns_of_marks(name, cells, columns.label_names)
    if filled and all(is_list(value) for value in filled):
        rows = [[] if is_empty(value) else list(value) for value in values]
    elif all(isinstance(value, str) for value in filled):
        rows = split_cells(name, column, values, columns.separator)
    else:
        raise HFViTError(
            f"column '{column}' of '{name}' holds {type(filled[0]).__name__} and no labels: lists, text with "
            "--label_separator, or one column of 0 and 1 for each label are read"
        )
    return marks_of_lists(name, column, rows, columns.label_names)


def columns_of_marks(name: str, cells: Cells, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """bool (n, K) from one column per label, of 0 and 1 or true and false; an empty cell is 0."""
    columns = list(cells)
    if names is not None and set(names) != set(columns):
        raise HFViTError(
            f"'{name}' has columns for the labels {listed(columns)}; those of training are {listed(names)}"
        )
    if any(as_mark(value) is None for values in cells.values() for value in values):
        raise HFViTError(f"'{name}' holds {first_bad(cells, as_mark)}: each column is one label, of 0 or 1")
    requested = columns if names is None else list(names)
    return np.array([[bool(as_mark(value)) for value in cells[column]] for column in requested]).T, requested


def split_cells(name: str, column: str, values: Sequence[Any], separator: str | None) -> list[list[str]]:
    """The labels of each cell of text."""
    texts = ["" if is_empty(value) else value for value in values]
    filled = sum(bool(text) for text in texts)
    used = [mark for mark in SEPARATORS if sum(mark in text for text in texts) > HALF * filled]
    if separator is None:
        first = next((text for text in texts if text), "")
        likely = f"--label_separator '{used[0] if used else SEPARATORS[0]}'"
        raise HFViTError(
            f"column '{column}' of '{name}' holds text, such as {first[:60]!r}, and nothing says what separates its "
            f"labels: give it, as in {likely}"
        )
    if filled and not any(separator in text for text in texts) and used:
        raise HFViTError(
            f"--label_separator {separator!r} is in no cell of column '{column}' of '{name}', and '{used[0]}' is in "
            f"most: give --label_separator '{used[0]}'"
        )
    return [[part.strip() for part in text.split(separator) if part.strip()] for text in texts]


def marks_of_lists(
    name: str, column: str, rows: Sequence[Sequence[Any]], names: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """bool (n, K) from lists of labels, which are text, or whole numbers that serve as names."""
    items = [item for row in rows for item in row]
    if items and all(is_number(item) for item in items):
        if any(item != int(item) for item in items):
            raise HFViTError(f"column '{column}' of '{name}' holds lists of fractions, which are no labels")
        lengths, repeated = {len(row) for row in rows}, any(len(set(row)) < len(row) for row in rows)
        if repeated and len(lengths) == 1 and set(items) <= {0, 1}:
            raise HFViTError(
                f"column '{column}' of '{name}' holds lists of 0 and 1 without names for the labels: give one column "
                "for each label, or lists of their names"
            )
        rows = [[str(int(item)) for item in row] for row in rows]
        numbers = [str(number) for number in sorted({int(item) for item in items})]
    elif all(isinstance(item, str) for item in items):
        numbers = sorted(set(items))
        blank = sum(not item.strip() for item in items)
        if blank:
            raise HFViTError(f"{blank} labels in column '{column}' of '{name}' are empty text: remove or name them")
    else:
        kinds = listed(sorted({type(item).__name__ for item in items}))
        raise HFViTError(f"column '{column}' of '{name}' holds lists of {kinds}: labels are all text or all numbers")
    if not numbers:
        raise HFViTError(f"column '{column}' of '{name}' is empty: no row has a label")
    refuse_ids(name, column, len(numbers), len(rows), names)
    requested = numbers if names is None else list(names)
    number_of = {label: number for number, label in enumerate(requested)}
    unknown = [label for label in numbers if label not in number_of]
    if unknown:
        raise HFViTError(
            f"column '{column}' of '{name}' has labels that the model does not know: {listed(unknown)}; known are "
            f"{listed(requested)}"
        )
    marks = np.zeros((len(rows), len(requested)), dtype=bool)
    for row, labels in enumerate(rows):
        marks[row, [number_of[label] for label in labels]] = True
    return marks, requested


# -- numbers -------------------------------------------------------------------------------------------------------


def numbers(name: str, cells: Cells, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """float32 (n, K) from one column per number, or one column of lists of K numbers."""
    ((column, values),) = list(cells.items())[:1]
    if len(cells) == 1 and any(is_list(value) for value in values):
        cells = columns_of_lists(name, column, values)
    columns = list(cells)
    if names is not None and set(names) != set(columns):
        raise HFViTError(f"'{name}' has the numbers {listed(columns)}; those of training are {listed(list(names))}")
    requested = columns if names is None else list(names)
    return np.stack([column_of_numbers(name, key, cells[key]) for key in requested], axis=1), requested


def columns_of_lists(name: str, column: str, values: Sequence[Any]) -> dict[str, list[Any]]:
    """A column of lists of K numbers as K columns, COLUMN 1, COLUMN 2, ..."""
    lengths = {len(value) if is_list(value) else 0 for value in values}
    if len(lengths) > 1 or lengths == {0}:
        raise HFViTError(
            f"column '{column}' of '{name}' has lists of {listed(sorted(lengths))} numbers: all rows need equally many"
        )
    return {f"{column} {index + 1}": [value[index] for value in values] for index in range(lengths.pop())}


def column_of_numbers(name: str, column: str, values: Sequence[Any]) -> np.ndarray:
    """A column as float32 (n,).

    Raises:
        HFViTError: a row without a finite number.
    """
    missing = [row for row, value in enumerate(values) if is_empty(value)]
    if missing:
        raise HFViTError(
            f"{len(missing):,} of {len(values):,} rows of '{name}' have no number in column '{column}' (the first is "
            f"row {missing[0] + 1}); remove or fill them"
        )
    numbers = [as_float(value) for value in values]
    bad = [row for row, number in enumerate(numbers) if number is None]
    if bad:
        text = str(values[bad[0]])[:60]
        decimal = ", with a point for decimals" if as_float(text.replace(",", ".")) is not None else ""
        raise HFViTError(
            f"column '{column}' of '{name}' holds {text!r} in row {bad[0] + 1}, which is no number; {len(bad):,} of "
            f"{len(values):,} rows are none: a regression needs numbers{decimal}"
        )
    with np.errstate(over="ignore"):
        array = np.array(numbers, dtype=np.float64).astype(np.float32)
    infinite = np.flatnonzero(~np.isfinite(array))
    if len(infinite):
        raise HFViTError(
            f"{len(infinite):,} of {len(values):,} rows of '{name}' have no finite number in column '{column}' (the "
            f"first is row {infinite[0] + 1}: {str(values[infinite[0]])[:60]}); remove or correct them"
        )
    return array


def target_scale(dataset: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, (K,) each, of the numbers of a training set.

    Raises:
        HFViTError: a number that is the same for all images.
    """
    values = dataset.labels.astype(np.float64)
    mean, std = values.mean(axis=0), values.std(axis=0)
    constant = [name for name, spread in zip(dataset.label_names, std) if not spread > 0]
    if constant:
        raise HFViTError(
            f"{listed(constant)} is the same number for all {len(values):,} training images of '{dataset.name}': "
            "leave it out of --label_column"
        )
    return mean.tolist(), std.tolist()


# -- cells ---------------------------------------------------------------------------------------------------------


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def is_empty(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, blank text."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def as_float(value: Any) -> float | None:
    """The value of a number, or of text that is one; None otherwise."""
    if is_number(value):
        return float(value)
    if not isinstance(value, str) or "_" in value:  # Python reads 1_000 as a number; in a table it is a name
        return None
    try:
        return float(value)
    except ValueError:
        return None


def as_mark(value: Any) -> bool | None:
    """A cell of 0 or 1, true or false, as a bool, empty as False; None for anything else."""
    if is_list(value):
        return None
    text = "" if is_empty(value) else str(value).strip().lower()
    return False if not text or text in NO else True if text in YES else None


def first_bad(cells: Cells, reads: Callable[[Any], Any]) -> str:
    """The first cell that `reads` cannot read, with its column and row."""
    for column, values in cells.items():
        for row, value in enumerate(values):
            if not (reads is as_float and is_empty(value)) and reads(value) is None:
                return f"{str(value)[:60]!r} in column '{column}', row {row + 1}"
    return "nothing"
