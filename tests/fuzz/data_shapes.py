"""Folders, tables and shards as people have them, and as nobody should: what becomes of each.

    python -m tests.fuzz.data_shapes [--count 60]

Every kind is drawn from its pieces by number. Data may open, with every image under the class that its own content
tells, or be refused as HFViTError in one line of bearable length. It must never give an image another class, leave
images out without a note, end in another exception, or hang.
"""

import contextlib
import io
import json
import random
import tarfile
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError
from tests.fuzz.command import report
from tests.fuzz.time_limit import Hang, start_clock, stop_clock
from training.config.arguments import DataArguments
from training.data.dataset import ImageDataset
from training.data.splits import open_splits


SECONDS = 60
CLASSES = ("cat", "dog", "emu")
ODD_CLASSES = (
    ("ä ö", "b'c", "100%"),
    ("猫", "犬", "鳥"),
    ("1", "2", "10"),
    ("train", "car", "bus"),
    ("a.b", "c[d]", "{e}"),
)
SPLITS = (("train", "val"), ("training", "test"), ("training_set", "test_set"), ("Train", "Validation"), ("train", ""),
          ("", ""), ("train_images", "val_images"), ("train", "evaluation"))  # fmt: skip


def encoded(label: int, format: str = "PNG") -> bytes:
    """An image whose brightness is that of its class."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 60 * label + 20, np.uint8)).save(buffer, format)
    return buffer.getvalue()


def folder(rng: random.Random, root: Path) -> list[str]:
    """Class folders with a few oddities; returns what the classes are called."""
    names = rng.choice((CLASSES, CLASSES, *ODD_CLASSES))
    wrap = rng.choice(("", "", "data", "a/b"))
    for place, split in enumerate(rng.choice(SPLITS)):
        if place and not split:
            continue
        for label, name in enumerate(names):
            where = root / wrap / split / name / rng.choice(("", "", "deep", "deep/er"))
            where.mkdir(parents=True, exist_ok=True)
            for number in range(rng.randrange(4, 9)):
                suffix, format = rng.choice((("png", "PNG"), ("JPG", "JPEG"), ("jfif", "JPEG"), ("", "PNG")))
                file = where / (f"{place}{number}.{suffix}" if suffix else f"{place}{number}")
                file.write_bytes(encoded(label, format))
            oddities(rng, where, root)
    return list(names)


def oddities(rng: random.Random, where: Path, root: Path) -> None:
    for kind in rng.sample(range(9), rng.randrange(4)):
        with contextlib.suppress(FileExistsError):
            if kind == 0:
                (where / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
            elif kind == 1:
                (where / "._0.png").write_bytes(b"\0\5\x16\7")
            elif kind == 2:
                (where / "gone.png").symlink_to("/nowhere.png")
            elif kind == 3:
                (where / "up").symlink_to("..")
            elif kind == 4:
                (where / "new.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
            elif kind == 5:
                (root / "__MACOSX").mkdir(exist_ok=True)
                (root / "__MACOSX" / "x.png").write_bytes(b"x")
            elif kind == 6:
                (root / "notes.txt").write_text("x")
            elif kind == 7:
                (root / "left.zip").write_bytes(b"PK\3\4")
            else:
                (where / ".hidden").mkdir()


def table(rng: random.Random, root: Path) -> list[str]:
    """A table of paths, with what may be wrong in it."""
    names = list(rng.choice((CLASSES, CLASSES, *ODD_CLASSES)))
    kind = rng.choice(("names", "names", "numbers", "from one", "bools"))
    rows = []
    for number in range(rng.randrange(8, 20)):
        label = number % (2 if kind == "bools" else 3)
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / f"{number}.png").write_bytes(encoded(label))
        values = {"names": names[label], "numbers": label, "from one": label + 1, "bools": bool(label)}
        rows.append([f"images/{number}.png", values[kind]])
    columns = ["file", rng.choice(("label", "class", "kind"))]
    damage = rng.randrange(8)
    if damage == 0:
        rows[0][1] = None
    elif damage == 1:
        rows[1][0] = "images/gone.png"
    elif damage == 2 and kind in ("numbers", "from one"):
        rows[2][1] = 2.5
    elif damage == 3:
        rows[3][0] = ""
    suffix = rng.choice((".csv", ".tsv", ".jsonl"))
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row))) for row in rows]
    else:
        mark = "\t" if suffix == ".tsv" else rng.choice(",;")
        lines = [mark.join(columns), *(mark.join("" if cell is None else str(cell) for cell in row) for row in rows)]
    if damage == 4:
        lines[2] = lines[2][: len(lines[2]) // 2]
    text = "\n".join(lines)
    (root / f"table{suffix}").write_bytes(text.encode("cp1252", "replace") if damage == 5 else text.encode())
    if kind == "names":
        return names
    return {"numbers": ["0", "1", "2"], "from one": ["1", "2", "3"], "bools": ["False", "True"]}[kind]


def shards(rng: random.Random, root: Path) -> list[str]:
    """Tar shards of records, with what may be wrong in one."""
    names = list(rng.choice((CLASSES, ("1", "2", "10"), ("00", "01", "02"))))
    kind = rng.choice(("cls", "json", "number", "both"))
    damage = rng.randrange(8)
    with tarfile.open(root / "train-000.tar", "w") as tar:
        for number in range(12):
            label = number % 3
            content = {
                "cls": names[label], "json": json.dumps({"label": names[label]}), "number": str(label),
                "both": json.dumps({"label": label, "class_name": names[label]}),
            }[kind].encode()  # fmt: skip
            if number == 5:
                broken = {0: b"{oh", 1: b"[1]", 2: b"caf\xe9", 3: b""}.get(damage, content)
                content = broken if kind in ("json", "both") or damage in (2, 3) else content
            suffix = "json" if kind in ("json", "both") else "cls"
            members = [(f"{number:04d}.png", encoded(label)), (f"{number:04d}.{suffix}", content)]
            if damage == 4 and number == 7:
                members = members[1:]
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if damage == 5:
        file = root / "train-000.tar"
        file.write_bytes(file.read_bytes()[:5000])
    return ["0", "1", "2"] if kind == "number" else names


KINDS = {"folder": folder, "table": table, "shards": shards}


def wrong_label(data: ImageDataset, names: list[str]) -> str | None:
    """The first image that stands under another class than its brightness tells."""
    for index in range(len(data)):
        try:
            image, label, name = data.read(index)
        except HFViTError:
            continue
        true = round((int(np.asarray(image)[0, 0, 0]) - 20) / 60)
        if data.label_names[label] != names[true]:
            return f"{name} is {names[true]}, read as {data.label_names[label]}"
    return None


def outcome(kind: str, number: int, root: Path) -> str:
    """What becomes of one set of data."""
    rng = random.Random(f"{kind} {number}")
    names = KINDS[kind](rng, root)
    options = {}
    tables = list(root.glob("table.*"))
    if tables and "kind" in tables[0].read_bytes().decode("latin-1"):
        options = {"label_column": "kind"}
    start_clock(SECONDS)
    try:
        found = open_splits(DataArguments(dataset=str(root), cache_dir=str(root / ".cache"), **options), 0, str)
        for data in (found.train, found.evaluation):
            if (wrong := wrong_label(data, names)) is not None:
                return f"silently wrong: {wrong}"
        return "read"
    except HFViTError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"refused badly: {error}"
    except Hang:
        return "hang"
    except Exception as error:
        return f"traceback {type(error).__name__}: {error}"[:300]
    finally:
        stop_clock()


def run(count: int, root: Path) -> tuple[Counter, list[str]]:
    """Outcomes of so many sets of each kind, and a line for each that must not be."""
    outcomes: Counter = Counter()
    bad = []
    for kind in KINDS:
        for number in range(count):
            place = root / f"{kind}{number}"
            place.mkdir()
            found = outcome(kind, number, place)
            outcomes[f"{kind} {found.partition(':')[0]}"] += 1
            if found not in ("read", "refused"):
                bad.append(f"{kind} {number}: {found}")
    return outcomes, bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report(__doc__, partial(run, root=Path(folder)), count=60)
