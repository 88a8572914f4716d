"""Read tables that list images: CSV, TSV, JSON lines and parquet as columns, and find the column of the images.

For training and the commands. Not `datasets.load_dataset("csv")`: it guesses types ("007" becomes 7), and its errors
do not name the line.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from .errors import HFViTError, listed
from .image_io import SUFFIXES


SUFFIXES_OF_TABLES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = (
    "file_name", "filename", "file", "path", "filepath", "file_path", "image", "image_path", "img", "img_path",
    "images",
)  # fmt: skip
URL_COLUMNS = ("url", "URL", "image_url")  # if there is none of `PATH_COLUMNS`
DELIMITERS = ",;\t|"
MAX_CELL = 4096  # characters of a path


def read_rows(path: Path) -> dict[str, list[Any]]:
    """The columns of a table by name; cells of CSV and TSV are text, not converted.

    Raises:
        HFViTError: no rows, an encoding other than UTF-8 or a damaged line, with the line's number.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pydict()
        text = decoded(path, path.read_bytes())
    except HFViTError:
        raise
    except Exception as error:  # pyarrow's own errors for a file that is not parquet
        raise HFViTError(f"cannot read '{path}' ({' '.join(str(error).split())[:300]})") from error
    rows = json_rows(path, text) if path.suffix == ".jsonl" else csv_rows(path, text)
    if not rows or not next(iter(rows.values())):
        raise HFViTError(f"'{path}' has no rows")
    return rows


def decoded(path: Path, data: bytes) -> str:
    """The text of a table, without a byte order mark; an error names an encoding that works if it is not UTF-8."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    if b"\0" in data:  # never in UTF-8, but every second byte of most text in UTF-16
        return decoded_without_mark(path, data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        encoding = next(name for name in ("cp1252", "latin-1") if decodes(data, name))
        raise HFViTError(
            f"'{path}' is not UTF-8 (line {line}); it can be read as {encoding}: convert it with "
            f"`iconv -f {encoding} -t utf-8`"
        ) from error


def decoded_without_mark(path: Path, data: bytes) -> str:
    """Text in UTF-16 without a byte order mark."""
    for encoding, zeros in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        if zeros.count(0) > len(zeros) / 2 and decodes(data, encoding):
            return data.decode(encoding)
    raise HFViTError(f"'{path}' is no table of text (it has bytes of 0): give a CSV, TSV or JSON lines file in UTF-8")


def decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def csv_rows(path: Path, text: str) -> dict[str, list[Any]]:
    header = text.partition("\n")[0]
    delimiter = "\t" if path.suffix == ".tsv" else max(DELIMITERS, key=header.count)
    csv.field_size_limit(1 << 24)  # cells may hold images as text, which are refused later
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = [name.strip() for name in next(reader, [])]
        if any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names):
            raise HFViTError(
                f"'{path}' has no header: its first line is an image; put a line such as file,label there"
            )
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise HFViTError(f"'{path}' has columns of the same name: {listed(repeated)}")
        rows: list[list[str]] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise HFViTError(f"'{path}', line {reader.line_num}: {len(row)} cells, the header has {len(names)}")
            rows.append(row)
    except csv.Error as error:
        raise HFViTError(f"'{path}', line {reader.line_num}: {error}") from error
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


def json_rows(path: Path, text: str) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HFViTError(f"'{path}', line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise HFViTError(f"'{path}', line {number} is not an object with a key for each column")
        rows.append(row)
    names = list(dict.fromkeys(key for row in rows for key in row))
    return {name: [row.get(name) for row in rows] for name in names}


def path_column(name: str, rows: dict[str, list[Any]], requested: str | None) -> str:
    """The column of paths: the requested one, or the only one with a usual name."""
    if requested is not None:
        if requested not in rows:
            raise HFViTError(f"'{name}' has no column '{requested}'; its columns are {listed(list(rows))}")
        return requested
    candidates = [column for column in PATH_COLUMNS if column in rows]
    candidates = candidates or [column for column in URL_COLUMNS if column in rows]
    if len(candidates) != 1:
        problem = f"no column of images among {listed(list(rows))}"
        if candidates:
            problem = f"several columns that could hold the images, {listed(candidates)}"
        raise HFViTError(f"'{name}' has {problem}; choose one with --image_column")
    return candidates[0]
