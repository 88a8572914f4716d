"""Evaluate many data sets by one protocol, next to published results; resumes where it stopped.

For score.py (`--suite NAME`). suites.yaml has the tasks, the protocol and the published rows with their sources. A
data set that is not available has no score and is listed; a mean that needs it is left out.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from hf_vit.atomic_file import atomic_write
from hf_vit.errors import HFViTError

from ..config.parser import parse as parse_training
from ..data.dataset import ImageDataset
from ..data.shards.shard_files import is_shard_pattern
from ..data.sources import digest
from ..engine.checkpoints.checkpoint_io import write_json
from ..metrics.accuracy.accuracy import accuracy
from ..metrics.mean_per_class.mean_per_class import mean_per_class
from ..reporting.facts import FACTS_NAME, environment_facts, public_name
from ..sweep import best, sweep
from ..train import run
from .classifier import Classifier
from .evaluate_classifier import EvalContext, preprocessing, score_dataset
from .features import compute_features, model_fingerprint
from .few_shot import RidgeProbe
from .label_mapping import match_labels
from .score_model import open_scored_model, open_scored_split, output_names, real_labels
from .throughput import measure_speed


SUITES = Path(__file__).with_name("suites.yaml")
SUITE_NAME, TABLE_NAME = "suite.json", "suite.md"
MAX_ON_SCREEN = 5  # published rows next to ours on the screen; the file has all
# Table 4 and B.1.1 of arXiv:2010.11929; VTAB "at a resolution of 384 for all tasks".
FINE_TUNING = {
    "image_size": 384, "optim": "sgd", "lr_scheduler_type": "cosine", "weight_decay": 0, "max_grad_norm": 1,
}  # fmt: skip
GLOBAL_BATCH = 512
NOT_IN_FINGERPRINT = ("where", "no_speed", "use_cpu", "dataloader_num_workers", "cache_dir", "data", "output_dir")
VTAB_GROUPS = ("natural", "specialized", "structured")


def read_suites(path: Path) -> dict[str, Any]:
    """The content of suites.yaml, with the VTAB protocol filled into its tasks."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for task in content["tasks"].values():
        defaults = {"method": "transfer", "split": "test", "train_split": "train"}
        task |= {**defaults, **(content["vtab_protocol"] if "vtab" in task else {}), **task}
    return content


def tasks_of(suite: str, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of a suite, in order; `vtab` stands for its 19."""
    if suite not in content["suites"]:
        raise HFViTError(f"--suite {suite}: choose one of {', '.join(content['suites'])}")
    tasks = content["tasks"]
    names = [
        member
        for name in content["suites"][suite]
        for member in ([task for task in tasks if "vtab" in tasks[task]] if name == "vtab" else [name])
    ]
    return {name: tasks[name] for name in names}


def run_suite(args: argparse.Namespace, context: EvalContext) -> dict[str, Any]:
    """Run every task of the suite, then print our row next to the published ones.

    Returns:
        The facts, as they are in suite.json.
    """
    content = read_suites(SUITES)
    tasks, main = tasks_of(args.suite, content), context.accelerator.is_main_process
    local = local_copies(args.data, tasks)
    folder = Path(args.output_dir)
    classifier = open_scored_model(args, context)
    facts = {
        "suite": args.suite,
        "model": {"name": public_name(args.model), "parameters": classifier.parameters},
        "transfer": args.transfer,
        "preprocessing": preprocessing(classifier, args.tta),
        "environment": environment_facts(context.accelerator, "bf16" if context.bf16 else "fp32"),
        "tasks": {},
    }
    weights = model_fingerprint(classifier.model)
    for name, task in tasks.items():
        chosen = task_arguments(args, task, local.get(name))
        chosen.fingerprint = fingerprint = fingerprint_of(weights, task, chosen)
        file = folder / "tasks" / f"{name}.json"
        result = kept_result(file, fingerprint)
        if result is not None and name in local:
            refuse_changed(result["data"], chosen, task, file)
        if result is None:
            result = {"fingerprint": fingerprint, **run_task(name, task, chosen, classifier, context)}
            if main:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, result)
        facts["tasks"][name] = {key: value for key, value in result.items() if key != "fingerprint"}
        if main:
            print(f"  {name}: {task_in_words(result)}", flush=True)
        context.accelerator.wait_for_everyone()
    if not args.no_speed:
        facts["speed"] = measure_speed(classifier, context)
    facts["means"] = means(facts["tasks"], tasks)
    facts["published"] = published(content, facts, tasks)
    if main:
        write_json(folder / SUITE_NAME, facts)
        atomic_write(folder / TABLE_NAME, markdown(facts, tasks))
        print(columns(rows_of(facts, tasks, MAX_ON_SCREEN)))
        if "speed" in facts:
            print(cost_in_words(facts["speed"]))
        print(f"written to {folder}")
    context.accelerator.wait_for_everyone()
    return facts


def local_copies(pairs: list[str], tasks: dict[str, Any]) -> dict[str, str]:
    """`TASK=PATH` arguments as a mapping."""
    copies = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise HFViTError(f"--data {pair}: give TASK=PATH, such as cifar10=path/to/cifar10")
        if name not in tasks:
            raise HFViTError(f"--data {pair}: the suite has no task '{name}'; its tasks are {', '.join(tasks)}")
        copies[name] = path
    return copies


def fingerprint_of(weights: str, task: dict[str, Any], chosen: argparse.Namespace) -> str:
    """A hash of everything that a task's result depends on."""
    settings = {key: str(value) for key, value in vars(chosen).items() if key not in NOT_IN_FINGERPRINT}
    return digest(weights, sorted(task.items()), sorted(settings.items()))


def kept_result(file: Path, fingerprint: str) -> dict[str, Any] | None:
    """The finished result of an earlier run of the task with the same weights and settings, if there is one."""
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return result if result.get("fingerprint") == fingerprint and result["status"] == "done" else None


def read_copy(args: argparse.Namespace, task: dict[str, Any]) -> tuple[ImageDataset, dict[str, Any]]:
    """The test split, and the data that a result depends on: {split: {"images", "fingerprint"}}.

    Raises:
        HFViTError: the data cannot be opened, or has other labels.
    """
    test = open_scored_split(args, args.split)
    check_classes(test, task)
    opened = {args.split: test}
    if task["method"] == "transfer":
        opened[args.train_split] = open_scored_split(args, args.train_split, test.label_names)
    return test, {split: {"images": len(data), "fingerprint": data.fingerprint} for split, data in opened.items()}


def refuse_changed(result: dict[str, Any], args: argparse.Namespace, task: dict[str, Any], file: Path) -> None:
    """Raise HFViTError if a local copy has changed since a kept result was measured; says what changed."""
    if not is_shard_pattern(args.dataset) and not Path(args.dataset).expanduser().exists():
        return  # deleted after it was measured
    now = read_copy(args, task)[1]
    for split, facts in now.items():
        before = result[split]
        if facts != before:
            raise HFViTError(
                f"'{args.dataset}' has changed since {file} was written: {split} had {before['images']:,} images, "
                f"now has {facts['images']:,}, and not the same ones; put it back, or remove that file and measure "
                "again"
            )


def task_arguments(args: argparse.Namespace, task: dict[str, Any], local: str | None) -> argparse.Namespace:
    """The options for the task's data set."""
    chosen = copy.copy(args)
    chosen.dataset, chosen.split, chosen.train_split = local or task["dataset"], task["split"], task["train_split"]
    column = task.get("label_column", "")
    chosen.label_column = args.label_column or (column if "//" in column or not local else "") or None
    chosen.label_subset, chosen.suite, chosen.data, chosen.output_dir = task.get("label_subset"), None, [], None
    chosen.where = args.output_dir
    if not task.get("real"):
        chosen.real_labels = None
    return chosen


def run_task(
    name: str, task: dict[str, Any], args: argparse.Namespace, classifier: Classifier, context: EvalContext
) -> dict[str, Any]:
    """Run one task: {"status": "done", "accuracy", "n", ...}, or a status with the reason why there is no score."""
    try:
        test, data = read_copy(args, task)
    except (HFViTError, OSError) as error:
        return {"status": "not available", "reason": str(error)}
    try:
        if task["method"] == "head":
            result = {"method": "head", **score_head(task, args, classifier, test, context)}
        elif args.transfer == "probe":
            result = {"method": "ridge probe", **linear_probe(args, classifier, test, context)}
        else:
            args.fingerprint = digest(args.fingerprint, data)  # another copy, another run
            result = {"method": "fine-tuning", **fine_tune(name, task, args, context)}
        return {"status": "done", **result, "data": data}
    except HFViTError as error:
        return {"status": "failed", "reason": str(error)}


def check_classes(test: ImageDataset, task: dict[str, Any]) -> None:
    """Raise HFViTError for a copy with another number of classes."""
    if len(test.label_names) != task["classes"]:
        raise HFViTError(f"'{test.name}' has {len(test.label_names)} classes, the task has {task['classes']}")


def score_head(
    task: dict[str, Any], args: argparse.Namespace, classifier: Classifier, test: ImageDataset, context: EvalContext
) -> dict[str, Any]:
    """Score the model's own head, on ImageNet or one of its variants."""
    match = match_labels(test.label_names, output_names(classifier), args.label_map, args.label_subset)
    real = None
    if task.get("real"):
        if args.real_labels is None:
            raise HFViTError("this suite scores on ReaL labels: give --real_labels real.json")
        real = real_labels(args.real_labels, test, match)
    scores = score_dataset(classifier, test, match, context, args.tta, real).metrics.scores()
    value, count = scores["real_accuracy" if task.get("real") else "accuracy"]
    return {"accuracy": value, "n": count, "labels": match.how}


def linear_probe(
    args: argparse.Namespace, classifier: Classifier, test: ImageDataset, context: EvalContext
) -> dict[str, Any]:
    """Ridge regression on the frozen features of all training images."""
    train = open_scored_split(args, args.train_split, test.label_names)
    learned = compute_features(classifier, train, context, args.cache_dir)
    scored = compute_features(classifier, test, context, args.cache_dir)
    predicted = RidgeProbe(args.l2).fit(learned.features, learned.labels).predict(scored.features)
    return {
        "accuracy": accuracy(predicted, scored.labels),
        "mean_per_class": mean_per_class(predicted, scored.labels),
        "n": len(scored.labels),
        "train_images": len(learned.labels),
    }


def fine_tune(name: str, task: dict[str, Any], args: argparse.Namespace, context: EvalContext) -> dict[str, Any]:
    """The paper's protocol: choose the learning rate on a part of the training images, then train on all of them.

    A finished run is not repeated, an unfinished one continues; other settings have other folders.
    """
    folder = Path(args.where) / "runs" / f"{name}-{args.fingerprint[:8]}"
    arguments = parse_training(training_flags(folder, task, args, context), "finetune")
    if (folder / FACTS_NAME).is_file():
        facts = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))
    elif arguments.train.sweep:
        facts = sweep(arguments, "finetune", run, more_follow=True)
    else:
        facts = run(arguments, "finetune", more_follow=True)
    if not facts:
        raise HFViTError("stopped by a signal: run the same command again to continue")
    accuracy = next(row for row in facts["results"] if row["metric"] == "accuracy")
    chosen, tried = {"learning_rate": arguments.train.learning_rate}, facts["training"].get("sweep", [])
    if tried:
        chosen = {**best(tried), "tried": tried}
    return {"accuracy": accuracy["value"], "n": accuracy["n"], "seed": accuracy["seed"], **chosen}


def training_flags(folder: Path, task: dict[str, Any], args: argparse.Namespace, context: EvalContext) -> list[str]:
    """Flags of training.finetune for the protocol; `--finetune_set` overrides them."""
    flags = {}
    for pair in args.finetune_set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise HFViTError(f"--finetune_set {pair}: give NAME=VALUE, such as image_size=224")
        flags[key] = value
    rates, step_images = task["learning_rates"], context.batch_size * context.accelerator.num_processes
    settings = {
        **FINE_TUNING,
        "model": args.model,
        "dataset": args.dataset,
        "train_split": args.train_split,
        "eval_split": args.split,
        "output_dir": folder,
        "max_steps": task["steps"],
        "learning_rate": rates[0],
        "per_device_train_batch_size": context.batch_size,
        "gradient_accumulation_steps": max(1, GLOBAL_BATCH // step_images),
        "dataloader_num_workers": context.workers,
        "bf16": context.bf16,
        "use_cpu": args.use_cpu,
    }
    if len(rates) > 1 and "learning_rate" not in flags:
        settings["sweep"] = f"learning_rate=[{','.join(map(str, rates))}]"
    if "sweep" in settings | flags:
        settings["dev_fraction"] = task["dev_fraction"]
    if folder.is_dir() and any(folder.iterdir()):
        settings["resume_from_checkpoint"] = True
    for key in ("dataset_config_name", "image_column", "label_column", "cache_dir"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    settings["on_decode_error"] = args.on_decode_error
    return [word for key, value in (settings | flags).items() for word in (f"--{key}", str(value))]


# -- the table -------------------------------------------------------------------------------------------------------


def means(results: dict[str, dict[str, Any]], tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """VTAB's means over all 19 tasks and over each group, if all of its tasks have a score."""
    groups = {"vtab_mean": [name for name in tasks if "vtab" in tasks[name]]}
    groups |= {f"vtab_{group}": [name for name in tasks if tasks[name].get("vtab") == group] for group in VTAB_GROUPS}
    return {
        group: statistics.fmean(results[name]["accuracy"] for name in names)
        for group, names in groups.items()
        if names and all(results[name]["status"] == "done" for name in names)
    }


def published(content: dict[str, Any], facts: dict[str, Any], tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """Published rows with a score on one of the tasks; with group means if all tasks of the group are given."""
    rows = []
    for entry in content["published"]:
        scores = {name: entry[name] / 100 for name in (*tasks, "vtab_mean") if name in entry}
        results = {name: {"status": "done" if name in scores else "", "accuracy": scores.get(name)} for name in tasks}
        if scores.keys() & tasks.keys():
            scores = means(results, tasks) | scores
            rows.append({"model": entry["model"], "source": entry["source"], "scores": scores})
    return rows


def task_in_words(result: dict[str, Any]) -> str:
    """A task's result on one line."""
    if result["status"] != "done":
        return f"{result['status']} ({result['reason']})"
    return f"{result['accuracy']:.2%} (n = {result['n']:,}, {result['method']})"


def cost_in_words(speed: dict[str, Any]) -> str:
    """The cost of the model, on one line."""
    return (
        f"{speed['parameters']:,} parameters, {speed['gmacs']:.4g} GMACs, {speed['images_per_second']:,.1f} images/s, "
        f"latency p50 {speed['latency_p50_ms']:.2f} ms, p99 {speed['latency_p99_ms']:.2f} ms, "
        f"memory peak {speed['memory_peak_bytes'] / 2**30:.2f} GiB"
    )


def rows_of(facts: dict[str, Any], tasks: dict[str, Any], others: int | None = None) -> list[list[str]]:
    """Cells of the table: one line per task and mean, one column for ours and per published model."""
    rows = facts["published"][:others]
    table = [["", f"{facts['model']['name']} (ours)", *(row["model"] for row in rows)]]
    for name, task in tasks.items():
        result = facts["tasks"][name]
        ours = f"{result['accuracy']:.2%}" if result["status"] == "done" else result["status"]
        title = f"VTAB {task['title']}" if "vtab" in task else task["title"]
        table.append([title, ours, *(cell(row, name) for row in rows)])
    if any("vtab" in task for task in tasks.values()):
        for name in ("vtab_mean", *(f"vtab_{group}" for group in VTAB_GROUPS)):
            ours = f"{facts['means'][name]:.2%}" if name in facts["means"] else "-"
            table.append([name.replace("_", " "), ours, *(cell(row, name) for row in rows)])
    return table


def cell(row: dict[str, Any], name: str) -> str:
    return f"{row['scores'][name]:.2%}" if name in row["scores"] else "-"


def columns(table: list[list[str]]) -> str:
    """The table as aligned text."""
    widths = [max(len(line[index]) for line in table) for index in range(len(table[0]))]
    return "\n".join("  ".join(f"{text:<{width}}" for text, width in zip(line, widths)).rstrip() for line in table)


def markdown(facts: dict[str, Any], tasks: dict[str, Any]) -> str:
    """The whole table in Markdown, with its sources and the tasks without a score."""
    head, *body = rows_of(facts, tasks)
    lines = [f"# Suite {facts['suite']}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(line) + " |" for line in body]
    missing = [f"- {name}: {result['status']}. {result['reason']}" for name, result in facts["tasks"].items()
               if result["status"] != "done"]  # fmt: skip
    lines += ["", "Without a score:", "", *missing] if missing else []
    lines += ["", "Sources:", "", *(f"- {row['model']}: {row['source']}" for row in facts["published"])]
    return "\n".join(lines) + "\n"
