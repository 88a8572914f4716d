"""The hardware of a run: its Accelerator, the precisions that it supports, and advice when its memory is full.

For the Trainer.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments
from .trackers import check_trackers


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # in the messages of CUDA, and of the CPU's allocator
WORKER_EXITED = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)")


def create_accelerator(args: TrainArguments) -> Accelerator:
    """The Accelerator of one run; its launcher decides about processes, sharding and machines.

    Raises:
        HFViTError: a precision that this hardware does not support; an unknown compile option or tracker.
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
        # The loop counts micro-batches itself, and the scheduler steps once per optimizer step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        dynamo_plugin=TorchDynamoPlugin(backend=backend, **mode),
        # Gradients live in DDP's communication buckets: no second copy of them in memory.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=check_trackers(args.report_to) or None,
        project_dir=args.output_dir,
    )


def check_compile_options(backend: str, mode: str | None) -> None:
    """Raise HFViTError for an unknown backend or mode of torch.compile."""
    backends = sorted({"eager", "aot_eager", *torch.compiler.list_backends()})
    if backend not in backends:
        raise HFViTError(f"--torch_compile_backend {backend}: choose from {', '.join(backends)}")
    if mode is not None and mode not in COMPILE_MODES:
        raise HFViTError(f"--torch_compile_mode {mode}: choose from {', '.join(COMPILE_MODES)}")


def on_cpu(args: TrainArguments) -> bool:
    """Whether the run uses CPUs. Accelerate has to be told, or its processes choose different backends."""
    return args.use_cpu or not torch.accelerator.is_available()


def check_precision(precision: str | None, cpu: bool) -> None:
    """Raise HFViTError for a precision that the hardware does not support."""
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
def memory_advice(current_args: Callable[[], TrainArguments], evaluating: bool = False) -> Iterator[None]:
    """Turn running out of memory into an HFViTError that names the setting to lower.

    Args:
        current_args: returns the arguments at the time of the error: `auto_batch_size` changes them during a run.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        args = current_args()
        if isinstance(error, RuntimeError) and WORKER_EXITED.search(str(error)):
            raise HFViTError(worker_message(args.dataloader_num_workers)) from error
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise HFViTError(evaluation_message(args) if evaluating else memory_message(args)) from error


def worker_message(workers: int) -> str:
    """Which setting to lower if a data worker was killed."""
    return (
        "a process that reads images was killed, most likely for its memory: lower --dataloader_num_workers "
        f"(now {workers}) or --dataloader_prefetch_factor"
    )


def evaluation_message(args: TrainArguments) -> str:
    """Which setting to lower if evaluation runs out of memory."""
    batch = args.per_device_eval_batch_size
    lower = f"--per_device_eval_batch_size {batch // 2}" if batch > 1 else "--image_size"
    return f"out of memory in evaluation with {batch} images in one pass: lower {lower}"


def memory_message(args: TrainArguments) -> str:
    """Which setting to lower if training runs out of memory, the cheapest first."""
    batch, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        return (
            f"out of memory with {batch} images in one pass: --per_device_train_batch_size {batch // 2} "
            f"--gradient_accumulation_steps {passes * 2} is the same training in less memory"
        )
    if not args.activation_checkpointing:
        return "out of memory with one image in a pass: add --activation_checkpointing"
    return "out of memory with one image in a pass: lower --image_size, or shard the model (training/launch)"
