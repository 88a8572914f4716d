"""Wrappers that replace a module by a faster equivalent; they hold the plain module and fall back to it.

Parameters, children, buffers and hooks are those of the plain module, under the same names, so training, saving,
loading, `torch.compile`, LoRA and hooks use it. Fast copies of weights are made at the first call that can use them,
and again when weights have changed.

Tests: tests/hf_vit/inference/test_optimize.py.
"""

import functools
from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

SAMPLES = 64  # numbers of each weight that are compared in every call

# A warning: copies of weights that FSDP gathers for each call would go stale without a trace.
SHARDED = "sharded weights (FSDP) are not optimized for inference: the plain layers serve"
BOOKKEEPING = ("torch.distributed.fsdp", "transformers.utils.output_capturing")  # modules whose hooks do not count


class OptimizedModule(nn.Module):
    """Base class of the wrappers. `wrap(kind, module)` makes one.

    Subclasses define `build`, which prepares weights, and `run`, the fast computation. Settings become attributes.
    """

    # Attributes that are set here; all others are set on the plain module.
    wrapper_attributes = frozenset({"plain", "fingerprint", "watched", "forward", "_compiled_call_impl"})
    plain: Any
    fingerprint: list | None  # of the layers and weights that were prepared; None: not prepared
    watched: list[nn.Module]  # the modules inside, whose hooks would not see the fast computation
    kind: type["OptimizedModule"]  # the subclass; the class of an instance is also the plain module's

    def __init__(self, plain: nn.Module, **settings: Any):
        shared = {name: value for name, value in plain.__dict__.items() if isinstance(value, dict | set)}
        self.__dict__.update(shared)  # children, parameters, buffers and every kind of hook, by reference
        self.__dict__.update(plain=plain, fingerprint=None, watched=[], settings=settings)
        self.__dict__.update(settings)

    # -- attributes and module methods go to the plain module

    def __getattr__(self, name: str) -> Any:
        if "plain" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # `fully_shard` gives the module that it is called with another class
            object.__setattr__(self, name, value)
        elif name in self.wrapper_attributes:
            self.__dict__[name] = value
        else:
            if name in self.__dict__:  # a shared dict is replaced in both
                self.__dict__[name] = value
            setattr(self.plain, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ and name in self.wrapper_attributes:
            del self.__dict__[name]
        else:
            delattr(self.plain, name)

    def train(self, mode: bool = True):
        if mode:  # fused optimizers and `parameter.data` change weights without a trace: prepare again afterwards
            self.fingerprint = None
        self.plain.train(mode)
        return self

    def _apply(self, fn, recurse: bool = True):
        self.plain._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self):
        return self.plain._replicate_for_data_parallel()

    def __reduce__(self) -> tuple:
        """Copy and pickle only the plain module and the settings; fast weights are prepared again."""
        return wrap, (self.kind, self.plain), {"settings": self.settings}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, **state["settings"])

    # -- which of the two computes

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.serves(x, kwargs):
            return self.run(x, **kwargs)
        return self.run_plain(x, **kwargs)

    def run_plain(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return type(self.plain).forward(self.plain, x, **kwargs)  # hooks of the module have run: they are shared

    def serves(self, x: torch.Tensor, kwargs: dict) -> bool:
        """Whether the fast computation may serve this call; prepares it if weights or layers have changed."""
        # cheap conditions first: this runs for every block of every call
        if self.plain.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.plain.parameters())):
            logger.warning_once(
                "gradients are on: the optimized layers serve under torch.inference_mode() or no_grad()"
            )
            return False
        if not (self.is_current() or self.prepare()):
            return False
        return not any(has_forward_hooks(module) for module in self.watched)

    # -- fast copies of weights

    def is_current(self) -> bool:
        """Whether layers and weights are still those that were prepared, with the same values."""
        if self.fingerprint is None or self.fingerprint != self._fingerprint():
            return False
        return not self._samples or torch.equal(torch.cat(self._samples), self._values)

    def _fingerprint(self) -> list:
        """A value that changes when a layer or a weight is replaced, added or written to."""
        ids = [id(member) for members in self._member_dicts for member in members.values()]
        return ids + [(weight._version, weight.data_ptr()) for weight in self._weights]

    def prepare(self) -> bool:
        """Remember layers and weights and build from them; False if the fast code does not support them."""
        self.fingerprint = None
        if is_sharded(self.plain):
            logger.warning_once(SHARDED)
            return False
        if not self.is_supported():
            logger.warning_once("replaced layers and unusual weights are not optimized for inference")
            return False
        modules = list(self.plain.modules())
        member_dicts = [members for module in modules for members in (module._modules, module._parameters)]
        self.__dict__["watched"] = [module for module in modules if module is not self.plain]
        self.__dict__["_member_dicts"] = member_dicts
        self.__dict__["_weights"] = list(self.plain.parameters())
        # keeps them alive: a new object could get the id of a freed one
        self.__dict__["_members"] = [member for members in member_dicts for member in members.values()]
        with torch.no_grad():
            self.build()
        # Writing through `weight.data`, as PEFT does when it merges LoRA, leaves no trace but the numbers. On GPUs
        # they are not compared: every call would wait for the device.
        samples = [sample_of(weight) for weight in self._weights if weight.device.type == "cpu"]
        self.__dict__.update(_samples=samples, _values=torch.cat(samples) if samples else None)
        self.fingerprint = self._fingerprint()
        return True

    def is_supported(self) -> bool:
        """Whether all weights are ordinary parameters, whose versions tell when they change."""
        return all(type(weight) is nn.Parameter and not weight.is_inference() for weight in self.plain.parameters())

    @abstractmethod
    def build(self) -> None:
        """Prepare fast copies of the weights; attributes go into `self.__dict__`, past `__setattr__`."""

    @abstractmethod
    def run(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """The fast computation."""


def wrap(kind: type[OptimizedModule], plain: nn.Module, **settings: Any) -> Any:
    """A wrapper of this kind around a module; `isinstance` also sees the module's class."""
    return _class_of(kind, type(plain))(plain, **settings)  # type: ignore[arg-type]


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside a wrapper; any other module itself."""
    return module.plain if isinstance(module, OptimizedModule) else module


@functools.cache
def _class_of(kind: Any, plain: Any) -> Any:
    return type(kind.__name__, (kind, plain), {"__module__": kind.__module__, "kind": kind})


def sample_of(weight: torch.Tensor) -> torch.Tensor:
    """A view of SAMPLES numbers spread over the memory of a weight; of all if it has fewer."""
    room = weight.untyped_storage().nbytes() // weight.itemsize - weight.storage_offset()
    numbers = min(weight.numel(), room)  # in memory, where an expanded weight has fewer
    return weight.detach().as_strided((min(numbers, SAMPLES),), (max(1, numbers // SAMPLES),))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers weights of this module for each call."""
    return any(getattr(member, "_is_fsdp_managed_module", False) for member in module.modules())


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a user's hook sees this module's calls: not those of FSDP, nor transformers' recorders, which record
    only in calls that request outputs.
    """
    # most modules have none, and this runs for every module of every block: look at the dicts before their values
    if not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    hooks += (*module._backward_pre_hooks.values(), *module._backward_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith(BOOKKEEPING) for hook in hooks)
