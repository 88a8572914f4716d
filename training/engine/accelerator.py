"""The machine of a run: its Accelerator, the precisions it has, and what to do when its memory is full.

For the Trainer.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments
from .trackers import check_trackers


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MEMORY_IS_FULL = ("out of memory", "can't allocate memory")  # as CUDA and CPUs say it
WORKER_EXITED = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)")


def create_accelerator(args: TrainArguments) -> Accelerator:
    """The Accelerator of one run; processes, sharding and machines come from its launcher.

    Raises:
        HFViTError: a precision that this hardware does not have.
    """
    AcceleratorState._reset_state()  # a second run in one process may use another precision
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp8" if args.fp8 else None
    cpu = on_cpu(args)
    check_precision(precision, cpu)
    if args.torch_compile:
        check_compile_options(args.torch_compile_backend, args.torch_compile_mode)
    backend = args.torch_compile_backend if args.torch_compile else "no"
    mode = {"mode": args.torch_compile_mode} if args.torch_compile and args.torch_compile_mode else {}
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        dynamo_plugin=TorchDynamoPlugin(backend=backend, **mode),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=check_trackers(args.report_to) or None,
        project_dir=args.output_dir,
    )


def check_compile_options(backend: str, mode: str | None) -> None:
    """Raise HFViTError for a backend or mode of torch.compile that is not there."""
    backends = sorted({"eager", "aot_eager", *torch.compiler.list_backends()})
    if backend not in backends:
        raise HFViTError(f"--torch_compile_backend {backend}: choose from {', '.join(backends)}")
    if mode is not None and mode not in COMPILE_MODES:
        raise HFViTError(f"--torch_compile_mode {mode}: choose from {', '.join(COMPILE_MODES)}")


def on_cpu(args: TrainArguments) -> bool:
    """Whether the run is one of CPUs. Accelerate has to be told: else its processes do not meet."""
    return args.use_cpu or not torch.accelerator.is_available()


def check_precision(precision: str | None, cpu: bool) -> None:
    """Raise HFViTError for one that the hardware lacks."""
    gpu = torch.cuda.is_available() and not cpu
    if precision == "fp16" and cpu:
        raise HFViTError("--fp16 needs a GPU; on the CPU use --bf16, or leave the precision at 32 bits")
    if precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise HFViTError(
            f"{torch.cuda.get_device_name()} has no bfloat16; use --fp16, or leave the precision at 32 bits"
        )
    if precision == "fp8" and not (gpu and torch.cuda.get_device_capability() >= (8, 9)):
        raise HFViTError("--fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper); use --bf16")


@contextmanager
def memory_advice(args: TrainArguments, evaluating: bool = False) -> Iterator[None]:
    """Within it, running out of memory is an HFViTError that names the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and WORKER_EXITED.search(str(error)):
            raise HFViTError(worker_message(args.dataloader_num_workers)) from error
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in MEMORY_IS_FULL):
            raise
        raise HFViTError(evaluation_message(args) if evaluating else memory_message(args)) from error


def worker_message(workers: int) -> str:
    """What to lower where a data worker was killed."""
    return (
        "a process that reads images was killed, most likely for its memory: lower --dataloader_num_workers "
        f"(now {workers}) or --dataloader_prefetch_factor"
    )


def evaluation_message(args: TrainArguments) -> str:
    """Which setting to lower where only evaluation lacks memory."""
    batch = args.per_device_eval_batch_size
    lower = f"--per_device_eval_batch_size {batch // 2}" if batch > 1 else "--image_size"
    return f"out of memory in evaluation with {batch} images in one pass: lower {lower}"


def memory_message(args: TrainArguments) -> str:
    """Which setting to lower, the one that costs least first."""
    batch, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        return (
            f"out of memory with {batch} images in one pass: --per_device_train_batch_size {batch // 2} "
            f"--gradient_accumulation_steps {passes * 2} is the same training in less memory"
        )
    if not args.activation_checkpointing:
        return "out of memory with one image in a pass: add --activation_checkpointing"
    return "out of memory with one image in a pass: lower --image_size, or shard the model (training/launch)"
