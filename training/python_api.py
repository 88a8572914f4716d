"""Training from Python: `finetune(...)` and `pretrain(...)` of `training`, and what they return."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_vit.errors import HFViTError
from hf_vit.image_io import open_image
from hf_vit.problem_type import MULTI_LABEL, SINGLE_LABEL, output_scores, problem_type_of, thresholds_of
from hf_vit.transformers_classifiers import num_channels

from .config.arguments import Arguments
from .config.parser import arguments_of
from .engine.distributed import handle_peer_exit
from .engine.trainer import Trainer
from .folds import AVERAGE, cross_validate
from .sweep import sweep
from .train import is_cross_validation, run_trainer


IN_MEMORY = "in memory"  # name of Python objects as data, in arguments and facts


@dataclasses.dataclass
class TrainingResult:
    """The result of a run from Python.

    Attributes:
        metrics: of the final evaluation, by name; empty if Ctrl-C or SIGTERM ended the run early.
        model: with the saved weights, in evaluation mode. processor: its image processor.
        output_dir: weights, processor, card, facts and checkpoints. facts: the content of facts.json.
    """

    metrics: dict[str, float]
    model: transformers.PreTrainedModel
    processor: Any
    output_dir: Path
    facts: dict[str, Any]

    @torch.no_grad()
    def predict(self, images: Sequence[Any], batch_size: int = 32):
        """Classify images.

        Args:
            images: paths, or PIL images.

        Returns:
            DataFrame with one row per image: `image`, `label`, `score`, and the probability of each class by name.
            With several labels, `label` is the list of those at or above their threshold, and each label has its own
            probability. With a regression, `image` and each number by name, in the unit of the training targets.

        Raises:
            HFViTError: an image cannot be read.
        """
        import pandas  # not above: nothing else here needs it

        device, names = next(self.model.parameters()).device, self.model.config.id2label
        config, rows = self.model.config, []
        problem, channels = problem_type_of(config), num_channels(config)
        thresholds = thresholds_of(config)
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            opened = [open_image(image, num_channels=channels) for image in batch]
            pixels = self.processor(images=opened, return_tensors="pt")["pixel_values"].to(device)
            for image, scores in zip(batch, output_scores(config, self.model(pixels).logits.float()).tolist()):
                by_class = {names[index]: score for index, score in enumerate(scores)}
                row = {"image": image}
                if problem == MULTI_LABEL:
                    present = [name for name, least in zip(by_class, thresholds) if by_class[name] >= least]
                    row |= {"label": present, "score": max(scores)}
                elif problem == SINGLE_LABEL:
                    label = max(by_class, key=by_class.__getitem__)
                    row |= {"label": label, "score": by_class[label]}
                rows.append(row | by_class)
        return pandas.DataFrame(rows)


def train_from_python(stage: str, options: dict[str, Any]) -> TrainingResult:
    """Train with the options of the command line; `finetune(...)` and `pretrain(...)` of `training`.

    Args:
        stage: "finetune" or "pretrain".
        options: by the names of the command line. `dataset` may also be a DataFrame, a list of (path or image, label),
            a `datasets.Dataset` or DatasetDict. Without `output_dir`, a new folder in `runs/`.

    Returns:
        With `folds`, the metrics are means over the folds (`NAME_std` their standard deviations), the model is that of
        `combine_folds="average"` or else the last fold's, and `facts` is the summary.

    Raises:
        HFViTError: bad input.
    """
    options = dict(options)
    data = options.get("dataset")
    if data is not None and not isinstance(data, str | Path):
        options["dataset"] = IN_MEMORY
    if isinstance(options.get("model"), Path):
        options["model"] = str(options["model"])
    if isinstance(options.get("dataset"), Path):
        options["dataset"] = str(options["dataset"])
    options["output_dir"] = str(options.get("output_dir") or unused_folder(stage))
    arguments = arguments_of(options, stage)
    trainers: list[Trainer] = []
    in_memory = data if options.get("dataset") == IN_MEMORY else None

    def one_run(arguments: Arguments, stage: str, **more: Any) -> dict[str, Any]:
        trainer, facts = run_trainer(arguments, stage, data=in_memory, **more)
        trainers.append(trainer)
        return facts

    with handle_peer_exit():
        if is_cross_validation(arguments):
            return result_of_folds(arguments, cross_validate(arguments, stage, one_run, in_memory))
        facts = sweep(arguments, stage, one_run) if arguments.train.sweep else one_run(arguments, stage)
    trainer = trainers[-1]
    model = trainer.model
    if facts:  # the saved weights: with --ema_decay their average
        model = type(model).from_pretrained(trainer.output_dir).to(trainer.accelerator.device)
    metrics = {row["metric"]: row["value"] for row in facts.get("results", [])}
    return TrainingResult(metrics, model.eval(), trainer.image_processor, trainer.output_dir, facts)


def result_of_folds(arguments: Arguments, summary: dict[str, Any]) -> TrainingResult:
    """The result of a cross-validation: means of the metrics; the averaged model, or the last fold's."""
    folder = Path(str(arguments.train.output_dir))
    if not summary:
        last = next(iter(sorted(folder.glob("fold-*"), key=lambda path: int(path.name[5:]), reverse=True)), folder)
        raise HFViTError(f"stopped by a signal in {last}: go on with resume_from_checkpoint=True")
    model_folder = folder if arguments.train.combine_folds == AVERAGE else folder / f"fold-{summary['folds']}"
    model = transformers.AutoModelForImageClassification.from_pretrained(model_folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(model_folder)
    metrics = {name: score["mean"] for name, score in summary["metrics"].items()}
    metrics |= {f"{name}_std": score["std"] for name, score in summary["metrics"].items()}
    return TrainingResult(metrics, model, processor, folder, summary)


def unused_folder(stage: str) -> Path:
    """The first of runs/STAGE-1, runs/STAGE-2, ... that does not exist."""
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{stage}-{n}").exists())
