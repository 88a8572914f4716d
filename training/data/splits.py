"""The training and evaluation data of a run, from its data arguments, and their transforms.

For train.py. dataset.py opens map-style data sets, streaming.py streams.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError, listed
from hf_vit.image_processing import GOOGLE, ImageProcessing, input_size
from hf_vit.problem_type import SINGLE_LABEL
from hf_vit.transformers_classifiers import num_channels

from ..config.arguments import FIELDS, DataArguments
from .dataset import (
    ImageDataset,
    holds_classes,
    open_dataset,
    open_reader,
    open_split,
    take_fraction,
)
from .deduplication import Duplicate, deduplicate
from .folders import index_folder
from .shards.shard_files import copy_shards, is_remote, is_shard_pattern
from .shards.streaming import ImageStream, open_stream, stream_files
from .shards.webdataset import shards_reader
from .sources import SPLIT_NAMES, Columns, Reader, own_cache
from .subsets import carve_dev_split, take_fold
from .tables.targets import as_float
from .transforms import EvalTransform, TrainTransform, evaluation_steps


EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")
DEV_FRACTION = 0.1
TRANSFORM_FIELDS = (
    "crop", "crop_area", "crop_ratio", "flip", "resize_small", "degrees", "translate", "scale", "shear",
    "auto_augment", "color_jitter", "random_erasing",
)  # fmt: skip
STREAM_OPTIONS = ("shuffle_buffer_size", "shuffle_run_length", "shuffle_shards", "read_threads")
MAX_LISTED = 5  # names in a log line


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of a run, and what deduplication removed from it."""

    train: ImageDataset | ImageStream
    evaluation: ImageDataset
    duplicates: list[Duplicate]


def open_splits(data: DataArguments, seed: int, log=print) -> Splits:
    """Open training and evaluation images; without an evaluation split, a stratified part of train is held out.

    Args:
        seed: of the choice of `samples_per_class`. log: called with lines for the user.

    Raises:
        HFViTError: for anything that the user can fix.
    """
    if data.dataset is None:
        raise HFViTError("which images? Give --dataset (a folder, a Hub id, digits, or synthetic:NAME)")
    if data.streaming:
        return open_streaming(data, log)
    for name in STREAM_OPTIONS:
        if getattr(data, name) != FIELDS[name].default:
            raise HFViTError(f"--{name} is of streams: add --streaming true, or leave it out")
    reader, train = open_train(data)
    if similar := similar_names(train.label_names):
        log(f"note: these classes differ by capitals or blanks alone: {'; '.join(similar)}")
    if mixed := numbers_and_words(train):
        log(f"note: classes are numbers and words, such as {mixed}; correct the labels if all are to be numbers")
    if data.problem_type is None and train.problem_type != SINGLE_LABEL:
        log(f"the labels are read as {train.problem_type}; give --problem_type to have them read in another way")
    notes = list(reader.notes)
    evaluation = None if data.folds is not None else open_evaluation(data, reader, train, notes)
    if evaluation is not None:
        if shared := in_both(train, evaluation):
            log(f"{shared:,} of {len(evaluation):,} evaluation images are trained on: their score is no test's")
        if shared := groups_in_both(train, evaluation):
            log(f"{shared:,} groups of '{data.group_column}' are in training and in evaluation: give splits without")
    elif data.folds is not None:
        train, evaluation = take_fold(train, data.folds, data.fold or 1)
        log(f"fold {data.fold or 1} of {data.folds}: {len(evaluation):,} training images (stratified) are held out")
    else:
        fraction = data.dev_fraction or DEV_FRACTION
        train, evaluation = carve_dev_split(train, fraction)
        log(f"no evaluation split: {len(evaluation):,} training images ({fraction:.0%}, stratified) are kept for it")
    if train.source is evaluation.source:
        for note in unmeasured(train, evaluation):
            log(note)
    for note in dict.fromkeys(notes):  # each once: a table that is opened for both splits repeats its notes
        log(note)
    duplicates: list[Duplicate] = []
    if data.deduplicate_split is not None and data.deduplicate_against in (None, "eval"):
        raise HFViTError("--deduplicate_split is a split of --deduplicate_against DATASET: give one, or leave it out")
    if data.deduplicate_against is not None:
        other = evaluation if data.deduplicate_against == "eval" else held_out(data)
        train, duplicates = deduplicate(train, other, cache_dir=own_cache(data.cache_dir))
        log(duplicates_found(duplicates, other))
    if data.train_fraction < 1:
        train = take_fraction(train, data.train_fraction)
    if data.samples_per_class is not None:
        train = train.per_class(data.samples_per_class, seed)
    return Splits(train, evaluation, duplicates)


def open_train(data: DataArguments) -> tuple[Reader, ImageDataset]:
    """The data set, and its training split."""
    reader = open_reader(data.dataset, data.dataset_config_name, requested_columns(data), data.cache_dir)
    return reader, open_split(reader, data.train_split, None, data.on_decode_error)


def requested_columns(data: DataArguments) -> Columns:
    return Columns(
        data.image_column,
        data.label_column,
        image_root=data.image_root,
        split=data.split_column,
        problem_type=data.problem_type,
        separator=data.label_separator,
        group=data.group_column,
    )


def open_evaluation(data: DataArguments, reader: Reader, train: ImageDataset, notes: list[str]) -> ImageDataset | None:
    """The evaluation split that the user names or the data have; None if it is to be carved from train.

    Args:
        train: whose label names it shares. notes: assumptions, and what was left out, are added.
    """
    columns = requested_columns(data).counting_in(train.label_names, train.problem_type)
    if data.eval_file is not None:
        return eval_table(data, columns, notes)
    split = data.eval_split
    if split is None and data.dev_fraction is None:
        split = first_untouched(reader.splits, data.train_split)
    if split is None:
        return None
    if reader.by_names:
        reader = open_reader(data.dataset, data.dataset_config_name, columns, data.cache_dir)
    evaluation = open_split(reader, split, train.label_names, data.on_decode_error)
    notes += reader.notes
    return evaluation


def open_test_split(data: DataArguments) -> ImageDataset | None:
    """The evaluation split that no fold of a cross-validation trains on; None if there is none."""
    reader, train = open_train(data)
    return open_evaluation(data, reader, train, [])


def unmeasured(train: ImageDataset, evaluation: ImageDataset) -> list[str]:
    """Notes about classes without images among those held out from train; those of a single image first."""
    if not holds_classes(train):
        return []
    notes = []
    count = len(train.label_names)
    trained, held = (np.bincount(part.labels, minlength=count) for part in (train, evaluation))
    single = [train.label_names[label] for label in np.flatnonzero(trained + held == 1)]
    if single:
        notes.append(f"classes of a single image, which stays in training: {listed(single)}")
    absent = [train.label_names[label] for label in np.flatnonzero((held == 0) & (trained > 1))]
    if absent:
        notes.append(f"classes without an image among those held out, which are not measured: {listed(absent)}")
    return notes


def similar_names(label_names: list[str]) -> list[str]:
    """Class names that differ only in case or spaces, as in `'cat', 'Cat '`; the first MAX_LISTED groups."""
    by_word: dict[str, list[str]] = {}
    for name in label_names:
        by_word.setdefault(" ".join(name.split()).casefold(), []).append(repr(name))
    return [", ".join(names) for names in by_word.values() if len(names) > 1][:MAX_LISTED]


def numbers_and_words(train: ImageDataset | ImageStream) -> str:
    """The first class that is a number and the first that is not, if there are both; else empty."""
    words = [name for name in train.label_names if as_float(name) is None]
    first = next((name for name in train.label_names if as_float(name) is not None), None)
    holds = isinstance(train, ImageDataset) and holds_classes(train) and words and first is not None
    return f"{first!r} and {words[0]!r}" if holds else ""


def in_both(train: ImageDataset, evaluation: ImageDataset) -> int:
    """Number of images in both of two slices of one split; sums of splits are not compared."""
    same = train.source.fingerprint == evaluation.source.fingerprint
    return len(np.intersect1d(train.rows, evaluation.rows)) if same else 0


def groups_in_both(train: ImageDataset, evaluation: ImageDataset) -> int:
    """Number of groups with images in both splits."""
    if train.groups is None or evaluation.groups is None:
        return 0
    named = [groups[np.char.startswith(groups, "=")] for groups in (train.groups, evaluation.groups)]
    return len(np.intersect1d(*named))


def eval_table(data: DataArguments, columns: Columns, notes: list[str]) -> ImageDataset:
    """The evaluation images of `--eval_file`: its first split with a usual name, or else its first."""
    reader = open_reader(data.eval_file, None, dataclasses.replace(columns, split=None), data.cache_dir)
    split = next((name for name in EVAL_SPLITS if name in reader.splits), reader.splits[0])
    evaluation = open_split(reader, split, columns.label_names, data.on_decode_error)
    notes += reader.notes
    return evaluation


def first_untouched(splits: Collection[str], train_split: str) -> str | None:
    """The first evaluation split by name of which `train_split`, which may be a sum of slices, takes nothing."""
    words = [part.split("[")[0].strip() for part in train_split.split("+")]
    used = {word if word in splits else SPLIT_NAMES.get(word.lower(), word) for word in words}
    return next((name for name in EVAL_SPLITS if name in splits and name not in used), None)


def held_out(data: DataArguments) -> ImageDataset:
    """The images of another data set that must not be trained on: its test split, or `--deduplicate_split`."""
    name = data.deduplicate_against
    split = data.deduplicate_split
    if split is None:
        splits = open_reader(name, None, Columns(labelled=False), data.cache_dir).splits
        if "test" not in splits:
            raise HFViTError(f"'{name}' has no test split; choose with --deduplicate_split: {', '.join(splits)}")
        split = "test"
    return open_dataset(name, split=split, cache_dir=data.cache_dir, labelled=False)


def open_streaming(data: DataArguments, log=print) -> Splits:
    """Train from a stream; the evaluation split is a local copy, so that each image counts once."""
    common: dict[str, Any] = {
        "config_name": data.dataset_config_name,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "on_unreadable": data.on_decode_error,
        "cache_dir": data.cache_dir,
    }
    for name in (
        "folds",
        "samples_per_class",
        "deduplicate_against",
        "deduplicate_split",
        "dev_fraction",
        "eval_file",
    ):
        if getattr(data, name) is not None:
            raise HFViTError(f"--{name} has to look at all images first: leave out --streaming")
    for name in ("image_root", "split_column", "group_column"):
        if getattr(data, name) is not None:
            raise HFViTError(f"--{name} is for tables that are read whole: leave out --streaming")
    if isinstance(data.label_column, list) or data.problem_type not in (None, SINGLE_LABEL) or data.label_separator:
        raise HFViTError("a stream has one class for each image: leave out --streaming for several labels or numbers")
    split = data.eval_split
    if split is None:
        splits = stream_files(data.dataset, data.dataset_config_name, data.cache_dir)
        split = first_untouched(splits, data.train_split)
    if split is None:
        raise HFViTError(f"'{data.dataset}' has no evaluation split to stream beside: name one with --eval_split")
    train = open_stream(
        data.dataset,
        split=data.train_split,
        fraction=data.train_fraction,
        buffer_size=data.shuffle_buffer_size,
        run_length=data.shuffle_run_length,
        read_threads=data.read_threads,
        group_size=data.shuffle_shards,
        log=log,
        **common,
    )
    if is_shard_pattern(data.dataset) and is_remote(data.dataset):
        evaluation = open_copied_shards(data, split, train.label_names, log)
    else:
        evaluation = open_dataset(data.dataset, split=split, label_names=train.label_names, log=log, **common)
    return Splits(train, evaluation, [])


def open_copied_shards(data: DataArguments, split: str, label_names: list[str], log) -> ImageDataset:
    """The evaluation split of remote shards, copied to the cache, since it is read many times."""
    splits = stream_files(data.dataset, None, data.cache_dir)
    if split not in splits:
        raise HFViTError(f"'{data.dataset}' has no split '{split}'; available: {', '.join(splits)}")
    copies = copy_shards(splits[split], index_folder(data.cache_dir), f"the evaluation split '{split}': ", log)
    columns = Columns(data.image_column, data.label_column, label_names)
    reader = shards_reader(data.dataset, copies, columns, data.cache_dir)
    evaluation = open_split(reader, reader.splits[0], label_names, data.on_decode_error)
    for note in reader.notes:
        log(note)
    return dataclasses.replace(evaluation, split=split)  # the copies have one of their own, from their folder


def duplicates_found(duplicates: list[Duplicate], other: ImageDataset) -> str:
    """A line about the training images that were left out, with the first of them."""
    names = [f"{match.name} = {match.other_name}" for match in duplicates[:MAX_LISTED]]
    more = ", ..." if len(duplicates) > MAX_LISTED else ""
    examples = f" ({'; '.join(names)}{more})" if names else ""
    return f"{len(duplicates):,} training images are also in {other.name} ({other.split}) and are left out{examples}"


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """The images that a model reads: height and width in pixels, and channels."""

    image_size_hw: tuple[int, int]
    num_channels: int

    @classmethod
    def of(cls, config, processing: ImageProcessing | None) -> "ModelInput":
        """From a model's configuration and its image processing."""
        return cls(input_size(config, processing), num_channels(config))


def image_processing_for(data: DataArguments, model: Any, base: ImageProcessing | None) -> ImageProcessing:
    """The image processing for evaluation and use: that of the base model, at the size of this one.

    `--crop_pct` and `--resample` override it.

    Args:
        model: `ModelInput`, or the configuration of one of hf_vit's models.
        base: of the pre-trained model; None: squash, mean and std 0.5, as in Google's models.
    """
    processing = (base or GOOGLE).at_size(model.image_size_hw)
    if processing.output_size != model.image_size_hw or data.crop_pct is not None:
        steps = evaluation_steps(model.image_size_hw, data.crop_pct, processing.resample)
        processing = dataclasses.replace(processing, resize_to=steps.resize_to, crop_to=steps.crop_to)
    return processing if data.resample is None else dataclasses.replace(processing, resample=data.resample)


def transforms(
    data: DataArguments, model: Any, processing: ImageProcessing | None = None
) -> tuple[TrainTransform, EvalTransform]:
    """The random transform for training, and the evaluation transform, which equals that of the image processor.

    Args:
        model: as in `image_processing_for`. processing: None: that of `image_processing_for`.
    """
    processing = processing or image_processing_for(data, model, None)
    size, common = model.image_size_hw, {"num_channels": model.num_channels, "resample": processing.resample}
    chosen = {name: getattr(data, name) for name in TRANSFORM_FIELDS}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    return TrainTransform(size, **common, **chosen), EvalTransform.of(processing, size, model.num_channels)
