"""report.html: one page about a trained or scored model, with the images that say most; it never leaves this machine.

For the end of fine-tuning (run_report.py, which collects what this shows) and `training.score --report`. Sections are
those that the problem type has; each is bounded in size, however many images and classes there are: of classes, only
pairs that occur are counted, and the most telling ones are shown.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from hf_vit.atomic_file import atomic_write
from hf_vit.errors import HFViTError, error_in_one_line
from hf_vit.html_page import figure_svg, image_uri, write_page
from hf_vit.hub.model_card import REPORT_FILE
from hf_vit.image_io import printable
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, THRESHOLD

from ..data.dataset import ImageDataset
from ..data.deduplication import Duplicate
from ..metrics.outcomes import TOP_CLASSES, Outcomes
from ..metrics.target_scores import sigmoid
from .mislabelled import find_label_issues, find_wrong_marks
from .progress import format_number
from .report_charts import draw_confidence, draw_history, draw_reliability, draw_residuals, draw_scatter


MISLABELLED_NAME = "mislabelled.csv"
TEMPLATE = Path(__file__).with_name("report_page.html")
SIDE = 160  # pixels of an image on the page
MAX_MATRIX = 20  # classes of the confusion matrix; of more, those most confused and one row for the others
MAX_PAIRS, MAX_OF_PAIR = 8, 6  # of classes; images of each
MAX_IMAGES = 24  # of a section
MAX_ROWS = 200  # of a table
MAX_CHARTS = 6  # one a number
DOUBTFUL = 0.2  # of the images: no set has so many wrong labels that a model could still tell which
METRICS = ("accuracy", "mean_average_precision", "r2")


@dataclass(frozen=True)
class ReportInput:
    """What a page is made of.

    Attributes:
        overview: (name, value) rows. scores: rows as in facts.json. history: lines as in history.jsonl.
        names: of the model's outputs. dataset: of the outcomes' images; None where these cannot be shown.
        thresholds: (K,) of several labels. unseen: why the probabilities are those of images not trained on; None
            where they are not, and nothing can be said of wrong labels.
        looked_at: images with what the model looks at, or why there are none. duplicates: pairs of an evaluation and a
            training image, the latter's data, and a sentence; or the sentence alone. Both None: without the section.
    """

    title: str
    overview: Sequence[tuple[str, str]]
    scores: Sequence[dict[str, Any]]
    history: Sequence[dict[str, Any]]
    outcomes: Outcomes
    names: Sequence[str]
    dataset: ImageDataset | None
    unseen: str
    thresholds: Sequence[float] | None = None
    looked_at: Callable[[], "list[tuple[str, Image.Image]] | str"] | None = None
    duplicates: Callable[[], "tuple[list[Duplicate], ImageDataset | None, str]"] | None = None


@dataclass
class Section:
    """A part of the page; empty lists are left out."""

    title: str
    text: list[str] = field(default_factory=list)
    charts: list[Markup] = field(default_factory=list)
    matrix: dict[str, Any] | None = None
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.title.replace(" ", "-")

    def add_images(self, tiles: Sequence[dict[str, Any] | None], title: str = "", side: int = 0) -> None:
        """A group of images; those that can no longer be read are left out."""
        shown = [tile for tile in tiles if tile is not None]
        if shown:
            self.groups.append({"title": title, "tiles": shown, "side": side})


def write_report_page(folder: Path, report: ReportInput, log: Callable[[str], None] = print) -> Path:
    """Write report.html, and mislabelled.csv where labels can be judged.

    A section that fails is named in the log and on the page, which has all others.
    """
    rows = [[checked(title, build, report, log) for title, build in row.items()] for row in parts_of(report, folder)]
    path = folder / REPORT_FILE
    head, scores = score_table(report.scores)
    write_page(path, TEMPLATE, title=report.title, overview=report.overview, score_head=head, scores=scores, rows=rows)
    return path


def parts_of(report: ReportInput, folder: Path) -> list[dict[str, Callable[[ReportInput], Section]]]:
    """The sections of the problem type by title, in rows: on a wide screen, those of one stand side by side."""
    problem = report.outcomes.problem_type
    parts: list[dict[str, Callable[[ReportInput], Section]]] = [{"learning curves": learning_curves_section}]
    if problem == SINGLE_LABEL:
        parts += [
            {"confusion matrix": confusion_matrix_section, "classes": class_table_section},
            {"most confused": most_confused_section},
        ]
    elif problem == MULTI_LABEL:
        parts += [{"labels": label_table_section}]
    else:
        parts += [{"predicted and true": predicted_and_true_section}]
    parts += [{"highest loss": highest_loss_section}]
    if problem != REGRESSION:
        parts += [{"likely mislabelled": lambda report: likely_mislabelled_section(report, folder)}]
        parts += [{"calibration": calibration_section}]
    if report.looked_at is not None:
        parts += [{"what the model looks at": what_it_looks_at_section}]
    if report.duplicates is not None:
        parts += [{"near-duplicates": near_duplicates_section}]
    return parts


def checked(
    title: str, build: Callable[[ReportInput], Section], report: ReportInput, log: Callable[[str], None]
) -> Section:
    """A section; where it fails, one that says so: the run is over and saved, no part of its report may end it."""
    try:
        return build(report)
    except Exception as error:
        log(f"note: {REPORT_FILE} is without '{title}': {error_in_one_line(error)}")
        return Section(title, [f"This part could not be made: {error_in_one_line(error)}"])


def score_table(scores: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of metric, value, interval where any score has one, and images, as words."""
    rows = []
    for row in scores:
        name = row["metric"]
        low, high = row.get("interval") or (None, None)
        interval = "" if low is None else f"{format_number(name, low)} to {format_number(name, high)}"
        rows.append([name.replace("_", " "), format_number(name, row["value"]), interval, f"{row['n']:,}"])
    head = ["score", "value", "95 % interval", "images"]
    if not any(row[2] for row in rows):
        return [*head[:2], head[3]], [[*row[:2], row[3]] for row in rows]
    return head, rows


# -- images ---------------------------------------------------------------------------------------------------------


def tile(dataset: ImageDataset | None, index: int, title: str, lines: Sequence[str]) -> dict[str, Any] | None:
    """An image of a data set with its caption; None where it cannot be read."""
    if dataset is None:
        return None
    try:
        image, _, name = dataset.read(int(index))
    except (HFViTError, OSError):
        return None
    return {"source": image_uri(image, SIDE), "title": title, "lines": [*lines, printable(Path(name).name)]}


def beside(images: Sequence[Image.Image], side: int = SIDE, gap: int = 4) -> Image.Image:
    """Images side by side in frames of equal size."""
    sheet = Image.new("RGB", ((side + gap) * len(images) - gap, side), (128, 128, 128))
    for number, image in enumerate(images):
        factor = side / max(image.size)
        size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        resample = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
        place = (side + gap) * number + (side - size[0]) // 2, (side - size[1]) // 2
        sheet.paste(image.convert("RGB").resize(size, resample), place)
    return sheet


def percent(value: float) -> str:
    return f"{value:.1%}"


def count_images(count: int) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def caption_of(report: ReportInput, row: int) -> tuple[str, list[str]]:
    """What an image is and what the model says: title and lines of its caption."""
    outcomes, names = report.outcomes, report.names
    if outcomes.problem_type == SINGLE_LABEL:
        label, guess = names[outcomes.labels[row]], names[outcomes.classes[row, 0]]
        said = f"predicted: {guess}, {percent(outcomes.probabilities[row, 0])}"
        return str(label), [said, f"label: {percent(outcomes.own[row])}"] if guess != label else [said]
    if outcomes.problem_type == MULTI_LABEL:
        given = [name for name, mark in zip(names, outcomes.labels[row]) if mark]
        scores = sigmoid(outcomes.outputs[row])
        least = report.thresholds or [THRESHOLD] * len(names)
        said = [f"{name} {score:.0%}" for name, score, at in zip(names, scores, least) if score >= at]
        return ", ".join(given[:6]) or "none", [f"predicted: {', '.join(said[:6]) or 'none'}"]
    pairs = [
        f"{name}: {predicted:.4g} instead of {true:.4g}"
        for name, predicted, true in zip(names, outcomes.outputs[row], outcomes.labels[row])
    ]
    return pairs[0], pairs[1:4]


# -- sections -------------------------------------------------------------------------------------------------------


def learning_curves_section(report: ReportInput) -> Section:
    """Loss, score and learning rate over the steps."""
    lines = report.history
    metric = next((name for name in METRICS[::-1] if any(f"eval_{name}" in line for line in lines)), METRICS[0])
    figures = [
        draw_history(lines, ["loss", "eval_loss"], "loss"),
        draw_history(lines, [metric, f"eval_{metric}"], metric.replace("_", " ")),
        draw_history(lines, ["learning_rate"], "learning rate"),
    ]
    drawn = [figure_svg(figure) for figure in figures if figure is not None]
    return Section("learning curves", [] if drawn else ["The folder has no history of a training run."], drawn)


def confused_pairs(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (label, prediction) pairs that occur, and how often (U,) each."""
    pairs, counts = np.unique(np.stack([outcomes.labels, outcomes.classes[:, 0]]), axis=1, return_counts=True)
    return pairs[0].astype(np.int64), pairs[1].astype(np.int64), counts


def confusion_matrix_section(report: ReportInput) -> Section:
    """Numbers of images by label and prediction; of many classes, of those in the most frequent mistakes."""
    labels, guesses, counts = confused_pairs(report.outcomes)
    total = len(report.names)
    if total <= MAX_MATRIX:
        shown = np.arange(total)
    else:
        wrong = np.flatnonzero(labels != guesses)
        wrong = wrong[np.argsort(-counts[wrong], kind="stable")]
        shown = np.array(list(dict.fromkeys(np.stack([labels, guesses], 1)[wrong].ravel().tolist()))[: MAX_MATRIX - 1])
        shown = np.sort(shown.astype(np.int64))
    place = np.full(total, len(shown))  # where the others are counted together
    place[shown] = np.arange(len(shown))
    side = len(shown) + (total > len(shown))
    matrix = np.zeros((side, side), dtype=np.int64)
    np.add.at(matrix, (place[labels], place[guesses]), counts)
    fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    names = [str(report.names[number]) for number in shown] + ["others"] * (side > len(shown))
    rows = []
    for row in range(side):
        cells = []
        for column in range(side):
            both_others = row == column == len(shown)  # right and wrong ones in one sum
            kind = "right" if row == column else ""
            share = 0.0 if both_others else float(fractions[row, column])
            text = "" if both_others or not matrix[row, column] else f"{matrix[row, column]:,}"
            cells.append({"text": text, "kind": f"{kind} strong" if share > 0.6 else kind, "share": f"{share:.3f}"})
        rows.append(cells)
    text = ["Images by label (rows) and prediction (columns); the color is the fraction of the row."]
    if side > len(shown):
        text.append(f"The {len(shown)} classes of the most frequent mistakes, of {total:,}; all others are one row.")
    return Section("confusion matrix", text, matrix={"names": names, "rows": rows})


def most_confused_section(report: ReportInput) -> Section:
    """The pairs of classes that are most often confused, with the images."""
    outcomes, names = report.outcomes, report.names
    labels, guesses, counts = confused_pairs(outcomes)
    of_class = np.bincount(labels, counts, minlength=len(names))
    wrong = np.flatnonzero(labels != guesses)
    section = Section("most confused")
    for pair in wrong[np.argsort(-counts[wrong], kind="stable")][:MAX_PAIRS]:
        label, guess = labels[pair], guesses[pair]
        rows = np.flatnonzero((outcomes.labels == label) & (outcomes.classes[:, 0] == guess))
        rows = rows[np.argsort(-outcomes.probabilities[rows, 0], kind="stable")][:MAX_OF_PAIR]
        said = [f"{percent(outcomes.probabilities[row, 0])}, label {percent(outcomes.own[row])}" for row in rows]
        tiles = [tile(report.dataset, outcomes.index[row], text, []) for row, text in zip(rows, said)]
        title = f"{names[label]} taken for {names[guess]}: {counts[pair]:,} of {int(of_class[label]):,}"
        if any(found is not None for found in tiles):
            section.add_images(tiles, title, side=80)
        else:
            section.text.append(title)
    if not len(wrong):
        section.text = ["Every image is classified correctly."]
    return section


def highest_loss_section(report: ReportInput) -> Section:
    """The images that the model is most wrong about."""
    outcomes = report.outcomes
    losses = np.nan_to_num(outcomes.losses, nan=np.inf)
    rows = np.argsort(-losses, kind="stable")[:MAX_IMAGES]
    section = Section("highest loss")
    tiles = []
    for row in rows:
        title, lines = caption_of(report, row)
        tiles.append(tile(report.dataset, outcomes.index[row], title, [*lines, f"loss {outcomes.losses[row]:.3g}"]))
    section.add_images(tiles)
    section.text = [f"Of {count_images(len(outcomes))}, loss {outcomes.losses.mean():.3g} on average."]
    return section


def likely_mislabelled_section(report: ReportInput, folder: Path) -> Section:
    """Images whose label another class contradicts with confidence; all of them in mislabelled.csv."""
    outcomes, names = report.outcomes, report.names
    if outcomes.problem_type == SINGLE_LABEL:
        issues = find_label_issues(outcomes.labels, outcomes.own, outcomes.classes, outcomes.probabilities)
        rows = issues.places
        listed = [
            (row, str(names[outcomes.labels[row]]), str(names[other]), f"{score:.4f}")
            for row, other, score in zip(rows, issues.suggested, issues.own)
        ]
        head, captions = ["image", "label", "suggested", "probability"], [f"suggested: {line[2]}" for line in listed]
    else:
        scores = sigmoid(outcomes.outputs)
        rows, labels = find_wrong_marks(scores, outcomes.labels)
        listed = [
            (
                row,
                str(names[label]),
                "superfluous" if outcomes.labels[row, label] else "missing",
                f"{scores[row, label]:.4f}",
            )
            for row, label in zip(rows, labels)
        ]
        head, captions = ["image", "label", "mark", "score"], [f"{line[1]}: {line[2]}" for line in listed]
    count = len(np.unique(rows))
    section = Section("likely mislabelled")
    how = f"by confident learning (arXiv:1911.00068) on the probabilities of {report.unseen}"
    section.text = [f"{count_images(count)} of {len(outcomes):,}, {how}."]
    if report.dataset is not None:
        write_issues(folder / MISLABELLED_NAME, report.dataset, outcomes, head, listed)
        section.text.append(
            f"All of them are in {MISLABELLED_NAME}, the likeliest first. Look before you change a label."
        )
    if count > len(outcomes) * DOUBTFUL:
        section.text.append("A list as long as this holds the mistakes of a weak model more than those of the labels.")
    tiles = []
    for line, caption in zip(listed[:MAX_IMAGES], captions):
        title, said = caption_of(report, line[0])
        tiles.append(tile(report.dataset, outcomes.index[line[0]], f"label: {title}", [caption, *said]))
    section.add_images(tiles)
    if (
        len(outcomes.labels)
        and outcomes.problem_type == SINGLE_LABEL
        and outcomes.classes.shape[1] == TOP_CLASSES < len(names)
    ):
        section.text.append(f"The {TOP_CLASSES} most probable classes of each image are looked at.")
    return section


def write_issues(
    path: Path, dataset: ImageDataset, outcomes: Outcomes, head: list[str], listed: Sequence[tuple]
) -> None:
    """CSV of the images that are probably mislabelled, the likeliest first."""
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(head)
    for row, *rest in listed:
        lines.writerow([dataset.image_name(int(outcomes.index[row])), *rest])
    atomic_write(path, text.getvalue().encode("utf-8", errors="backslashreplace"))


def calibration_section(report: ReportInput) -> Section:
    """Whether confidence is accuracy."""
    from ..metrics.calibration.calibration import expected_calibration_error  # with `evaluate`: seconds to import

    outcomes = report.outcomes
    if outcomes.problem_type == SINGLE_LABEL:
        confidence, right = outcomes.probabilities[:, 0].astype(np.float64), outcomes.classes[:, 0] == outcomes.labels
        axes, what = ("confidence", "accuracy"), "confidence and accuracy"
    else:
        confidence, right = sigmoid(outcomes.outputs).ravel(), outcomes.labels.ravel() > 0
        axes, what = ("score", "fraction that has the label"), "the scores of all labels and how often these are there"
    error = expected_calibration_error(confidence, right)
    text = [
        f"Expected calibration error {percent(error)}: the gap between {what}, averaged over 15 bins of {axes[0]}. "
        "Below the dashed line the model is too confident, above it not confident enough."
    ]
    figures = draw_reliability(confidence, right, *axes), draw_confidence(confidence, right, axes[0])
    return Section("calibration", text, [figure_svg(figure) for figure in figures])


def percent_or_nothing(value: float) -> str:
    """In percent; nothing for what is not defined."""
    return "" if np.isnan(value) else percent(value)


def class_table_section(report: ReportInput) -> Section:
    """A row for each class that has images or is predicted, the lowest F1 first."""
    from ..metrics.accuracy.accuracy import wilson_interval  # with `evaluate`, which takes seconds to import
    from ..metrics.precision_recall_f1.precision_recall_f1 import precision_recall_f1

    outcomes, total = report.outcomes, len(report.names)
    guesses = outcomes.classes[:, 0]
    support, predicted = (np.bincount(part, minlength=total) for part in (outcomes.labels, guesses))
    hits = np.bincount(outcomes.labels[outcomes.labels == guesses], minlength=total)
    precision, recall, f1 = precision_recall_f1(hits, predicted, support)
    there = np.flatnonzero(support + predicted)
    rows = []
    for number in there[np.argsort(f1[there], kind="stable")][:MAX_ROWS]:
        low, high = wilson_interval(hits[number], support[number]) if support[number] else (np.nan, np.nan)
        interval = f"{percent_or_nothing(low)} to {percent_or_nothing(high)}" if support[number] else ""
        scores = (precision[number] if predicted[number] else np.nan, recall[number] if support[number] else np.nan)
        rows.append(
            [
                str(report.names[number]),
                *map(percent_or_nothing, (*scores, f1[number])),
                interval,
                f"{support[number]:,}",
            ]
        )
    text = ["The lowest F1 first; the interval (95 %, Wilson) is that of recall."]
    if len(there) > len(rows):
        text.append(f"{len(rows)} of {len(there):,} classes; per_class.csv has all.")
    return Section("classes", text, tables=[(["class", "precision", "recall", "F1", "recall, 95 %", "images"], rows)])


def label_table_section(report: ReportInput) -> Section:
    """A row for each label of a multi-label model, the lowest average precision first."""
    from sklearn.metrics import average_precision_score

    scores, marks = sigmoid(report.outcomes.outputs), report.outcomes.labels > 0
    least = np.asarray(report.thresholds or [THRESHOLD] * len(report.names))
    said = scores >= least
    hits, predicted, support = (said & marks).sum(0), said.sum(0), marks.sum(0)
    precision, recall = hits / np.where(predicted, predicted, np.nan), hits / np.where(support, support, np.nan)
    f1 = 2 * hits / np.where(predicted + support, predicted + support, np.nan)
    ranked = np.array(
        [
            average_precision_score(marks[:, k], scores[:, k]) if support[k] else np.nan
            for k in range(len(report.names))
        ]
    )
    order = np.argsort(np.nan_to_num(ranked, nan=2.0), kind="stable")[:MAX_ROWS]
    rows = [
        [
            str(report.names[k]),
            *map(percent_or_nothing, (ranked[k], precision[k], recall[k], f1[k])),
            f"{least[k]:.3f}",
            f"{support[k]:,}",
        ]
        for k in order
    ]
    text = ["The lowest average precision first; precision, recall and F1 are those at the threshold."]
    if len(report.names) > len(rows):
        text.append(f"{len(rows)} of {len(report.names):,} labels.")
    head = ["label", "average precision", "precision", "recall", "F1", "threshold", "images"]
    return Section("labels", text, tables=[(head, rows)])


def predicted_and_true_section(report: ReportInput) -> Section:
    """Of numbers: predictions over the truth, residuals, scores of each."""
    from ..metrics.regression.regression import regression  # with `evaluate`, which takes seconds to import

    outputs, labels = (part.astype(np.float64) for part in (report.outcomes.outputs, report.outcomes.labels))
    rows, figures = [], []
    for place, name in enumerate(report.names):
        found = regression(outputs[:, place], labels[:, place])
        rows.append([str(name), *(f"{found[metric]:.4g}" for metric in ("mae", "rmse", "r2"))])
        if place < MAX_CHARTS:
            figures.append(draw_scatter(labels[:, place], outputs[:, place], str(name)))
            figures.append(draw_residuals(outputs[:, place] - labels[:, place], str(name)))
    text = [f"Charts of the first {MAX_CHARTS} of {len(rows)} numbers."] if len(rows) > MAX_CHARTS else []
    charts = [figure_svg(figure) for figure in figures]
    table = (["number", "mean absolute error", "root mean square error", "R2"], rows[:MAX_ROWS])
    return Section("predicted and true", text, charts, tables=[table])


def what_it_looks_at_section(report: ReportInput) -> Section:
    """Attention maps over some images."""
    assert report.looked_at is not None
    found = report.looked_at()
    section = Section("what the model looks at")
    if isinstance(found, str):
        section.text = [found]
        return section
    section.text = [
        "The image, what the pooled vector is made of (attention rollout), and what speaks for the prediction "
        "(relevance). The first images, of each class in turn, not picked by hand."
    ]
    tiles = [{"source": image_uri(sheet, 3 * SIDE), "title": title, "lines": []} for title, sheet in found]
    section.add_images(tiles, side=300)
    return section


def near_duplicates_section(report: ReportInput) -> Section:
    """Evaluation images that are also trained on."""
    assert report.duplicates is not None
    found, train, sentence = report.duplicates()
    section = Section("near-duplicates", [sentence])
    tiles = []
    for match in found[:MAX_IMAGES]:
        if report.dataset is None or train is None:
            break
        try:
            images = [
                data.read(place)[0] for data, place in ((report.dataset, match.index), (train, match.other_index))
            ]
        except (HFViTError, OSError):
            continue
        names = [printable(Path(name).name) for name in (match.name, match.other_name)]
        lines = [f"{names[0]} = {names[1]}"]
        if report.dataset.labels.ndim == 1:
            labels = [data.label_names[data.labels[place]]
                      for data, place in ((report.dataset, match.index), (train, match.other_index))]  # fmt: skip
            lines = lines if labels[0] == labels[1] else [f"labels differ: {labels[0]}, {labels[1]}", *lines]
        tiles.append({"source": image_uri(beside(images), 2 * SIDE), "title": "evaluation, training", "lines": lines})
    section.add_images(tiles, side=200)
    return section
