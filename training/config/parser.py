"""Parse a recipe and the command line into the arguments of a run.

For pretrain, finetune and whatever starts them. A recipe (YAML) and the flags have the same keys; flags override the
recipe, both override the defaults; an unknown key is an error that suggests the nearest known name. Not transformers'
`HfArgumentParser`, which takes a file or flags, but no flags on top of a file.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from typing import Any

from hf_vit.errors import HFViTError, Parser

from .argument_checks import check_value
from .arguments import FIELDS, GROUPS, RENAMED, RESOLVED_NAME, Arguments, ModelArguments
from .recipes import read_recipe
from .strict_yaml import yaml_value


EXAMPLES = {
    "set": "hidden_size=128",
    "sweep": "learning_rate=[0.01,0.03]",
    "image_size_schedule": "0=128 50%=160 80%=224",
    "batch_size_schedule": "50%=2048",
}
NOT_SWEPT = (
    "sweep",
    "folds",
    "fold",
    "combine_folds",
    "output_dir",
    "dataset",
    "train_split",
    "eval_split",
    "dev_fraction",
    "seed",
)
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TYPES: dict[str, Any] = {
    name: hint for group in GROUPS.values() for name, hint in typing.get_type_hints(group).items()
}

# A flag also overrides these other names of a recipe or a resolved config, which mean the same thing.
INSTEAD_OF: dict[str, tuple[str, ...]] = {
    "model": ("preset",),
    "preset": ("model",),
    "num_train_epochs": ("max_steps",),
    "max_steps": ("step_limit",),
    "global_batch_size": ("gradient_accumulation_steps",),
    "gradient_accumulation_steps": ("global_batch_size",),
    "logging_steps": ("logging_strategy",),
    "eval_steps": ("eval_strategy",),
    "save_steps": ("save_strategy",),
    "metric_for_best_model": ("greater_is_better",),
}

# Defaults that differ between the two commands: from scratch, the paper's Table 3 for small data sets.
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "finetune": {"report": True},
}


# The order of `--help`: first what most runs need, from whichever dataclass.
HELP_GROUPS: dict[str, list[str]] = {
    "what most runs need": [
        "model", "dataset", "output_dir", "image_size", "num_train_epochs", "max_steps",
        "per_device_train_batch_size", "learning_rate", "eval_split", "resume_from_checkpoint",
    ],
    "model": ["preset", "set", "keep_representation", "freeze_backbone", "head_init"],
    "data": [
        "dataset_config_name", "train_split", "image_column", "label_column", "problem_type", "label_separator",
        "split_column", "group_column",
        "image_root", "train_file", "eval_file", "streaming", "shuffle_buffer_size",
        "shuffle_run_length", "shuffle_shards", "read_threads", "train_fraction",
        "samples_per_class", "dev_fraction", "folds", "fold", "combine_folds",
        "deduplicate_against", "deduplicate_split", "on_decode_error",
        "cache_dir", "dataloader_num_workers", "dataloader_prefetch_factor", "preview",
    ],
    "crop and augmentation": [
        "crop", "crop_area", "crop_ratio", "flip", "resize_small", "resample", "crop_pct", "degrees", "translate",
        "scale", "shear", "auto_augment", "color_jitter", "random_erasing", "mixup_alpha", "cutmix_alpha",
        "mixup_off_steps",
    ],
    "optimization": [
        "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "muon_momentum",
        "layer_decay", "unfreeze_every", "max_grad_norm", "loss", "class_weights", "logit_adjustment",
        "train_sampling_strategy", "label_smoothing_factor",
        "ema_decay", "seed",
    ],
    "schedule": [
        "step_limit", "time_limit", "lr_scheduler_type", "warmup_steps", "cooldown_steps", "lr_end", "lr_steps",
        "rsqrt_timescale", "gradient_accumulation_steps", "global_batch_size", "batch_size_schedule",
        "image_size_schedule", "sweep",
    ],
    "precision and speed": [
        "bf16", "fp16", "fp8", "torch_compile", "torch_compile_backend", "torch_compile_mode", "cpu_kernels",
        "activation_checkpointing", "auto_batch_size", "use_cpu", "per_device_eval_batch_size",
    ],
    "evaluation, logging and checkpoints": [
        "eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "do_predict", "logging_steps",
        "logging_strategy", "logging_first_step", "save_strategy", "save_steps", "save_total_limit", "async_save",
        "load_best_model_at_end", "metric_for_best_model", "patience", "greater_is_better", "card_examples",
        "report", "report_to", "run_name", "disable_tqdm",
    ],
    "Hub": ["push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"],
}  # fmt: skip


# The group of an option that is missing above, by its dataclass.
OTHER_OPTIONS = {"model": "model", "data": "data", "train": "evaluation, logging and checkpoints"}
for _key, _group in GROUPS.items():
    _named = {name for names in HELP_GROUPS.values() for name in names}
    HELP_GROUPS[OTHER_OPTIONS[_key]] += [f.name for f in dataclasses.fields(_group) if f.name not in _named]


def parse(argv: list[str] | None, stage: str) -> Arguments:
    """Read the arguments of one run.

    Args:
        argv: the command line without the program's name; None reads sys.argv.
        stage: "pretrain" or "finetune"; chooses defaults and the text of `--help`.

    Raises:
        HFViTError: an unknown key or flag, a value of the wrong type, a missing recipe.
    """
    words = [current_name(word) for word in (sys.argv[1:] if argv is None else argv)]
    flags, unknown = _parser(stage).parse_known_args(words)
    for word in unknown:
        if word.startswith("-"):
            raise HFViTError(_unknown(f"option {word.split('=')[0]}", word.lstrip("-").split("=")[0], prefix="--"))
    if unknown:
        raise HFViTError(f"unexpected argument {_short(unknown[0])}: values must follow an --option")
    given = {name: value for name, value in vars(flags).items() if value is not argparse.SUPPRESS}
    if "set" in given:
        given["set"] = [pair for group in given["set"] for pair in group]
    return arguments_of(given, stage)


def arguments_of(given: dict[str, Any], stage: str) -> Arguments:
    """The arguments of one run from options by name; values may be strings, or of the option's type.

    Args:
        given: the options; "config" for a recipe, "variant" for one of its variants.

    Raises:
        HFViTError: an unknown name, a value of the wrong type, a missing recipe.
    """
    given = {RENAMED.get(name, name): value for name, value in given.items()}
    for name in given:
        if name not in FIELDS and name not in ("config", "variant"):
            raise HFViTError(_unknown(f"option {name}", name))
    config, variant = given.pop("config", None), given.pop("variant", None)
    values, recipe = dict(STAGE_DEFAULTS[stage]), None
    if config is not None:
        recipe, variant, written = _read_recipe(config, variant)
        values |= written
    elif variant is not None:
        raise HFViTError(f"--variant {variant} is one of a recipe's: give --config RECIPE with it")
    given = {name: coerce(name, value) for name, value in given.items()}
    values = _override(values, given)
    _choose_once(values, given)
    groups = {
        key: group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})
        for key, group in GROUPS.items()
    }
    return Arguments(**groups, recipe=recipe, variant=variant, given=frozenset(given))


def _override(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`values` overridden by `others`: a recipe by its variant, and both by the flags.

    Fields of the model's config (`set`) are overridden one by one.
    """
    replaced = {name for other in others for name in INSTEAD_OF.get(other, ())}
    merged = {name: value for name, value in values.items() if name not in replaced} | others
    if "set" in values and "set" in others:
        merged["set"] = values["set"] | others["set"]
    return merged


def current_name(word: str) -> str:
    """A word of the command line, with an option's old name replaced by the new one, and a line on stderr about it."""
    name, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or name not in RENAMED:
        return word
    print(f"--{name} is now --{RENAMED[name]}; the old name goes with the next release", file=sys.stderr)
    return f"--{RENAMED[name]}{equals}{value}"


def _choose_once(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Resolve choices that a recipe and a flag would make twice.

    A flag removes its option from a recipe's sweep, and with the last option the dev split that the sweep needs.
    Without a sweep, a flag for one of `dev_fraction` and `eval_split` removes the other.
    """
    if "sweep" not in given and any(name in given for name in values.get("sweep", {})):
        values["sweep"] = {name: items for name, items in values["sweep"].items() if name not in given}
        if not values["sweep"] and "dev_fraction" not in given:
            values.pop("dev_fraction", None)
    if not values.get("sweep"):
        for name, other in (("dev_fraction", "eval_split"), ("eval_split", "dev_fraction")):
            if name in given and values[name] is not None and other not in given:
                values.pop(other, None)


def coerce(name: str, value: Any) -> Any:
    """Convert a word of the command line or a value of a recipe to the type of the field `name`."""
    hint = TYPES[name]
    if name == "sweep":
        return _grid(_config_fields(value, name))
    if hint == dict[str, Any]:
        return _config_fields(value, name)
    try:
        result = _as_type(hint, value)
    except (TypeError, ValueError, OverflowError):
        raise HFViTError(f"--{name} {_short(value)}: give {type_in_words(hint)}") from None
    check_value(FIELDS[name], result)
    return result


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def type_in_words(hint: Any) -> str:
    """The type as error messages name it."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_in_words(kind) for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is list:
        return type_in_words(typing.get_args(hint)[0]).removeprefix("a ") + "s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]


def _as_type(hint: Any, value: Any) -> Any:
    """Convert a value to the type `hint`, or raise ValueError."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and len(value) == 1 and str(value[0]).lower() in ("none", "null"):
        value = value[0]  # an option of several words, given the single word none
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and type(None) in options):
        if type(None) not in options:
            raise ValueError(value)
        return None
    for kind in sorted((o for o in options if o is not type(None)), key=lambda o: o is str):
        try:
            return _as_kind(kind, value)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError(value)


def _as_kind(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [_as_kind(typing.get_args(kind)[0], item) for item in items]
    if isinstance(value, list | tuple | dict):
        raise ValueError(value)
    if kind is bool:
        return TRUTH[value.lower()] if isinstance(value, str) and value.lower() in TRUTH else _only(bool, value)
    if kind is int:
        if isinstance(value, bool) or not math.isfinite(float(value)) or float(value) != int(float(value)):
            raise ValueError(value)
        return int(value) if isinstance(value, int) else int(float(value))
    if kind is float:
        return float(_only((int, float, str), value))
    return str(_only((str, int, float, os.PathLike), value))


def _only(kinds, value: Any) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(value)
    return value


def _grid(values: dict[str, Any]) -> dict[str, list]:
    """The values of a sweep, each converted to the type of its argument."""
    for name, items in values.items():
        if name not in FIELDS or name in NOT_SWEPT or name in {f.name for f in dataclasses.fields(ModelArguments)}:
            raise HFViTError(f"--sweep {name}: only arguments of training and of augmentation can be swept")
        if not isinstance(items, list) or not items:
            raise HFViTError(f"--sweep {name}: give a list of values, such as --sweep {name}=[0.01,0.03]")
    return {name: [coerce(name, item) for item in items] for name, items in values.items()}


def _config_fields(value: Any, name: str) -> dict[str, Any]:
    """Fields of the model's config, from `["pooling=gap", "layer_norm_eps=1e-6"]` or a mapping, with YAML's types."""
    if isinstance(value, dict):
        pairs = value
    else:
        pairs = {}
        for pair in value if isinstance(value, list | tuple) else [value]:
            field, equals, text = pair.partition("=") if isinstance(pair, str) else ("", "", "")
            if not equals:
                raise HFViTError(f"--{name} {_short(pair)}: give field=value, such as --{name} {EXAMPLES[name]}")
            pairs[field] = yaml_value(f"--{name} {pair}", text)
    return {str(field): as_number(item) for field, item in pairs.items()}


def as_number(value: Any) -> Any:
    """A string that Python reads as a number as that number; other values as they are."""
    # YAML 1.1 reads 1e-6 as a string.
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return float(value)
    return value


def _read_recipe(name: str, variant: str | None) -> tuple[str | None, str | None, dict[str, Any]]:
    """Name, variant and values of a recipe; the keys of all its variants are checked."""
    recipe = read_recipe(name, variant)
    values = _checked_recipe(recipe.common, str(recipe.path))
    variants = {key: _checked_recipe(v, f"variant {key} of {recipe.path}") for key, v in recipe.variants.items()}
    if recipe.variants and recipe.variant is not None:
        values = _override(values, variants[recipe.variant])
    return recipe.name, recipe.variant, values


def _checked_recipe(written: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a recipe or a variant, each converted to the type of its argument."""
    values = {RENAMED.get(key, key): value for key, value in written.items()}  # of version 0.1.0
    for key in values:
        if key not in FIELDS:
            if key == "config":
                raise HFViTError(f"{where}: a recipe cannot name another one; give one --config, and flags over it")
            raise HFViTError(_unknown(f"key {_short(key)} in {where}", str(key)))
    return {key: coerce(key, value) for key, value in values.items()}


def _unknown(what: str, name: str, prefix: str = "") -> str:
    options = [*FIELDS, "config", "variant"] if prefix else [*FIELDS]
    near = difflib.get_close_matches(name[:60], options, 1, cutoff=0.5)
    return f"unknown {what}" + (f"; did you mean {prefix}{near[0]}?" if near else "; --help lists what there is")


def _parser(stage: str) -> argparse.ArgumentParser:
    """A parser with one flag for each field; values stay strings, and are converted by `coerce`."""
    parser = Parser(
        prog=f"python -m training.{stage}",
        usage="%(prog)s [--config RECIPE] [--OPTION VALUE ...]",
        description=f"{stage.capitalize()} a Vision Transformer. Flags override --config; both override the defaults.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"YAML file, a name in training/recipes, or a run's {RESOLVED_NAME}"
    )
    parser.add_argument("--variant", metavar="NAME", help="one of the variants that the recipe names")
    swap = {"model": "preset", "preset": "model"} if stage == "pretrain" else {}  # pre-training begins from scratch
    for title, names in HELP_GROUPS.items():
        section = parser.add_argument_group(title)
        for name in (swap.get(name, name) for name in names):
            _add_flag(section, FIELDS[name], STAGE_DEFAULTS[stage])
    return parser


def _add_flag(section, field: dataclasses.Field, stage_defaults: dict[str, Any]) -> None:
    meta = field.metadata
    default = stage_defaults.get(field.name, field.default)
    if default is dataclasses.MISSING:
        default = field.default_factory()
    notes = [
        meta["unit"] and f"unit: {meta['unit']}",
        meta["source"] and f"source: {meta['source']}",
        meta["choices"] and f"one of: {', '.join(meta['choices'])}",
        "" if default in (None, {}) else f"default: {default}",
    ]
    text = "\n    ".join(part for part in (meta["help"], "; ".join(n for n in notes if n)) if part).replace("%", "%%")
    keywords: dict[str, Any] = {"help": text, "metavar": field.name.upper()}
    if TYPES[field.name] is bool:
        keywords |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif meta["nargs"] == "?":
        keywords |= {"nargs": "?", "const": "true"}
    elif meta["nargs"] is not None:
        keywords["nargs"] = meta["nargs"]
    if field.name == "set":
        keywords |= {"action": "append", "metavar": "FIELD=VALUE"}
    section.add_argument(f"--{field.name}", **keywords)
    if TYPES[field.name] is bool and default is True:
        section.add_argument(
            f"--no_{field.name}",
            dest=field.name,
            action="store_const",
            const="false",
            help=f"the same as --{field.name} false",
        )
