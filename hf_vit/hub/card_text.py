"""The sentences and tables of a model card, and how values are written in Markdown.

`model_card.py` puts them into the template.

Tests: tests/hf_vit/hub/test_model_card.py.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL


Facts = dict[str, Any]
Rows = list[tuple[str, str]]

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "loss": "Cross-entropy",
    "masked_patch_accuracy": "Colors of masked patches that are right",
    "masked_patch_top5_accuracy": "Colors of masked patches that are among the first five",
    "masked_patch_loss": "Cross-entropy of the colors of masked patches",
    "real_accuracy": "ImageNet-ReaL accuracy",
    "mean_per_class": "Balanced accuracy (mean of the classes' accuracies)",
    "macro_f1": "Macro F1",
    "mean_average_precision": "Mean average precision over the labels",
    "micro_f1": "Micro F1",
    "macro_f1_at_thresholds": "Macro F1 at the labels' own thresholds",
    "micro_f1_at_thresholds": "Micro F1 at the labels' own thresholds",
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "r2": "R2 (share of the variance that is explained)",
    "nll": "Negative log-likelihood",
    "nll_after_temperature": "Negative log-likelihood after temperature scaling",
    "ece": "Expected calibration error",
    "ece_after_temperature": "Expected calibration error after temperature scaling",
    "brier": "Brier score",
    "brier_after_temperature": "Brier score after temperature scaling",
    "temperature": "Temperature with the least negative log-likelihood",
}
LOSS_NAMES = {
    MULTI_LABEL: "Binary cross-entropy, mean over the labels",
    REGRESSION: "Loss, on numbers in standard deviations of training",
}
FRACTIONS = (  # metrics shown in percent, in addition to accuracies
    "mean_per_class", "macro_f1", "micro_f1", "mean_average_precision", "macro_f1_at_thresholds",
    "micro_f1_at_thresholds",
)  # fmt: skip
OUTPUTS = {SINGLE_LABEL: "Classes", MULTI_LABEL: "Labels", REGRESSION: "Numbers"}
ALWAYS_ANSWERS = {
    SINGLE_LABEL: "Every image is given one of these labels, also one that shows something else.",
    MULTI_LABEL: "Each label has a score of its own; what is none of these labels is not found.",
    REGRESSION: "Every image is given a number, also one that shows something else.",
}
MAX_LABELS = 40  # class names on the card
# Arguments left out: paths on the machine of the run, secrets, and what the card shows elsewhere.
OMITTED_ARGUMENTS = re.compile(
    r"(.*_dir|config|dataset|model|deduplicate_against|resume_from_checkpoint|report_to|push_to_hub|hub_.*|.*token.*|seed)$"
)


# -- sentences ---------------------------------------------------------------------------------------------------


def classifies(facts: Facts) -> bool:
    """Whether the model has outputs; one from masked patch prediction has none."""
    return facts["model"]["num_labels"] > 0


def problem_of(facts: Facts) -> str:
    """The problem type, in transformers' words."""
    return facts["model"].get("problem_type") or SINGLE_LABEL


def metric_name(metric: str, problem_type: str) -> str:
    """The full name of a metric; for one of several numbers with its name: `Mean absolute error of height`."""
    if metric == "loss":
        return LOSS_NAMES.get(problem_type, METRIC_NAMES["loss"])
    kind, _, number = metric.partition("_")
    if problem_type == REGRESSION and number and kind in METRIC_NAMES:
        return f"{METRIC_NAMES[kind].split(' (')[0]} of {number}"
    return METRIC_NAMES.get(metric, metric)


def title_of(facts: Facts) -> str:
    """The last part of the model's name."""
    return Path(facts["model"]["name"]).name


def is_ours(facts: Facts) -> bool:
    """Whether it is one of hf_vit's models, not one of transformers' other classifiers."""
    return facts["model"].get("model_type", "hf_vit") == "hf_vit"


def kind(facts: Facts) -> str:
    """`Vision Transformer`, the kind of hybrid, or transformers' class name of another network."""
    if not is_ours(facts):
        return code(str(facts["model"].get("class") or facts["model"]["model_type"]))
    depths = facts["model"]["architecture"].get("resnet_depths")
    if depths is None:
        return "Vision Transformer"
    return f"hybrid Vision Transformer on a ResNet of {sum(depths) * 3 + 1} convolutions"


def card_summary(facts: Facts) -> str:
    """Description of the model in one or two sentences."""
    model, data, stage = facts["model"], facts.get("data") or {}, (facts.get("training") or {}).get("stage")
    article = "An" if kind(facts).strip("`")[0] in "AEIOU" else "A"
    text = f"{article} {kind(facts)} with {count(model['parameters'])} parameters"
    if stage == "finetune" and model.get("base_model"):
        text += f", fine-tuned from {reference(model['base_model'])}"
    elif stage == "finetune":
        text += ", trained from scratch"
    elif stage == "pretrain":
        text += ", pre-trained from scratch" if not model.get("base_model") else ", pre-trained further"
    if data.get("name"):
        text += f" on {reference(data['name'])}"
    if not classifies(facts):
        return f"{text} by predicting the colors of masked patches, without labels. It has no classes yet."
    outputs = model["num_labels"]
    if problem_of(facts) == MULTI_LABEL:
        return f"{text}. It says which of {outputs} labels an image has: several, one or none."
    if problem_of(facts) == REGRESSION:
        return f"{text}. It reads {'one number' if outputs == 1 else f'{outputs} numbers'} off an image."
    return f"{text}. It sorts an image into one of {outputs} classes."


def intended_use(facts: Facts) -> str:
    if not classifies(facts):
        return "fine-tuning, and as features of images like those it was trained on."
    labels = (facts.get("data") or {}).get("label_names") or []
    if not labels:
        return f"sorting images into the {facts['model']['num_labels']} classes of its training data."
    shown = ", ".join(code(label).replace("\\|", "|") for label in labels[:MAX_LABELS])  # no table here
    more = f" and {len(labels) - MAX_LABELS} more (`id2label` in config.json)" if len(labels) > MAX_LABELS else ""
    if problem_of(facts) == MULTI_LABEL:
        return f"finding the labels of images like those it was trained on: {shown}{more}."
    if problem_of(facts) == REGRESSION:
        return f"estimating {shown}{more} of images like those it was trained on, in the unit of its training data."
    return f"sorting images like those it was trained on into {len(labels)} classes: {shown}{more}."


def limits(facts: Facts) -> list[str]:
    """Limitations of the model that follow from the facts, a sentence each."""
    data, results = facts.get("data") or {}, facts.get("results") or []
    sentences = [ALWAYS_ANSWERS[problem_of(facts)]] if classifies(facts) else []
    if tuned := facts.get("thresholds"):
        sentences.append(
            f"The labels' thresholds (`label_thresholds` in config.json) have the highest F1 on the {tuned['n']:,} "
            f"images of {code(tuned['split'])}: the F1 at these thresholds was measured on the same images, and is "
            "better there than elsewhere."
        )
    if data.get("train_images"):
        sentences.append(f"It learned from {data['train_images']:,} images; what they do not show, it has not seen.")
    if results:
        where = sorted({f"{reference(row['dataset'])} ({code(row['split'])})" for row in results})
        sentences.append(
            f"It was measured on {', '.join(where)} and on nothing else: other cameras, styles or groups of people "
            "and things may give other results."
        )
    else:
        sentences.append("It was not measured on held-out images.")
    if data.get("unreadable_images"):
        sentences.append(f"{data['unreadable_images']:,} images of the data could not be read and were left out.")
    return sentences


def results_note(facts: Facts) -> str:
    seed = (facts.get("training") or {}).get("seed")
    text = "± is the standard error that n images leave for one seed, and the standard deviation over several."
    if any(row.get("interval") for row in facts.get("results") or []):
        text = (
            "95 %: the interval that n images leave for one seed (Wilson's for accuracies, the bootstrap's for means "
            "over classes); ±: the standard deviation over seeds."
        )
    return text if seed is None else f"{text} The weights here are those of seed {seed}."


def cross_validation(facts: Facts) -> str:
    """Scores of a cross-validation on its held-out images, for a model that averages its runs; else empty."""
    summary = facts.get("cross_validation")
    if not summary:
        return ""
    scores = []
    for name, value in summary["metrics"].items():
        is_fraction = "accuracy" in name or name in ("mean_per_class", "macro_f1")
        mean, std = (f"{value[key]:.2%}" if is_fraction else f"{value[key]:.4f}" for key in ("mean", "std"))
        scores.append(f"{METRIC_NAMES.get(name, markdown_text(name))} {mean} ± {std}")
    return (
        f"The weights are the average of {summary['folds']} models. Each was trained without another part of the "
        f"training images and scored on it ({summary['n']:,} images in all; mean ± standard deviation): "
        f"{', '.join(scores)}."
    )


# -- tables ------------------------------------------------------------------------------------------------------


def overview(facts: Facts) -> Rows:
    model, architecture = facts["model"], facts["model"]["architecture"]
    depths = architecture.get("resnet_depths")
    return rows(
        ("Parameters", f"{model['parameters']:,}"),
        ("Image size", f"{size(model['image_size'])} px"),
        (
            "Patch",
            f"{size(architecture['patch_size'])} {'px' if depths is None else 'cells of the ResNet map'}"
            if architecture.get("patch_size")
            else None,
        ),
        ("ResNet units per stage", ", ".join(map(str, depths)) or "root only" if depths is not None else None),
        ("Layers", architecture.get("num_hidden_layers")),
        ("Width", architecture.get("hidden_size")),
        ("Heads", architecture.get("num_attention_heads")),
        (OUTPUTS[problem_of(facts)], model["num_labels"] or None),
    )


def result_rows(facts: Facts) -> list[tuple[str, ...]]:
    """One row for each metric, dataset and split; several seeds are summarized."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in facts.get("results") or []:
        groups.setdefault((row["metric"], row["dataset"], row["split"]), []).append(row)
    return [
        (
            markdown_text(metric_name(metric, problem_of(facts))),
            reference(dataset),
            code(split),
            spread_of_results(group),
            f"{group[0]['n']:,}",
            ", ".join(str(row["seed"]) for row in group),
        )
        for (metric, dataset, split), group in sorted(groups.items())
    ]


def spread_of_results(group: list[dict[str, Any]]) -> str:
    """The value of one seed with its 95 % interval or standard error, or the mean and std of several."""
    values, metric = [row["value"] for row in group], group[0]["metric"]
    is_fraction = "accuracy" in metric or metric in FRACTIONS
    mean = sum(values) / len(values)
    if len(values) > 1:
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        lowest, highest = min(values), max(values)
        if is_fraction:
            return f"{mean:.2%} ± {100 * std:.2f} ({lowest:.2%} to {highest:.2%})"
        return f"{mean:.4f} ± {std:.4f} ({lowest:.4f} to {highest:.4f})"
    if group[0].get("interval"):
        low, high = group[0]["interval"]
        return f"{mean:.2%} (95 %: {low:.2%} to {high:.2%})"
    if "accuracy" in metric:
        return f"{mean:.2%} ± {100 * math.sqrt(mean * (1 - mean) / group[0]['n']):.2f}"
    return f"{mean:.2%}" if is_fraction else f"{mean:.4f}"


def data_rows(facts: Facts) -> Rows:
    data = facts.get("data") or {}
    fraction, removed = data.get("train_fraction"), data.get("duplicates_left_out")
    against = (facts.get("training") or {}).get("arguments", {}).get("deduplicate_against")
    return rows(
        ("Dataset", reference(data["name"]) if data.get("name") else None),
        ("Configuration", data.get("config_name")),
        ("Training split", images_of_split(data.get("train_split"), data.get("train_images"))),
        ("Held-out split", images_of_split(data.get("eval_split"), data.get("eval_images"))),
        ("Share of the training split", f"{fraction:.4g}" if fraction not in (None, 1) else None),
        (
            "Left out as duplicates",
            f"{removed:,}, also in {reference(against)}" if against and removed is not None else None,
        ),
        ("Unreadable images left out", data.get("unreadable_images") or None),
        ("Fingerprint", code(data["fingerprint"]) if data.get("fingerprint") else None),
    )


def training_rows(facts: Facts) -> Rows:
    training = facts.get("training") or {}
    recipe = training.get("recipe")
    return rows(
        ("Stage", {"pretrain": "pre-training", "finetune": "fine-tuning"}.get(training.get("stage", ""))),
        ("Recipe", code(short(recipe)) if recipe else None),
        ("Steps", thousands(training.get("steps"))),
        ("Epochs", number(training.get("epochs"))),
        ("Batch size, all processes together", thousands(training.get("global_batch_size"))),
        ("Seed", training.get("seed")),
        ("Last training loss", number(training.get("final_loss"))),
    )


def argument_rows(arguments: dict[str, Any]) -> Rows:
    """Settings as table rows, without local paths and tokens."""
    shown = {key: value for key, value in arguments.items() if not OMITTED_ARGUMENTS.match(key)}
    return [(code(key), code(setting(value))) for key, value in sorted(shown.items())]


def sweep_rows(tried: list[dict[str, Any]]) -> Rows:
    """Each setting of a sweep, and its score on the dev split."""
    return [
        (
            ", ".join(f"{name} = {value}" for name, value in argument_rows(row["values"])),
            spread_of_results([{"metric": "accuracy", "value": row["dev_accuracy"], "n": row["n"]}])
            + f", n = {row['n']:,}",
        )
        for row in tried
    ]


def compute_rows(facts: Facts) -> Rows:
    compute, training = facts.get("compute") or {}, facts.get("training") or {}
    flops, exa, hours = (compute.get(key) for key in ("forward_flops_per_image", "train_exaflops", "device_hours"))
    return rows(
        ("Forward pass, one image", f"{flops / 1e9:.4g} GFLOPs" if flops else None),
        ("Training, all images", f"{exa:.4g} exaFLOPs" if exa else None),
        ("Device time", f"{hours:.4g} h" if hours else None),
        ("Wall-clock time", f"{training['seconds']:,.1f} s" if training.get("seconds") else None),
        ("Images per second", number(training.get("images_per_second"))),
    )


def environment_rows(facts: Facts) -> Rows:
    names = {
        "hardware": "Hardware",
        "device": "Device",
        "cores": "CPU cores",
        "threads": "CPU threads",
        "num_processes": "Processes",
        "precision": "Precision",
        "python": "Python",
        "commit": "Commit of hf_vit",
        "date": "Date",
    }
    environment = facts.get("environment") or {}
    return rows(*((names.get(key, key), value) for key, value in environment.items()))


# -- values in Markdown ------------------------------------------------------------------------------------------


def rows(*pairs: tuple[str, Any]) -> Rows:
    """Table rows, without those that have no value."""
    return [
        (name, value if isinstance(value, str) and "`" in value else markdown_text(value))
        for name, value in pairs
        if value not in (None, "")
    ]


def markdown_text(value: Any) -> str:
    """Text with Markdown's special characters escaped, fit for a table."""
    return re.sub(r"([|<>*_\[\]#`\\])", r"\\\1", " ".join(str(value).split()))


def code(value: Any) -> str:
    """Text as code, fit for a Markdown table."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"


def setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(rounded(value))


def rounded(value: Any) -> Any:
    """Floats rounded to six significant digits, also in lists and mappings."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def count(parameters: int) -> str:
    """86,567,656 as `86.6 million`."""
    return f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"


def number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def thousands(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def size(value: int | Iterable[int]) -> str:
    """`224 x 224` of (224, 224) or 224."""
    return f"{value} x {value}" if isinstance(value, int) else " x ".join(str(side) for side in value)


def images_of_split(split: str | None, images: int | None) -> str | None:
    if not split:
        return None
    return code(split) + (f", {images:,} images" if images is not None else "")


def figure_caption(figure: str) -> str:
    return Path(figure).stem.replace("_", " ").capitalize()


def is_hub_id(name: str) -> bool:
    """Whether a name is a Hub id `owner/name`; folders are in facts by their last part, without a slash."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def short(name: str) -> str:
    """A Hub id unchanged; of a path only the last part, which reveals nothing of the machine."""
    return name if is_hub_id(name) else Path(name).name or name


def reference(name: str) -> str:
    return code(short(name))
