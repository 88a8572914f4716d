"""The model card of a trained model: its README.md, rendered from the facts.json of training.

The text is in `model_card_template.md` and `card_text.py`; a section without measured facts is left out. Metadata
(front matter and `model-index`) follow https://huggingface.co/docs/hub/model-cards through huggingface_hub's classes.
Not transformers' `TrainingSummary`: it needs transformers' Trainer, and holds only what that measured.
"""

from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..atomic_file import atomic_write
from ..errors import HFViTError
from ..image_processing import read_settings
from ..problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .card_text import (
    Facts,
    argument_rows,
    card_summary,
    classifies,
    compute_rows,
    cross_validation,
    data_rows,
    environment_rows,
    figure_caption,
    intended_use,
    is_hub_id,
    is_ours,
    limits,
    markdown_text,
    metric_name,
    overview,
    problem_of,
    result_rows,
    results_note,
    short,
    sweep_rows,
    title_of,
    training_rows,
)


FACTS, EVAL_RESULTS = "facts.json", ".eval_results"
REPORT, REPORT_FILE = "report", "report.html"  # the fact that permits uploading the report, with its images
TEMPLATE = Path(__file__).with_name("model_card_template.md")
NEEDED_OF_MODEL = {"name": str, "architecture": dict, "parameters": int, "image_size": list, "num_labels": int}
METRIC_IDS = ("accuracy", "mae", "mean_average_precision")  # metrics in the front matter: ids of the Hub
AFTER_TRAINING = "measured at the end of training"  # marks files of `.eval_results` that may be replaced


def load_facts(folder: str | Path) -> Facts:
    """The facts that training wrote into a folder.

    Raises:
        HFViTError: no such file, not JSON, or without a required field, which is named.
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
    """Raise HFViTError, which names the fields, if required ones are missing or of the wrong type."""
    model = facts.get("model") if isinstance(facts, dict) else None
    if not isinstance(model, dict):
        raise HFViTError(f"{FACTS} has no 'model': it is not one that training wrote")
    missing = [f"model.{key}" for key in NEEDED_OF_MODEL if model.get(key) is None]
    for number, result in enumerate(facts.get("results") or []):
        required = ("dataset", "split", "metric", "value", "n", "seed")
        missing += [f"results[{number}].{key}" for key in required if result.get(key) is None]
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
            atomic_write(results, text)  # a later, fuller evaluation on the same dataset is not replaced
    return path


def render_eval_results(facts: Facts) -> dict[str, str]:
    """{`.eval_results/NAME.yaml`: text} of accuracies on datasets of the Hub, for the Hub's leaderboards.

    https://huggingface.co/docs/hub/eval-results: an entry needs a dataset id, so there is none for local images.
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
    """The results of the weights in the folder, not those of other seeds."""
    seed = (facts.get("training") or {}).get("seed")
    return [row for row in facts.get("results") or [] if seed in (None, row["seed"])]


def render_card(facts: Facts, folder: str | Path | None = None, repo_id: str | None = None) -> str:
    """The text of a card, metadata first.

    Args:
        facts: as `load_facts` returns them.
        folder: of the figures; missing ones are left out. None: all figures in the facts are shown.
        repo_id: Hub repository in the code block; by default the model's name.

    Raises:
        HFViTError: facts of a kind that training does not write.
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
    """Whether the report of the run, with its images, may be published with the card."""
    return facts.get(REPORT) == REPORT_FILE


def metadata(facts: Facts) -> ModelCardData:
    """Front matter for the Hub; `model-index` holds the results of this model's seed."""
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
