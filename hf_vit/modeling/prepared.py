"""What stands before a module's `forward` to compute the same prepared for inference, and chooses ways by measuring.

This file travels to the Hub beside the weights: it imports only torch and transformers.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

Ways = dict[str, Callable]
ROUNDS, MARGIN = 6, 0.9  # a way replaces the first one where its best of six rounds is 10 % faster
BOOKKEEPING = ("torch.distributed.fsdp", "transformers.utils.output_capturing")  # hooks that show nobody anything


def fastest(ways: Ways, *inputs) -> str:
    """Name of the fastest of equal computations, run in turns; the first is kept where no other is clearly faster.

    A pass finds weights in memory that repetition finds in the cache: so the one that wins passes comes first.
    """
    first, *others = ways
    if not others:
        return first
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way(*inputs)
            if inputs[0].device.type != "cpu":
                torch.accelerator.synchronize()
            best[name] = min(best[name], time.perf_counter() - began)
    winner = min(others, key=best.__getitem__)
    return winner if best[winner] < MARGIN * best[first] else first


def choose(choices: dict[tuple, str], case: tuple, ways: Ways, *inputs) -> Callable:
    """The way that was the fastest in this case; measured where it is new, or was measured where there were others."""
    if choices.get(case) not in ways:
        choices[case] = fastest(ways, *inputs)
    return ways[choices[case]]


def onednn_packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN takes weights of this device and dtype in a layout of its own."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class Prepared(ABC):
    """Stands before the `forward` of a module: the same computation prepared, or the plain one where that is needed.

    Args:
        module: whose `forward` it is.
        choices: which way was the fastest for what shape, shared by all modules of a model.
    """

    def __init__(self, module: nn.Module, choices: dict[tuple, str]):
        self.module: Any = module
        self.choices = choices
        self.seen: list = []

    def __getstate__(self) -> dict:
        """What copies and pickles keep; the rest is prepared again."""
        return {"module": self.module, "choices": self.choices, "seen": []}

    def __call__(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.run(x) if self.serves(x, kwargs) else self.plain(x, **kwargs)

    def plain(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return type(self.module).forward(self.module, x, **kwargs)

    def serves(self, x: torch.Tensor, kwargs: dict) -> bool:
        """Whether this call may take the prepared way; prepares it where weights or layers are new."""
        if self.module.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.module.parameters())):
            logger.warning_once("gradients are on: what was prepared serves under torch.inference_mode() or no_grad()")
            return False
        return self.is_current() or self.prepare()

    def is_current(self) -> bool:
        """Whether layers and weights are those that were prepared, with the same contents."""
        return bool(self.seen) and self.seen == self.state()

    def state(self) -> list:
        """Changes when a layer or a weight is replaced, added or written to."""
        members = [id(member) for held in self.held for member in held.values()]
        return members + [(weight._version, weight.data_ptr()) for weight in self.weights]

    def prepare(self) -> bool:
        """Remember layers and weights, and build from them; False where one is not ours or not an ordinary tensor."""
        if not self.ordinary():
            logger.warning_once("replaced layers and unusual weights are not prepared for inference")
            return False
        self.held = [held for module in self.module.modules() for held in (module._modules, module._parameters)]
        self.weights = list(self.module.parameters())
        self.alive = [member for held in self.held for member in held.values()]  # so that their ids stay theirs
        self.seen = self.state()
        with torch.no_grad():
            self.build()
        return True

    def ordinary(self) -> bool:
        return all(type(weight) is nn.Parameter and not weight.is_inference() for weight in self.module.parameters())

    @abstractmethod
    def build(self) -> None:
        """What is computed once from the weights."""

    @abstractmethod
    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The prepared computation."""

    def choose(self, case: tuple, ways: Ways, *inputs) -> Callable:
        """The fastest of these ways, measured on these inputs where the case is new."""
        return choose(self.choices, case, ways, *inputs)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook sees this module's calls: not sharding's, nor the recorders of transformers, which do so
    in calls that ask for outputs.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    hooks += (*module._backward_pre_hooks.values(), *module._backward_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith(BOOKKEEPING) for hook in hooks)
