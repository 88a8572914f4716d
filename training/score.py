"""Score any image classifier on a data set or a suite, with the same results on any number of processes.

    python -m training.score --model PATH_OR_HUB_ID --dataset PATH_OR_HUB_ID --output_dir scores
    python -m training.score --model PATH_OR_HUB_ID --dataset imagenet/val --real_labels real.json
    python -m training.score --model PATH_OR_HUB_ID --dataset images --few_shot 1 5 10 25 --knn 20
    python -m training.score --model PATH_OR_HUB_ID --suite paper --output_dir suite

The model is a plain ViT in any format that hf_vit loads, or any AutoModelForImageClassification (BiT, ...). The
scores are printed; --output_dir receives facts.json, per_class.csv, confusion_matrix.png, model_index.yaml for the
metadata of a card, and .eval_results/ for data sets on the Hub. If --output_dir is the model's own folder, its
facts.json and card gain the scores.
"""

import argparse
import sys
from typing import Any

import transformers

from hf_vit.errors import HFViTError, Parser, report_error

from .config.arguments import RENAMED
from .config.parser import TRUTH
from .data.transforms import RESAMPLING
from .evaluation.evaluate_classifier import TTA, create_context
from .evaluation.few_shot import L2


def true_or_false(word: str) -> bool:
    """The value of a switch, as the commands that train read it."""
    if word.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"'{word}' is not true or false")
    return TRUTH[word.lower()]


# A switch is on where it is named alone, and takes a value as those of the commands that train do.
SWITCH: dict[str, Any] = {
    "nargs": "?", "const": True, "default": False, "type": true_or_false, "metavar": "true|false",
}  # fmt: skip


class CurrentName(argparse.Action):
    """Store a choice; an old name of the option prints the new one."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        old = (option_string or "").removeprefix("--")
        if old in RENAMED:
            print(f"--{old} is now --{RENAMED[old]}; the old name goes with the next release", file=sys.stderr)
        setattr(namespace, self.dest, values)


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    parser = Parser(
        prog="python -m training.score",
        usage="%(prog)s --model MODEL (--dataset DATASET | --suite SUITE) [--OPTION VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, checkpoint file or Hub id of an image classifier")
    add("--dataset", help="Hub id, image folder, parquet file or folder, digits, or synthetic:NAME")
    add(
        "--suite", help="many data sets by a fixed protocol: imagenet, paper or vtab (training/evaluation/suites.yaml)"
    )
    add("--output_dir", help="folder for facts, tables and figures")
    add("--report", help="also write report.html there: mistakes and likely wrong labels, with images", **SWITCH)
    data = parser.add_argument_group("images")
    data.add_argument(
        "--split", "--eval_split", help="default: the first of validation, val, dev, test that the data has"
    )
    data.add_argument("--train_split", default="train", help="split that the probes are fitted on (train)")
    data.add_argument("--dataset_config_name", help="configuration of a Hub dataset")
    data.add_argument("--image_column", help="column with the images; default: recognized")
    data.add_argument(
        "--label_column",
        nargs="+",
        help="column with the labels; default: recognized; several: one per label, or numbers",
    )
    data.add_argument("--label_separator", help="separator of several labels in a text cell, such as '|'")
    data.add_argument("--split_column", help="column with the split of each row; default: recognized")
    data.add_argument("--image_root", help="folder that paths in a table are relative to; default: the table's")
    data.add_argument("--cache_dir", help="where tables and features are kept; default: datasets' cache")
    for name in ("on_decode_error", *(old for old, new in RENAMED.items() if new == "on_decode_error")):
        data.add_argument(
            f"--{name}", dest="on_decode_error", default="stop", choices=("stop", "skip"), action=CurrentName,
            help="images that cannot be read: stop with an error, or leave them out (stop)"
            if name == "on_decode_error" else argparse.SUPPRESS,
        )  # fmt: skip
    labels = parser.add_argument_group("classes")
    labels.add_argument(
        "--label_map", help="JSON or YAML file of data class: model class; number: class i is output i"
    )
    labels.add_argument(
        "--label_subset", help="outputs to choose from: data (the data's classes), imagenet_a, imagenet_r, or a file"
    )
    labels.add_argument("--real_labels", help="ImageNet-ReaL: real.json, or the folder that holds it")
    view = parser.add_argument_group("resizing and cropping; default: as the model's image processor does")
    view.add_argument("--image_size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    view.add_argument("--crop_pct", type=float, help="resize the short side to size / crop_pct, crop the center")
    view.add_argument("--squash", help="resize to height x width, as the ViT paper evaluates", **SWITCH)
    view.add_argument("--resample", choices=tuple(RESAMPLING), help="filter of the resize")
    view.add_argument("--tta", default="none", choices=tuple(TTA), help="average over mirrored images or crops (none)")
    probes = parser.add_argument_group("probes on frozen features, instead of the head")
    probes.add_argument("--few_shot", type=int, nargs="+", metavar="SHOTS", help="images per class, such as 1 5 10 25")
    probes.add_argument("--knn", type=int, metavar="K", help="nearest neighbors, among all of --train_split")
    probes.add_argument("--l2", type=float, default=L2, help="penalty of the few-shot ridge regression (1024)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--per_device_eval_batch_size", type=int, default=32, help="images in a batch (32)")
    machine.add_argument("--dataloader_num_workers", type=int, default=0, help="decoding processes, per process (0)")
    machine.add_argument("--bf16", help="mixed precision", **SWITCH)
    machine.add_argument("--use_cpu", help="run on the CPU even if there is a GPU", **SWITCH)
    machine.add_argument("--no_speed", help="do not measure throughput, latency and memory", **SWITCH)
    suite = parser.add_argument_group("suites")
    suite.add_argument(
        "--data", nargs="+", default=[], metavar="TASK=PATH", help="paths of local copies of a suite's data sets"
    )
    suite.add_argument(
        "--transfer", default="probe", choices=("probe", "finetune"), help="ridge probe on all labels, or the paper's "
        "fine-tuning with its grid of learning rates (probe)"
    )  # fmt: skip
    suite.add_argument(
        "--finetune_set", nargs="+", default=[], metavar="NAME=VALUE", help="options of training.finetune to change"
    )
    return parser


def parse_score(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options and check what can be checked before anything is opened.

    Raises:
        HFViTError: an unknown option, or options that contradict each other.
    """
    args = build_parser().parse_args(argv)
    if (args.dataset is None) == (args.suite is None):
        raise HFViTError("no data to score on: give --dataset (a folder, a Hub id, digits) or --suite NAME")
    if args.suite is not None and args.output_dir is None:
        raise HFViTError("a suite needs --output_dir FOLDER: it resumes from the results in it")
    if args.report and args.output_dir is None:
        raise HFViTError("--report writes a page: give its folder with --output_dir")
    refuse_unused(args)
    if args.per_device_eval_batch_size < 1:
        raise HFViTError(f"--per_device_eval_batch_size must be 1 or more, got {args.per_device_eval_batch_size}")
    if args.image_size is not None and (len(args.image_size) > 2 or min(args.image_size) < 1):
        raise HFViTError("--image_size takes one number, or height and width")
    if args.real_labels is not None and args.label_subset is not None:
        raise HFViTError("ReaL labels name any of ImageNet's classes: leave out --label_subset")
    return args


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise HFViTError for an option that would have no effect."""
    used_by = {
        "--suite": ("data", "transfer", "finetune_set") if args.suite is None else (),
        "--dataset": (
            "split",
            "train_split",
            "dataset_config_name",
            "split_column",
            "image_root",
            "few_shot",
            "knn",
            "label_subset",
            "report",
        )
        if args.suite is not None
        else (),
        "a head (leave out --few_shot and --knn)": ("tta", "label_map", "label_subset", "real_labels", "report")
        if args.few_shot is not None or args.knn is not None
        else (),
        "--few_shot and --knn": ("train_split",) if args.few_shot is None and args.knn is None else (),
        "--few_shot, or a suite with --transfer probe": ("l2",)
        if (args.few_shot is None if args.suite is None else args.transfer != "probe")
        else (),
        "--transfer finetune": ("finetune_set",) if args.transfer != "finetune" else (),
    }
    parser = build_parser()
    for use, names in used_by.items():
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                raise HFViTError(f"--{name} has no effect here: it belongs to {use}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score and return the facts; bad input is one line on stderr and exit status 2."""
    try:
        args = parse_score(argv)
        context = create_context(
            args.use_cpu,
            batch_size=args.per_device_eval_batch_size,
            workers=args.dataloader_num_workers,
            bf16=args.bf16,
        )
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        from .evaluation.score_model import score_model  # not above, so that --help takes no seconds more
        from .evaluation.suites import run_suite

        if args.suite is not None:
            facts = run_suite(args, context)
        else:
            facts = score_model(args, context)
        context.accelerator.end_training()
        return facts
    except (HFViTError, OSError) as error:
        raise SystemExit(report_error(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
