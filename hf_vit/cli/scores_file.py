"""Write scores of many images to a file while they are computed: CSV, JSON lines or parquet.

Rows are appended to `NAME.partial`, which is renamed once it is complete. A killed run continues after the rows of
`NAME.partial` (CSV and JSON lines; parquet is readable only after it is closed). Not pandas: it writes a whole table.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import csv
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..atomic_file import atomic_path, full_disk_is_an_error, regular_file
from ..errors import HFViTError


SUFFIXES = (".csv", ".jsonl", ".parquet")
NEEDS_PYARROW = "parquet files need pyarrow: pip install pyarrow, or write .csv or .jsonl"
PARQUET_ROWS = 4096  # in a row group


class ScoresFile:
    """A file of rows {"image", "label", "score", "error", class: score, ...}, in the order in which they are added.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`.
        class_names: a column of scores for each; the name of another column is prefixed by `score: `.
        labels: False for a regression, which has no "label" and no "score".
        ranks: number of best labels to write, as "label_2", "score_2" and so on, instead of all scores; None: all.
        resume: keep the rows of an earlier run of the same command; their images are in `done`.

    Raises:
        HFViTError: another suffix, an existing file, or an earlier run with other columns.
    """

    def __init__(
        self,
        path: str | Path,
        class_names: Sequence[str],
        resume: bool = False,
        labels: bool = True,
        ranks: int | None = None,
    ):
        self.path = regular_file(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.kind = check_suffix(self.path)
        self.leading = ("image", "label", "score", "error") if labels else ("image", "error")
        if ranks is None:
            self.scores = [f"score: {name}" if name in self.leading else name for name in class_names]
        else:
            self.scores = [f"{what}_{rank}" for rank in range(2, ranks + 1) for what in ("label", "score")]
        self.ranked = ranks is not None
        self.columns = [*self.leading, *self.scores]
        self.done: set[str] = set()
        if self.path.exists() and not resume:
            raise HFViTError(f"{self.path} exists: remove it, give another name, or add images to it with --resume")
        if resume and self.kind == ".parquet":
            raise HFViTError("--resume needs a .csv or .jsonl file: parquet is readable only once it is complete")
        if not self.path.parent.is_dir():
            raise HFViTError(f"no folder {self.path.parent} for {self.path.name}: make it first")
        if resume:
            self.done = self._keep_whole_rows()
        self._waiting: list[tuple[dict[str, Any], Any]] = []  # parquet's rows, and float32 (K,) scores or other labels
        self._parquet: Any = None
        with full_disk_is_an_error(self.partial):
            self._file = None if self.kind == ".parquet" else self.partial.open("a", encoding="utf-8", newline="")
            if self.kind == ".csv" and not self.done and self._file is not None and not self._file.tell():
                csv.writer(self._file).writerow(self.columns)

    def add(
        self, rows: Iterable[tuple[str, str, float, Sequence[Any]]], errors: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Append (image, label, score, score of each class) and (image, reason why it could not be read).

        Of ranks, the last of a row are the labels and scores from the second on, as many as there are.
        """
        leading = self.leading
        table: list[tuple[dict[str, Any], Sequence[Any] | None]] = []
        for image, label, score, scores in rows:
            cells = {"image": image, "label": label, "score": score, "error": None}
            if self.ranked:
                scores = [*scores, *[None] * (len(self.scores) - len(scores))]
            table.append(({name: cells[name] for name in leading}, scores))
        table += [(dict.fromkeys(leading) | {"image": image, "error": why}, None) for image, why in errors]
        with full_disk_is_an_error(self.partial, "free some space and run the command again with --resume"):
            if self._file is None:
                kept = list if self.ranked else functools.partial(np.asarray, dtype=np.float32)
                self._waiting += [(row, None if s is None else kept(s)) for row, s in table]
                if len(self._waiting) >= PARQUET_ROWS:
                    self._write_parquet()
                return
            nothing = [None] * len(self.scores)
            text = [row | dict(zip(self.scores, nothing if s is None else s, strict=True)) for row, s in table]
            self._write_text(self._file, text)
            self._file.flush()

    def __enter__(self) -> "ScoresFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; the file takes its name unless an error interrupts."""
        with full_disk_is_an_error(self.partial):
            if self._file is None:
                if kind is None:
                    self._write_parquet()
                if self._parquet is not None:
                    self._parquet.close()
            else:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            if kind is None:
                os.replace(self.partial, self.path)

    def _keep_whole_rows(self) -> set[str]:
        """Keep the rows of an earlier run, and return their images.

        Rows of unreadable images, and a last row that was cut off, are removed: these images are tried again.
        """
        if not self.partial.exists():
            if not self.path.exists():
                return set()
            os.replace(self.path, self.partial)  # add images to a complete file
        done: set[str] = set()
        with (
            atomic_path(self.partial) as temporary,
            open(self.partial, encoding="utf-8", newline="") as old,
            open(temporary, "w", encoding="utf-8", newline="") as new,
        ):
            for row in self._rows_of(old):
                if row["error"]:
                    continue
                if not done and self.kind == ".csv":
                    csv.writer(new).writerow(self.columns)
                done.add(row["image"])
                self._write_text(new, [row])
        return done

    def _rows_of(self, file: TextIO) -> Iterator[dict[str, Any]]:
        """Yield the complete rows of an earlier run."""
        if self.kind == ".csv":
            reader = csv.DictReader(file)
            self._check_columns(reader.fieldnames or self.columns)
            rows = (row for row in reader if None not in row.values() and None not in row)
            if ends_with_a_line_break(self.partial):
                yield from rows
            else:  # the last number of the last row may be cut off, such as 0.1 of 0.123
                yield from (row for row, _ in pairwise(rows))
            return
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise HFViTError(f"{self.partial} is damaged ({error}): remove it and start again") from None
            self._check_columns(list(row))
            yield row

    def _check_columns(self, columns: Sequence[str]) -> None:
        if list(columns) != self.columns:
            raise HFViTError(
                f"{self.partial} has the columns of another model or --top-k: remove it or give another name"
            )

    def _write_text(self, file: TextIO, rows: list[dict[str, Any]]) -> None:
        if self.kind == ".csv":
            csv.DictWriter(file, self.columns).writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _write_parquet(self) -> None:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise HFViTError(NEEDS_PYARROW) from None
        text = {"image", "label", "error", *(self.scores[::2] if self.ranked else ())}
        schema = pa.schema([(name, pa.string() if name in text else pa.float32()) for name in self.columns])
        if self._parquet is None:
            self._parquet = parquet.ParquetWriter(self.partial, schema)
        rows = [row for row, _ in self._waiting]
        missing = np.array([scores is None for _, scores in self._waiting], dtype=bool)
        arrays = [
            pa.array([row[name] for row in rows], schema.field(index).type) for index, name in enumerate(self.leading)
        ]
        if self.ranked:
            cells = [[None] * len(self.scores) if row is None else row for _, row in self._waiting]
            for index, name in enumerate(self.scores):
                arrays.append(pa.array([row[index] for row in cells], schema.field(name).type))
        else:
            scores = np.zeros((len(self.scores), len(rows)), dtype=np.float32)  # lists take ten times the memory
            for number, (_, row_scores) in enumerate(self._waiting):
                if row_scores is not None:
                    scores[:, number] = row_scores
            arrays += [pa.array(column, mask=missing) for column in scores]
        self._waiting = []
        self._parquet.write_table(pa.Table.from_arrays(arrays, schema=schema))


def ends_with_a_line_break(path: Path) -> bool:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def check_suffix(path: Path) -> str:
    """The suffix of an output file; HFViTError if it is not supported, or pyarrow is missing for `.parquet`."""
    if path.suffix not in SUFFIXES:
        raise HFViTError(f"{path}: write to a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise HFViTError(NEEDS_PYARROW) from None
    return path.suffix
