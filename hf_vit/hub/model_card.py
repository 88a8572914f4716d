"""Facts in, card out: the README.md of a trained model, rendered from the facts.json that its training wrote.

The wording is `model_card_template.md`; a section whose facts were not measured is left out. Metadata (front matter
and `model-index`) follow https://huggingface.co/docs/hub/model-cards through huggingface_hub's own classes. Not
transformers' `TrainingSummary`: it needs transformers' Trainer, and has no place for what was measured besides.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..atomic_file import atomic_write
from ..errors import HFViTError
from ..image_processing import read_settings
from ..problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL


Facts = dict[str, Any]
Rows = list[tuple[str, str]]

FACTS, EVAL_RESULTS = "facts.json", ".eval_results"
REPORT, REPORT_FILE = "report", "report.html"  # facts that name the page: its images may be shown, and it is uploaded
TEMPLATE = Path(__file__).with_name("model_card_template.md")
NEEDED_OF_MODEL = {"name": str, "architecture": dict, "parameters": int, "image_size": list, "num_labels": int}
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
SHARES = (  # metrics in percent, besides accuracies
    "mean_per_class", "macro_f1", "micro_f1", "mean_average_precision", "macro_f1_at_thresholds",
    "micro_f1_at_thresholds",
)  # fmt: skip
OUTPUTS = {SINGLE_LABEL: "Classes", MULTI_LABEL: "Labels", REGRESSION: "Numbers"}
ALWAYS_ANSWERS = {
    SINGLE_LABEL: "Every image is given one of these labels, also one that shows something else.",
    MULTI_LABEL: "Each label has a score of its own; what is none of these labels is not found.",
    REGRESSION: "Every image is given a number, also one that shows something else.",
}
METRIC_IDS = ("accuracy", "mae", "mean_average_precision")  # named in the front matter
SHOWN_LABELS = 40
AFTER_TRAINING = "measured at the end of training"
# Arguments that say where things lie on the machine of the run, and what the card says elsewhere in its own words.
UNSAID_ARGUMENTS = re.compile(
    r"(.*_dir|config|dataset|model|deduplicate_against|resume_from_checkpoint|report_to|push_to_hub|hub_.*|.*token.*|seed)$"
)


def load_facts(folder: str | Path) -> Facts:
    """The facts that training wrote into a folder.

    Raises:
        HFViTError: no such file, not JSON, or without what every card needs (named).
    """
    path = Path(folder) / FACTS
    if not path.is_file():
        raise HFViTError(
            f"no {FACTS} in {folder}: a card is rendered from the facts that training.finetune writes there"
        )
    facts = read_settings(path)
    check_facts(facts)
    return facts


def check_facts(facts: Facts) -> None:
    """Raise HFViTError naming the fields that a card cannot do without."""
    model = facts.get("model") if isinstance(facts, dict) else None
    if not isinstance(model, dict):
        raise HFViTError(f"{FACTS} has no 'model': it is not one that training wrote")
    missing = [f"model.{key}" for key in NEEDED_OF_MODEL if model.get(key) is None]
    for number, result in enumerate(facts.get("results") or []):
        whole = ("dataset", "split", "metric", "value", "n", "seed")
        missing += [f"results[{number}].{key}" for key in whole if result.get(key) is None]
    if missing:
        raise HFViTError(f"{FACTS} lacks {', '.join(missing)}: train again, or add what was measured")
    wrong = [f"model.{key}" for key, kind in NEEDED_OF_MODEL.items() if not isinstance(model[key], kind)]
    if wrong:
        raise HFViTError(f"{FACTS} holds another kind of value than training writes in {', '.join(wrong)}")


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Render the facts of a folder into its README.md and `.eval_results/`; returns the path of README.md."""
    path, facts = Path(folder) / "README.md", load_facts(folder)
    atomic_write(path, render_card(facts, folder, repo_id))
    for name, text in render_eval_results(facts).items():
        results = path.parent / name
        results.parent.mkdir(exist_ok=True)
        if not results.is_file() or AFTER_TRAINING in results.read_text(encoding="utf-8"):
            atomic_write(results, text)  # a fuller measurement of the same data set stays
    return path


def render_eval_results(facts: Facts) -> dict[str, str]:
    """{`.eval_results/NAME.yaml`: text} of accuracies on data sets of the Hub, where the Hub's leaderboards read them.

    https://huggingface.co/docs/hub/eval-results: an entry needs a data set with an id, so local images have none.
    """
    config, date = (facts.get("data") or {}).get("config_name"), (facts.get("environment") or {}).get("date")
    files: dict[str, str] = {}
    for row in own_results(facts):
        if row["metric"] == "accuracy" and is_hub_id(row["dataset"]):
            where = f"split {row['split']}" + (f" of configuration {config}" if config else "")
            notes = f"percent; {AFTER_TRAINING}, {where}, n = {row['n']}, seed {row['seed']}"
            value = round(100 * row["value"], 4)
            entry = EvalResultEntry(row["dataset"], row["metric"], value, date=date, notes=notes)
            name = f"{EVAL_RESULTS}/{row['dataset'].replace('/', '--')}.yaml"
            files[name] = files.get(name, "") + yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def own_results(facts: Facts) -> list[dict[str, Any]]:
    """The results of the weights that the card stands beside, not those of other seeds."""
    own_seed = (facts.get("training") or {}).get("seed")
    return [row for row in facts.get("results") or [] if own_seed in (None, row["seed"])]


def render_card(facts: Facts, folder: str | Path | None = None, repo_id: str | None = None) -> str:
    """The text of a card, metadata first.

    Args:
        facts: as `load_facts` returns them.
        folder: where the figures lie; one that does not exist there is left out. None shows all that facts name.
        repo_id: Hub repository that the code block loads; the model's name where None.

    Raises:
        HFViTError: facts that training does not write.
    """
    check_facts(facts)
    try:
        return _card_text(facts, folder, repo_id)
    except HFViTError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, jinja2.TemplateError) as error:
        raise HFViTError(f"{FACTS} holds what training does not write there ({error}): restore the file") from error


def _card_text(facts: Facts, folder: str | Path | None, repo_id: str | None) -> str:
    model = facts["model"]
    figures = [name for name in facts.get("figures") or [] if folder is None or (Path(folder) / name).is_file()]
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=markdown_text(title_of(facts)),
        model_id=repo_id or title_of(facts),
        classifies=classifies(facts),
        ours=is_ours(facts),
        several=problem_of(facts) == MULTI_LABEL,
        numbers=problem_of(facts) == REGRESSION,
        gray=(model.get("architecture") or {}).get("num_channels") == 1,
        larger=2 * max(model["image_size"]),
        summary=card_summary(facts),
        overview=overview(facts),
        intended=intended_use(facts),
        limits=limits(facts),
        results=result_rows(facts),
        results_note=results_note(facts),
        cross_validation=cross_validation(facts),
        data=data_rows(facts),
        training=training_rows(facts),
        arguments=argument_rows(facts.get("training", {}).get("arguments") or {}),
        sweep=sweep_rows(facts.get("training", {}).get("sweep") or []),
        augmentation=argument_rows(facts.get("training", {}).get("augmentation") or {}),
        figures=[
            (name, figure_caption(name), markdown_text((facts.get("captions") or {}).get(name, "")))
            for name in figures
        ],
        report=REPORT_FILE
        if shows_report(facts) and (folder is None or (Path(folder) / REPORT_FILE).is_file())
        else "",
        compute=compute_rows(facts),
        environment=environment_rows(facts),
        has_base=bool(model.get("base_model")),
        weights_license=facts.get("license"),
    )
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}"


def shows_report(facts: Facts) -> bool:
    """Whether the page about the run, with its images, may be seen by whoever sees the card."""
    return facts.get(REPORT) == REPORT_FILE


def metadata(facts: Facts) -> ModelCardData:
    """Front matter: what the Hub files the model under. `model-index` holds the results of this model's own seed."""
    model, data = facts["model"], facts.get("data") or {}
    results = own_results(facts)
    architecture = model["architecture"]
    task = "image-classification" if classifies(facts) else "image-feature-extraction"
    tags = [task, "vision", *(["vit", "hf_vit"] if is_ours(facts) else [model["model_type"]])]
    tags += ["hybrid"] if architecture.get("resnet_depths") is not None else []
    base, dataset = model.get("base_model"), data.get("name", "")
    return ModelCardData(
        license=facts.get("license", "apache-2.0"),
        license_name=facts.get("license_name"),
        license_link=facts.get("license_link"),
        library_name="transformers",
        pipeline_tag=task,
        tags=tags,
        base_model=base if base and is_hub_id(base) else None,
        datasets=[dataset] if is_hub_id(dataset) else None,
        metrics=sorted({row["metric"] for row in results if row["metric"] in METRIC_IDS}) or None,
        model_name=title_of(facts),
        eval_results=[eval_result(row, data, classifies(facts), problem_of(facts)) for row in results] or None,
    )


def eval_result(
    row: dict[str, Any], data: dict[str, Any], classifies: bool = True, problem_type: str = SINGLE_LABEL
) -> EvalResult:
    """One entry of `model-index`."""
    return EvalResult(
        task_type="image-classification" if classifies else "image-feature-extraction",
        dataset_type=short(row["dataset"]),
        dataset_name=short(row["dataset"]),
        dataset_config=data.get("config_name"),
        dataset_split=row["split"],
        metric_type=row["metric"],
        metric_name=metric_name(row["metric"], problem_type),
        metric_value=row["value"],
        metric_args={"n": row["n"], "seed": row["seed"]},
    )


# -- sentences ---------------------------------------------------------------------------------------------------


def classifies(facts: Facts) -> bool:
    """Whether the model has classes; one that predicted masked patches has none."""
    return facts["model"]["num_labels"] > 0


def problem_of(facts: Facts) -> str:
    """What the outputs mean, in transformers' words."""
    return facts["model"].get("problem_type") or SINGLE_LABEL


def metric_name(metric: str, problem_type: str) -> str:
    """What people call a metric; of one of several numbers with its name: `Mean absolute error of height`."""
    if metric == "loss":
        return LOSS_NAMES.get(problem_type, METRIC_NAMES["loss"])
    kind, _, number = metric.partition("_")
    if problem_type == REGRESSION and number and kind in METRIC_NAMES:
        return f"{METRIC_NAMES[kind].split(' (')[0]} of {number}"
    return METRIC_NAMES.get(metric, metric)


def title_of(facts: Facts) -> str:
    """The model's name without what stands before the last slash."""
    return Path(facts["model"]["name"]).name


def is_ours(facts: Facts) -> bool:
    """Whether the network is one of hf_vit's, and none of transformers' other classifiers."""
    return facts["model"].get("model_type", "hf_vit") == "hf_vit"


def kind(facts: Facts) -> str:
    """`Vision Transformer`, the hybrid that it is, or the name that transformers has for another network."""
    if not is_ours(facts):
        return code(str(facts["model"].get("class") or facts["model"]["model_type"]))
    depths = facts["model"]["architecture"].get("resnet_depths")
    if depths is None:
        return "Vision Transformer"
    return f"hybrid Vision Transformer on a ResNet of {sum(depths) * 3 + 1} convolutions"


def card_summary(facts: Facts) -> str:
    """What it is, in a sentence or two."""
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
    shown = ", ".join(code(label).replace("\\|", "|") for label in labels[:SHOWN_LABELS])  # no table here
    more = f" and {len(labels) - SHOWN_LABELS} more (`id2label` in config.json)" if len(labels) > SHOWN_LABELS else ""
    if problem_of(facts) == MULTI_LABEL:
        return f"finding the labels of images like those it was trained on: {shown}{more}."
    if problem_of(facts) == REGRESSION:
        return f"estimating {shown}{more} of images like those it was trained on, in the unit of its training data."
    return f"sorting images like those it was trained on into {len(labels)} classes: {shown}{more}."


def limits(facts: Facts) -> list[str]:
    """What the facts say that the model cannot be trusted with."""
    data, results = facts.get("data") or {}, facts.get("results") or []
    said = [ALWAYS_ANSWERS[problem_of(facts)]] if classifies(facts) else []
    if tuned := facts.get("thresholds"):
        said.append(
            f"The labels' thresholds (`label_thresholds` in config.json) have the highest F1 on the {tuned['n']:,} "
            f"images of {code(tuned['split'])}: the F1 at these thresholds was measured on the same images, and is "
            "better there than elsewhere."
        )
    if data.get("train_images"):
        said.append(f"It learned from {data['train_images']:,} images; what they do not show, it has not seen.")
    if results:
        where = sorted({f"{reference(row['dataset'])} ({code(row['split'])})" for row in results})
        said.append(f"It was measured on {', '.join(where)} and on nothing else: other cameras, styles or groups of")
        said[-1] += " people and things may give other results."
    else:
        said.append("It was not measured on held-out images.")
    if data.get("unreadable_images"):
        said.append(f"{data['unreadable_images']:,} images of the data could not be read and were left out.")
    return said


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
    """What the runs of a cross-validation, whose average this model is, scored on the images that they held out."""
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
    """One row for each metric, dataset and split; several seeds are summed up."""
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
    """The value of one seed with its 95 % interval or standard error, or the mean of several with their deviation."""
    values, metric = [row["value"] for row in group], group[0]["metric"]
    is_fraction = "accuracy" in metric or metric in SHARES
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
    """Settings as table rows, without places on a disk and without anything called a token."""
    shown = {key: value for key, value in arguments.items() if not UNSAID_ARGUMENTS.match(key)}
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


# -- words -------------------------------------------------------------------------------------------------------


def rows(*pairs: tuple[str, Any]) -> Rows:
    """Table rows, those without a value left out."""
    return [
        (name, value if isinstance(value, str) and "`" in value else markdown_text(value))
        for name, value in pairs
        if value not in (None, "")
    ]


def markdown_text(value: Any) -> str:
    """Text that neither breaks a Markdown table nor turns into markup."""
    return re.sub(r"([|<>*_\[\]#`\\])", r"\\\1", " ".join(str(value).split()))


def code(value: Any) -> str:
    """Text as code, fit for a Markdown table."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"


def setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(rounded(value))


def rounded(value: Any) -> Any:
    """Numbers with six digits, also those in lists and mappings: a third is 0.333333."""
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
    """Whether a name is `owner/name` as the Hub writes it; facts name a folder by its end, without a slash."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def short(name: str) -> str:
    """A Hub id as it is; of a path only the last part, which says nothing about the machine."""
    return name if is_hub_id(name) else Path(name).name or name


def reference(name: str) -> str:
    return code(short(name))
