"""Whether a run may be resumed from a checkpoint: what must be the same, and what may change.

Other data, another network or another optimizer would make the checkpoint's numbers meaningless, and are refused by
name. The learning rate, weight decay, length, augmentation or evaluation split may be changed in the middle of a run;
the change applies from the checkpoint on, and is logged and noted in the facts.
"""

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError

from ...config.arguments import FIELDS, OF_THE_LAUNCH, RENAMED, TrainArguments
from ...data.dataset import ImageDataset
from ...data.shards.streaming import ImageStream
from ...reporting.facts import architecture_of
from .checkpoint_io import differences


# Arguments that change neither weights nor history; data are compared by content, not by name.
WITHOUT_EFFECT = {
    *OF_THE_LAUNCH, "dataloader_num_workers", "dataloader_prefetch_factor", "disable_tqdm", "output_dir", "dataset",
    "cache_dir", "dataset_config_name", "train_split", "image_column", "label_column", "problem_type",
    "label_separator", "split_column", "image_root", "train_file", "eval_file", "model", "preset", "set", "image_size",
    "group_column", "keep_representation", "run_name", "read_threads", "async_save",
}  # fmt: skip
# How streams were shuffled before there were options for it: a checkpoint of that time does not name these.
EARLIER_SHUFFLE = {"shuffle_buffer_size": 2048, "shuffle_run_length": 256}
# The optimizer's state only fits these values.
FIXED = ("optim", "layer_decay", "freeze_backbone")


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What identifies a run: data, architecture, and the arguments that have an effect; ready for JSON."""

    data: dict[str, Any]
    evaluation: dict[str, Any] | None
    architecture: dict[str, Any]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, train_dataset, eval_dataset, architecture: dict, args: TrainArguments, other: dict) -> "RunIdentity":
        """The identity of this run.

        Args:
            architecture: the fields of the config that define the network.
            other: non-default arguments besides `args`, by name; empty for a run without the command line.
        """
        known = {name: _default(name) for name in FIELDS if name not in WITHOUT_EFFECT} if other else {}
        arguments = {**known, **other, **dataclasses.asdict(args)}
        arguments = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
        return cls(
            data_identity(train_dataset),
            None if eval_dataset is None else data_identity(eval_dataset),
            architecture,
            arguments,
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, saved: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Compare with the identity in a checkpoint.

        Returns:
            {argument: [value in the checkpoint, value now]} for permitted changes.

        Raises:
            HFViTError: a change that is not permitted.
        """
        # A field that a later version added is at its default in a network of an earlier one.
        defaults = architecture_of(HFViTConfig())
        architecture = {name: defaults[name] for name in self.architecture if name in defaults} | saved["architecture"]
        for name, then, now in (
            ("architecture", architecture, self.architecture),
            ("data", saved["data"], self.data),
        ):
            changed = differences(_without_names(then, now), _without_names(now, then))
            if changed:
                raise HFViTError(
                    f"{folder} cannot be resumed, the {name} changed ({changed}): restore it, or begin anew in "
                    "another --output_dir"
                )
        before = {RENAMED.get(name, name): value for name, value in saved["arguments"].items()}
        if before.get("streaming"):
            before = EARLIER_SHUFFLE | before
        # A checkpoint of version 0.1.0 does not know every argument, and one from Python not those of the command.
        shared = [name for name in self.arguments if name in before and before[name] != self.arguments[name]]
        fixed = [name for name in FIXED if name in shared]
        if fixed:
            changed = "; ".join(f"--{name} was {before[name]}, is {self.arguments[name]}" for name in fixed)
            raise HFViTError(
                f"{folder} cannot be resumed with another optimizer state ({changed}): restore it, or begin anew in "
                "another --output_dir"
            )
        changes = {name: [before[name], self.arguments[name]] for name in shared}
        evaluation = saved.get("evaluation", self.evaluation)
        both = evaluation is not None and self.evaluation is not None
        if both and _without_names(evaluation, self.evaluation) != _without_names(self.evaluation, evaluation):
            changes["evaluation images"] = [_identity_text(evaluation), _identity_text(self.evaluation)]
        return changes


def changes_in_words(changes: dict[str, Any]) -> str:
    """The changes in one line: the checkpoint's value ("there"), and that of this run ("here")."""
    return "; ".join(f"{name}: {then} there, {now} here" for name, (then, now) in changes.items())


def data_identity(dataset) -> dict[str, Any]:
    """What must be the same in a resumed run's data."""
    if not isinstance(dataset, ImageDataset | ImageStream):
        return {"images": len(dataset)}
    return {
        "name": dataset.name,
        "split": dataset.split,
        "images": len(dataset),
        "fingerprint": dataset.fingerprint,
        "label_names": list(dataset.label_names),
    }


def raise_if_checkpoints_differ(folder: Path | None, world_size: int) -> None:
    """Raise HFViTError if the ranks found different checkpoints, on machines without a shared disk."""
    if world_size > 1:
        names = sorted(set(gather_object(["none" if folder is None else folder.name])))
        if len(names) > 1:
            raise HFViTError(
                f"the processes see different checkpoints ({', '.join(names)}): give an --output_dir on a disk "
                "that all machines share"
            )


def _without_names(identity: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    # Equal contents may be found under another path.
    if identity.get("fingerprint") is None or identity["fingerprint"] != other.get("fingerprint"):
        return identity
    return {name: value for name, value in identity.items() if name not in ("name", "split")}


def _identity_text(identity: dict[str, Any]) -> str:
    name = f"{identity['split']} of {identity['name']}, " if "name" in identity else ""
    return f"{name}{identity['images']} images"


def _default(name: str) -> Any:
    field = FIELDS[name]
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
