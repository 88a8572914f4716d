"""The length of a run, and its stages: image size and batch size may change on the way.

For the Trainer. A run is a sequence of stages, each a function of the step alone, so that a resumed run continues in
the right one. Small images first save most of the compute of early training (EfficientNetV2, arXiv:2104.00298); the
network resizes its position embeddings to each size, and is evaluated and saved at its own. Growing batches have the
effect of a falling learning rate (arXiv:1711.00489).
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from accelerate import PartialState

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError

from ...config.arguments import TrainArguments
from ...config.durations import steps_of
from ...data.dataset import ImageDataset
from ...data.shards.streaming import ImageStream
from ...data.transforms import ImageTransform
from ..accelerator import on_cpu


BATCH_OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")


@dataclasses.dataclass(frozen=True)
class Stage:
    """The steps from `start` up to, not including, `stop`.

    Attributes:
        image_size: height and width in pixels; None: those of the model.
        batch_size: images of one forward pass on one device.
        accumulation_steps: forward passes of one step.
        images: of one step, over all devices and passes.
    """

    start: int
    stop: int
    image_size: tuple[int, int] | None
    batch_size: int
    accumulation_steps: int
    images: int

    def __str__(self) -> str:
        size = "" if self.image_size is None else f" of {self.image_size[0]} x {self.image_size[1]} px"
        return f"{self.images} images{size} to step {self.stop:,}"


class TrainingSchedule:
    """The number of steps of a run, and the stage of each.

    Args:
        config: of the model. images: number of training images; None without training data. devices: processes.

    Attributes:
        length: requested steps; epochs are rounded up and end at `step_limit`. Warm-up, stages and all other lengths
            are measured in these.
        max_steps: steps that the run takes; differs from `length` after `fit`.
        epoch: steps of one epoch, at a constant batch size.
        stages: in order, in steps of the run. asked: the same in requested steps.
        fitted: for each call of `fit`: the step of the run, its step of the schedule, and the new `max_steps`.
    """

    def __init__(self, args: TrainArguments, config, images: int | None, devices: int):
        self.args, self.devices, self.max_steps, self._config = args, devices, args.max_steps, config
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
        self.epoch = (images or 0) / step
        if args.max_steps < 0 and images is not None:
            self.max_steps = max(1, math.ceil(args.num_train_epochs * images / step))
            if args.step_limit is not None:
                self.max_steps = min(self.max_steps, args.step_limit)
        self.length = self.max_steps
        self.fitted: list[tuple[int, float, int]] = []
        self.asked = self.stages = stages_of(args, config, self.length, self.epoch, devices)

    def steps_of(self, name: str) -> int:
        """The argument `name`, a length of training, in steps of the schedule."""
        return steps_of(name, getattr(self.args, name), self.length, self.epoch)

    def share_steps_out(self, args: TrainArguments) -> None:
        """Change the micro-batches to those of `args`, whose steps must have as many images."""
        self.args, fitted = args, self.fitted
        self.asked = stages_of(args, self._config, self.length, self.epoch, self.devices)
        self.load_fitted(fitted)

    def fit(self, step: int, max_steps: int) -> None:
        """From `step` on, compress or stretch the rest of the schedule to end at `max_steps`.

        Learning rate, stages and everything else that depends on the step still go through their whole course.
        """
        self.load_fitted([*self.fitted, (step, self.scheduled(step), max_steps)])

    def load_fitted(self, fitted: list[tuple[int, float, int]]) -> None:
        """Take over the `fitted` of a checkpoint; `length` may have been changed since."""
        self.fitted = [(int(step), float(scheduled), int(stop)) for step, scheduled, stop in fitted]
        self.max_steps = self.fitted[-1][2] if self.fitted else self.length
        starts = [self._first_step(stage.start) for stage in self.asked]
        stages = [
            dataclasses.replace(stage, start=start, stop=stop)
            for stage, start, stop in zip(self.asked, starts, [*starts[1:], self.max_steps])
        ]
        # A run that was cut short may have skipped stages; one without any steps keeps its last stage, for its size.
        self.stages = [stage for stage in stages if stage.start < stage.stop] or stages[-1:]

    def scheduled(self, step: int) -> float:
        """The step of the schedule, 0 to `length`, at `step` of the run; the same step unless `fit` was called."""
        if not self.fitted or step < self.fitted[0][0]:
            return step
        # From the last call of `fit` before this step, linearly to the end of the schedule.
        begin, before, stop = next(part for part in reversed(self.fitted) if part[0] <= step)
        return min(self.length, before + (self.length - before) * (step - begin) / max(1, stop - begin))

    def _first_step(self, scheduled: float) -> int:
        """The first step of the run at or after this step of the schedule."""
        parts = [(0, 0.0, self.length), *self.fitted]
        for (begin, before, stop), following in zip(parts, [*(part[0] for part in parts[1:]), self.max_steps]):
            fraction = (scheduled - before) / max(self.length - before, 1e-9)
            # 1e-6: a product that rounding has put just above a whole step must not count as the next one
            step = begin + max(0, math.ceil(fraction * (stop - begin) - 1e-6))
            if step <= following:
                return step
        return self.max_steps

    def stage_of(self, step: int) -> Stage:
        """The stage of `step` (from 0)."""
        return next(stage for stage in reversed(self.stages) if stage.start <= step)

    def images_after(self, step: int) -> int:
        """Images of the steps from `step` to the end of the run."""
        return sum(max(0, stage.stop - max(stage.start, step)) * stage.images for stage in self.stages)

    def check(self, dataset) -> None:
        """Raise HFViTError for too few images, images that cannot be resized, and mixup that is never on."""
        for stage in self.asked:
            at_image_size(dataset, stage.image_size)
        if (self.args.mixup_alpha or self.args.cutmix_alpha) and self.steps_of("mixup_off_steps") >= self.length:
            raise HFViTError(
                f"--mixup_off_steps {self.args.mixup_off_steps}: mixup and cutmix would be off in all "
                f"{self.length} steps: lower it, or leave them out"
            )
        if self.length == 0:  # --max_steps 0 only fits the head, which needs no batch
            return
        # A batch may straddle two epochs, but must not hold an image twice.
        largest, size = max(self.asked, key=lambda stage: stage.images), len(dataset)
        if largest.images > size:
            raise HFViTError(
                f"a batch of {largest.images} images ({largest.batch_size} x {largest.accumulation_steps} "
                f"accumulation steps x {self.devices} processes) is larger than the {size} training images: lower "
                f"{self._smaller(largest, size)}"
            )

    def _smaller(self, stage: Stage, images: int) -> str:
        """Which option to lower, and to what, for steps of at most `images` images."""
        args, parts = self.args, stage.accumulation_steps * self.devices
        if stage.images != args.per_device_train_batch_size * args.gradient_accumulation_steps * self.devices:
            return f"--batch_size_schedule to {images} or less"
        if args.global_batch_size is not None:
            return f"--global_batch_size to {images} or less, and --per_device_train_batch_size to a part of it"
        if images < parts:
            return f"--gradient_accumulation_steps to {max(1, images // self.devices)} or less"
        return f"--per_device_train_batch_size to {images // parts} or less"


def stages_of(args: TrainArguments, config, max_steps: int, epoch: float, devices: int) -> list[Stage]:
    """The stages of a run, in order; a single one without schedules of sizes or batches.

    Args:
        config: of the model. max_steps: steps of the run. epoch: steps of one epoch. devices: processes.

    Raises:
        HFViTError: sizes, batches or steps that are out of range.
    """
    sizes = _changes("image_size_schedule", args.image_size_schedule, max_steps, epoch) if max_steps > 0 else {}
    batches = _changes("batch_size_schedule", args.batch_size_schedule, max_steps, epoch) if max_steps > 0 else {}
    starts = sorted({0, *sizes, *batches})
    size, (batch, passes) = None, (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    stages = []
    for start, stop in zip(starts, [*starts[1:], max_steps]):
        if start in sizes:
            size = _image_size(sizes[start], config)
        if start in batches:
            batch, passes = _parts_of(batches[start], args.per_device_train_batch_size, devices)
        stages.append(Stage(start, stop, size, batch, passes, batch * passes * devices))
    return stages


def _changes(name: str, schedule: dict[str, Any], max_steps: int, epoch: float) -> dict[int, Any]:
    """{step: value from that step on}."""
    changes = {steps_of(name, begin, max_steps, epoch): value for begin, value in schedule.items()}
    if len(changes) < len(schedule):
        raise HFViTError(f"--{name} {_words(schedule)}: two of these begin at the same of {max_steps} steps")
    if changes and max(changes) >= max_steps:
        raise HFViTError(f"--{name} {_words(schedule)}: one begins after the last of {max_steps} steps")
    return changes


def _words(schedule: dict[str, Any]) -> str:
    return " ".join(f"{begin}={value}" for begin, value in schedule.items())


def _image_size(value: Any, config) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not (isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides)):
        raise HFViTError(f"--image_size_schedule {value!r}: give pixels, or [height, width]")
    if not isinstance(config, HFViTConfig):
        raise HFViTError("--image_size_schedule needs a network that reads images of any size: one of hf_vit's")
    if min(config.grid_for(tuple(sides))) < 1:
        down, across = config.total_stride
        raise HFViTError(f"--image_size_schedule {value}: smaller than one patch of {down} x {across} pixels")
    return sides[0], sides[1]


def _parts_of(images: Any, largest: int, devices: int) -> tuple[int, int]:
    """Images of one pass, at most `largest`, and number of passes, for a step of `images` on `devices`."""
    if not isinstance(images, int) or images < 1:
        raise HFViTError(f"--batch_size_schedule {images!r}: give images of one step, 1 or more")
    passes = -(-images // (largest * devices))  # the fewest
    size, rest = divmod(images, passes * devices)
    if rest:
        raise HFViTError(
            f"--batch_size_schedule: a step of {images} images cannot be shared by {passes} passes of at most "
            f"{largest} (--per_device_train_batch_size) on {devices} devices: take a multiple of {passes * devices}"
        )
    return size, passes


def with_accumulation_steps(args: TrainArguments) -> TrainArguments:
    """`args` with the accumulation steps that a `global_batch_size` takes on these devices."""
    if args.global_batch_size is None:
        return args
    devices, size = PartialState(cpu=on_cpu(args)).num_processes, args.per_device_train_batch_size
    if args.auto_batch_size and args.global_batch_size % devices == 0:  # the search for the largest one follows
        share = args.global_batch_size // devices
        size = next(divisor for divisor in range(min(size, share), 0, -1) if share % divisor == 0)
        args = dataclasses.replace(args, per_device_train_batch_size=size)
    passes, rest = divmod(args.global_batch_size, size * devices)
    steps = args.gradient_accumulation_steps
    if rest or not passes:
        raise HFViTError(
            f"--global_batch_size {args.global_batch_size} is no multiple of {size} images on {devices} devices: "
            "change --per_device_train_batch_size"
        )
    if steps not in (1, passes):
        raise HFViTError(
            f"--global_batch_size {args.global_batch_size} takes {passes} passes on {devices} devices, not "
            f"--gradient_accumulation_steps {steps}: leave out one of them"
        )
    return dataclasses.replace(args, gradient_accumulation_steps=passes)


def with_batch_of(args: TrainArguments, images: int, given: Collection[str]) -> TrainArguments:
    """`args` with steps of all `images`, if the data have fewer than a step of the defaults or the recipe.

    Args:
        given: options that the user gave. A batch size among them is kept, and refused by the schedule's check.
    """
    devices = PartialState(cpu=on_cpu(args)).num_processes
    step = args.global_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    fixed = args.batch_size_schedule or any(name in given for name in BATCH_OPTIONS)
    if step <= images or images < devices or fixed or args.max_steps == 0:
        return args
    return dataclasses.replace(
        args,
        per_device_train_batch_size=images // devices,
        gradient_accumulation_steps=1,
        global_batch_size=None,
    )


def at_image_size(dataset, image_size: tuple[int, int] | None):
    """The same images at another size; None leaves the data set as it is.

    Raises:
        HFViTError: data whose images cannot be resized.
    """
    if image_size is None:
        return dataset
    if not isinstance(dataset, ImageDataset | ImageStream) or not isinstance(dataset.transform, ImageTransform):
        raise HFViTError("--image_size_schedule needs a data set of training.data with a transform of its own")
    if getattr(dataset.transform, "crop", None) == "none":
        raise HFViTError("--image_size_schedule resizes images, --crop none does not: choose another crop")
    return dataset.with_transform(dataclasses.replace(dataset.transform, image_size=image_size), dataset.seed)
