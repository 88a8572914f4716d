"""Tables that list images: CSV, TSV, JSON lines, parquet, metadata of an imagefolder, and what Python holds.

python -m pytest tests/training/data/tables/test_path_tables.py
"""

import base64
import io
import json

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import UnreadableImage
from training.config.arguments import DataArguments
from training.data.dataset import open_dataset
from training.data.splits import open_splits


def image(number):
    return Image.fromarray(np.full((6, 8, 3), 10 * number, np.uint8))


def png(number):
    buffer = io.BytesIO()
    image(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    """Twelve images in two folders whose names are no classes, every third one of another class."""
    for number in range(12):
        path = tmp_path / "images" / f"batch{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(path)
    return tmp_path / "images"


def rows(**more):
    table = {
        "file": [f"batch{n % 2}/{n}.png" for n in range(12)],
        "kind": [("rose", "tulip", "lily")[n % 3] for n in range(12)],
    }
    return table | more


def check(data, names=("lily", "rose", "tulip"), count=12):
    assert data.label_names == list(names) and len(data) == count
    for index in range(count):
        opened, label, _ = data.read(index)
        number = int(np.asarray(opened)[0, 0, 0]) // 10
        assert data.label_names[label] == rows()["kind"][number]


def write(path, table):
    frame = pd.DataFrame(table)
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_of_paths(images, suffix, tmp_path):
    path = write(images / f"table{suffix}", rows())
    check(open_dataset(str(path), image_column="file", label_column="kind", cache_dir=tmp_path / "cache"))
    away = write(tmp_path / f"table{suffix}", rows())
    options = {"image_column": "file", "label_column": "kind", "cache_dir": tmp_path / "cache"}
    check(open_dataset(str(away), image_root=images, **options))


def test_columns_of_usual_names_delimiters_and_marks(images):
    (images / "table.csv").write_bytes("\ufefffile_name;label\nbatch0/0.png;rose\nbatch1/1.png;tulip\n".encode())
    data = open_dataset(str(images / "table.csv"))
    assert data.label_names == ["rose", "tulip"] and data.read(0)[2] == "batch0/0.png"


def test_a_split_column_and_a_table_a_split(images):
    path = write(images / "all.csv", rows(split=["train"] * 8 + ["dev"] * 4))
    data = DataArguments(dataset=str(path), image_column="file", label_column="kind")
    found = open_splits(data, 0, lambda text: None)
    assert (len(found.train), len(found.evaluation), found.evaluation.split) == (8, 4, "validation")
    table = rows()
    train = write(images / "a.csv", {key: values[:9] for key, values in table.items()})
    held = write(images / "b.csv", {"file": table["file"][9:11], "kind": table["kind"][9:11]})
    data = DataArguments(train_file=str(train), eval_file=str(held), image_column="file", label_column="kind")
    found = open_splits(data, 0, lambda text: None)
    assert (len(found.train), len(found.evaluation)) == (9, 2)
    assert found.evaluation.label_names == found.train.label_names == ["lily", "rose", "tulip"]
    folder = images / "tables"
    folder.mkdir()
    write(folder / "train.csv", {"file": [f"../{f}" for f in table["file"]], "label": table["kind"]})
    write(folder / "test.csv", {"file": ["../batch0/0.png"], "label": ["rose"]})
    assert len(open_splits(DataArguments(dataset=str(folder)), 0, lambda text: None).evaluation) == 1


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame", "Dataset"])
def test_a_named_split_column(images, kind, tmp_path):
    table = rows(part=["fit"] * 6 + ["Test"] * 4 + ["", None])
    options = {"image_column": "file", "label_column": "kind", "split_column": "part", "cache_dir": tmp_path / "cache"}
    data = {"frame": pd.DataFrame(table), "Dataset": datasets.Dataset.from_dict(table)}.get(kind)
    if data is None:
        data = str(write(images / f"t.{kind}", table))
    else:
        options["image_root"] = images
    said = []
    train = open_dataset(data, split="fit", log=said.append, **options)
    check(train, count=6)
    test = open_dataset(data, split="Test", label_names=train.label_names, **options)
    assert len(test) == 4 and int(np.asarray(test.read(0)[0])[0, 0, 0]) == 60
    assert said[0] == "splits by the column 'part': fit (6), Test (4)"
    assert "left out: 2 rows" in said[1] and "without a split in column 'part'" in said[1]
    for wrong, message in (
        (options | {"split_column": "parts"}, "has no column 'parts'"),
        (options, "no split 'train'"),
    ):
        with pytest.raises(HFViTError, match=message):
            open_dataset(data, **wrong)
    usual = table | {"part": ["training"] * 8 + ["val"] * 4}
    data = pd.DataFrame(usual) if kind == "frame" else datasets.Dataset.from_dict(usual) if kind == "Dataset" else data
    if kind in ("csv", "parquet"):
        write(images / f"t.{kind}", usual)
    named = DataArguments(dataset=data, image_column="file", label_column="kind", split_column="part",
                          image_root=str(images), cache_dir=str(tmp_path / "cache"))  # fmt: skip
    found = open_splits(named, 0, lambda text: None)
    assert (len(found.train), len(found.evaluation), found.evaluation.split) == (8, 4, "validation")


def test_split_columns_and_roots_where_there_is_no_table(images, tmp_path):
    for option, value, message in (
        ("split_column", "part", "leave out --split_column"),
        ("image_root", "x", "leave out --image_root"),
    ):
        for data in (str(images), "digits"):
            with pytest.raises(HFViTError, match=message):
                open_dataset(data, **{option: value})
    two = datasets.DatasetDict(dict.fromkeys(("train", "test"), datasets.Dataset.from_dict(rows())))
    with pytest.raises(HFViTError, match="has the splits train, test already: leave out --split_column"):
        open_dataset(two, split_column="kind")


def test_metadata_of_an_imagefolder(images):
    """Images in batch folders, labels in metadata.csv: as `datasets` reads it."""
    for split in ("train", "test"):
        (images / split).mkdir()
        for batch in ("batch0", "batch1"):
            (images / split / batch).symlink_to(images / batch) if split == "train" else None
    for batch in ("batch0", "batch1"):
        (images / batch).rename(images / "train" / f"{batch}.d")
        (images / "train" / batch).unlink()
        (images / "train" / f"{batch}.d").rename(images / "train" / batch)
    image(1).save(images / "test" / "x.png")
    table = rows()
    write(images / "train" / "metadata.csv", {"file_name": table["file"], "label": table["kind"]})
    write(images / "test" / "metadata.jsonl", {"file_name": ["x.png"], "label": ["tulip"]})
    said = []
    found = open_splits(DataArguments(dataset=str(images)), 0, said.append)
    check(found.train)
    assert len(found.evaluation) == 1 and "metadata files, not from folders" in said[0]


def test_metadata_without_labels_leaves_the_folders(images):
    write(images / "metadata.csv", {"file_name": rows()["file"], "text": ["a flower"] * 12})
    said = []
    found = open_splits(DataArguments(dataset=str(images), dev_fraction=0.2), 0, said.append)
    assert found.train.label_names == ["batch0", "batch1"]
    assert any("no column of labels among file_name, text" in text for text in said)


def test_what_save_to_disk_wrote(images, tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["lily", "rose", "tulip"])}
    )
    table = datasets.Dataset.from_dict(
        {"image": [png(n) for n in range(12)], "label": rows()["kind"]}, features=features
    )
    table.save_to_disk(str(tmp_path / "one"))
    check(open_dataset(str(tmp_path / "one")))
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    assert len(open_dataset(str(tmp_path / "two"), split="test")) == 3


def test_what_python_holds(images):
    table = rows()
    check(open_dataset(pd.DataFrame(table), image_root=images, image_column="file", label_column="kind"))
    check(open_dataset([(image(n), kind) for n, kind in enumerate(table["kind"])]))
    check(open_dataset([(images / file, kind) for file, kind in zip(table["file"], table["kind"])]))
    check(open_dataset(pd.DataFrame({"image": [png(n) for n in range(12)], "label": table["kind"]})))
    held = datasets.Dataset.from_dict({"image": [image(n) for n in range(12)], "label": table["kind"]})
    held = held.cast_column("image", datasets.Image())
    check(open_dataset(held))
    part = open_dataset(datasets.DatasetDict({"train": held, "test": held.select([5, 4])}), split="test")
    assert [part.read(0)[1], part.read(1)[1]] == [part.label_names.index(table["kind"][n]) for n in (5, 4)]
    fingerprints = {
        open_dataset([(image(n), "ab"[n % 2]) for n in numbers]).fingerprint for numbers in (range(4), range(2, 6))
    }
    assert len(fingerprints) == 2
    for value, what in ((np.zeros((6, 8, 3), np.float32), r"\(6, 8, 3\) of float32"), (3.5, "float is no image")):
        with pytest.raises(UnreadableImage, match=rf"^list\[0\]: .*{what}"):
            open_dataset([(value, "a"), (value, "b")]).read(0)
    for wrong in ([], [image(1)], 5):
        with pytest.raises(HFViTError):
            open_dataset(wrong)


@pytest.mark.parametrize("times", [1, 40], ids=["as short as a path", "longer than one"])
def test_images_as_text(times, tmp_path):
    text = [base64.b64encode(png(n) * times).decode() for n in range(2)]
    pd.DataFrame({"image": [f"data:image/png;base64,{text[0]}", text[1]], "label": ["a", "b"]}).to_parquet(
        tmp_path / "t.parquet"
    )
    data = open_dataset(str(tmp_path / "t.parquet"), cache_dir=tmp_path / "cache")
    assert [int(np.asarray(data.read(n)[0])[0, 0, 0]) for n in range(2)] == [0, 10]


def test_columns_that_hold_no_images_are_named_in_one_short_line(tmp_path):
    for values, said in (
        ([1, 2], "column 'image' of .* holds no images"),
        (["x" * 4000, "y"], "none of the 2 images"),
    ):
        pd.DataFrame({"image": values, "label": ["a", "b"]}).to_parquet(tmp_path / "t.parquet")
        with pytest.raises(HFViTError, match=said) as error:
            open_dataset(str(tmp_path / "t.parquet"), cache_dir=tmp_path / "cache")
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        ([None, "a", "b"], None, None),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
        ([10, 2, 2], ["2", "10"], [1, 0, 0]),
        (["10", "2", "2"], ["2", "10"], [1, 0, 0]),
        (["010", "2", "2"], ["010", "2"], [0, 1, 1]),
        ([1, "a", 2.5], None, None),
        ([0.5, 1.5, 2.0], ["label"], [[0.5], [1.5], [2.0]]),
        ([["a"], ["b"], []], ["a", "b"], [[True, False], [False, True], [False, False]]),
        ([{"a": 1}, 2, 3], None, None),
    ],
)
def test_labels(images, values, names, labels):
    lines = [json.dumps({"file": f"batch{n % 2}/{n}.png", "label": value}) for n, value in enumerate(values)]
    (images / "t.jsonl").write_text("\n".join(lines))
    if names is None:
        with pytest.raises(HFViTError, match=r"^1 of 3 rows of|column 'label'") as error:
            open_dataset(str(images / "t.jsonl"))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    else:
        data = open_dataset(str(images / "t.jsonl"))
        assert (data.label_names, data.labels.tolist()) == (names, labels)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_tables_in_other_encodings_of_unicode(images, encoding):
    files = rows()["file"][:4]
    text = "file,label\n" + "".join(f"{file},{label}\n" for file, label in zip(files, ["né", "犬"] * 2))
    (images / "t.csv").write_bytes(text.encode(encoding))
    assert open_dataset(str(images / "t.csv")).label_names == ["né", "犬"]


def test_bytes_that_are_no_text_are_said_to_be_none(images):
    (images / "t.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(HFViTError, match="is no table of text"):
        open_dataset(str(images / "t.csv"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a|b", "b", "", "a|c"], r"'\|' in 2 of 3 labels, such as 'a\|b': give --label_separator '\|'"),
        (["0,5", "1,25", "2,0", "3,5"], r"holds '0,5': write decimals with a point .*, give --label_separator ','"),
    ],
)
def test_cells_that_mean_something_else_than_classes_are_asked_about(images, labels, message):
    files = rows()["file"][:4]
    text = "file;label\n" + "".join(f"{file};{label}\n" for file, label in zip(files, labels))
    (images / "t.csv").write_text(text)
    with pytest.raises(HFViTError, match=message):
        open_dataset(str(images / "t.csv"))


def test_classes_that_are_numbers_and_words_are_said(images):
    write(images / "t.csv", {"file": rows()["file"], "label": [1, 2, "cat"] * 4})
    said: list[str] = []
    open_splits(DataArguments(dataset=str(images / "t.csv")), 0, said.append)
    assert any("numbers and words, such as '1' and 'cat'" in line for line in said)


def test_a_split_that_is_not_there_names_the_option(images):
    write(images / "t.csv", {"file": rows()["file"], "label": [1, 2] * 6, "part": ["A", "B"] * 6})
    data = DataArguments(dataset=str(images / "t.csv"), split_column="part")
    with pytest.raises(HFViTError, match="no split 'train'; available: A, B; name them with --train_split"):
        open_splits(data, 0, lambda text: None)


def test_evaluation_counts_numbers_as_training_does(images):
    """Labels 1..3: the class called 2 stays the class called 2 where the test holds others."""
    files = rows()["file"]
    write(images / "train.csv", {"file": files, "label": [1, 2, 3] * 4})
    write(images / "eval.csv", {"file": files[:2], "label": [3, 2]})
    data = DataArguments(train_file=str(images / "train.csv"), eval_file=str(images / "eval.csv"))
    found = open_splits(data, 0, lambda text: None)
    assert [found.evaluation.label_names[label] for label in found.evaluation.labels] == ["3", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has no rows"),
        (b"file,label\n", "has no rows"),
        (b"batch0/0.png,rose\nbatch1/1.png,tulip\n", "has no header: its first line is an image"),
        (b"file,label\nbatch0/0.png\n", "line 2: 1 cells, the header has 2"),
        (b"file,label,label\na,b,c\n", "columns of the same name: label"),
        (b"file,label\nbatch0/0.png,caf\xe9\n", r"is not UTF-8 \(line 2\); it can be read as cp1252"),
        (b"file,label\nx.png,a\ny.png,b\n", "none of the 2 images .* is there; paths count from"),
        (b"file,label\n,a\nbatch0/0.png,b\n", r"1 of 2 rows .* have no path of an image in column 'file' .*row 1"),
        (b"file,label\nbatch0/0.png,\nbatch1/1.png,b\n", "1 of 2 rows .* have no label in column 'label'"),
        (b"file,label,class\nbatch0/0.png,a,b\n", "several columns that could be the label, label, class"),
        (b"file,path,label\nbatch0/0.png,a,b\n", "several columns that could hold the images, file, path"),
        (b"where,text\nhttp,b\n", "no column of images among where, text"),
        (b'file,label\n"batch0/0.png,a\n', "line"),
        (b"file,label\n" + b"".join(b"batch0/0.png,id%d\n" % n for n in range(30)), "an id, not classes"),
        (b"\x00" * 100, "."),
    ],
)
def test_tables_that_cannot_be_used(images, text, message):
    (images / "t.csv").write_bytes(text)
    with pytest.raises(HFViTError, match=message) as error:
        open_dataset(str(images / "t.csv"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_missing_images_are_counted(images):
    write(images / "t.csv", {"file": [*rows()["file"], "gone.png"], "label": [*rows()["kind"], "rose"]})
    said = []
    data = open_dataset(str(images / "t.csv"), log=said.append)
    assert len(data) == 13 and "1 of 13 images that" in said[0] and "gone.png" in said[0]
    assert "unreadable" in data[12]
    with pytest.raises(HFViTError, match=r"1 of 13 images .* are missing: gone\.png; --on_decode_error skip trains"):
        open_dataset(str(images / "t.csv"), on_unreadable="stop")


def test_what_is_missing_in_each_of_two_splits_is_said(images):
    table = {"file": [*rows()["file"][:6], "gone.png"], "label": [*rows()["kind"][:6], "rose"]}
    write(
        images / "all.csv",
        {key: values + values for key, values in table.items()} | {"split": ["train"] * 7 + ["test"] * 7},
    )
    said = []
    open_splits(DataArguments(dataset=str(images / "all.csv")), 0, said.append)
    assert sum("1 of 7 images" in line for line in said) == 1  # the same line of both
    write(images / "train.csv", table)
    write(images / "test.csv", {key: values[2:] for key, values in table.items()})
    said = []
    open_splits(
        DataArguments(train_file=str(images / "train.csv"), eval_file=str(images / "test.csv")), 0, said.append
    )
    assert [line[:7] for line in said if "missing" in line] == ["1 of 7 ", "1 of 5 "]


def test_a_thousand_columns(images):
    table = rows(**{f"c{n}": [n] * 12 for n in range(1000)})
    check(open_dataset(str(write(images / "t.csv", table)), image_column="file", label_column="kind"))


def test_paths_written_on_windows(images):
    table = rows(file=[name.replace("/", "\\") for name in rows()["file"]])
    check(open_dataset(str(write(images / "t.csv", table)), label_column="kind"))


def test_rows_that_list_an_image_again_are_counted_and_contradictions_named(images):
    table = {key: values + values[:2] for key, values in rows().items()}
    table["kind"][13] = "lily"  # the image of row 1, a tulip there
    said = []
    open_splits(DataArguments(dataset=str(write(images / "t.csv", table)), label_column="kind"), 0, said.append)
    (note,) = [line for line in said if "again" in line]
    assert note.startswith("2 rows of ") and note.endswith("another class than before: batch1/1.png")


def test_classes_that_differ_by_blanks_are_noted(images):
    table = rows(kind=[("rose", "rose ", "Lily")[n % 3] for n in range(12)])
    said = []
    open_splits(DataArguments(dataset=str(write(images / "t.csv", table)), label_column="kind"), 0, said.append)
    assert "note: these classes differ by capitals or blanks alone: 'rose', 'rose '" in said
