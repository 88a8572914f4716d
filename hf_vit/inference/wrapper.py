"""What stands in the place of a module and computes the same faster: it holds the plain module and steps aside for it.

Parameters, children, buffers and hooks are the plain module's own, under the same names, so training, saving,
loading, `torch.compile`, LoRA and hooks go to it. Fast copies of weights are made at the first call that can use
them, and again when weights have changed.

Tests: tests/hf_vit/inference/test_optimize.py.
"""

import functools
from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

SHARDED = "sharded weights (FSDP) are not optimized for inference: the plain layers serve"
BOOKKEEPING = ("torch.distributed.fsdp", "transformers.utils.output_capturing")  # hooks that show nobody anything


class OptimizedModule(nn.Module):
    """Base of what replaces a module. `wrap(kind, module)` makes one.

    Subclasses give `build`, which prepares weights, and `run`, the fast computation. Settings become attributes.
    """

    own = frozenset({"plain", "fingerprint", "watched", "forward", "_compiled_call_impl"})  # the rest is the plain's
    plain: Any
    fingerprint: list | None
    watched: list[nn.Module]
    kind: type["OptimizedModule"]  # of which the class of the wrapper is made

    def __init__(self, plain: nn.Module, **settings: Any):
        shared = {name: value for name, value in plain.__dict__.items() if isinstance(value, dict | set)}
        self.__dict__.update(shared)  # children, parameters, buffers and every kind of hook, by reference
        self.__dict__.update(plain=plain, fingerprint=None, watched=[], settings=settings)
        self.__dict__.update(settings)

    # -- whatever is not fast belongs to the plain module

    def __getattr__(self, name: str) -> Any:
        if "plain" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # `fully_shard` gives the module that it is called with another class
            object.__setattr__(self, name, value)
        elif name in self.own:
            self.__dict__[name] = value
        else:
            if name in self.__dict__:  # a shared dict is replaced as a whole
                self.__dict__[name] = value
            setattr(self.plain, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ and name in self.own:
            del self.__dict__[name]
        else:
            delattr(self.plain, name)

    def train(self, mode: bool = True):
        if mode:  # weights may change in ways that leave no trace (`parameter.data`): prepared again at eval()
            self.fingerprint = None
        self.plain.train(mode)
        return self

    def _apply(self, fn, recurse: bool = True):
        self.plain._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self):
        return self.plain._replicate_for_data_parallel()

    def __reduce__(self) -> tuple:
        """Copies and pickles keep the plain module and the settings; the rest is prepared again."""
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
        """Whether the fast computation may answer this call; prepares it where weights or layers are new."""
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
        """Whether layers and weights are those that were prepared, with the same contents."""
        return self.fingerprint is not None and self.fingerprint == self._fingerprint()

    def _fingerprint(self) -> list:
        """Changes when a layer or a weight is replaced, added or written to."""
        members = [id(member) for held in self._held for member in held.values()]
        return members + [(weight._version, weight.data_ptr()) for weight in self._weights]

    def prepare(self) -> bool:
        """Remember layers and weights, and build from them; False where they are not what the fast code is for."""
        self.fingerprint = None
        if is_sharded(self.plain):
            logger.warning_once(SHARDED)
            return False
        if not self.is_supported():
            logger.warning_once("replaced layers and unusual weights are not optimized for inference")
            return False
        modules = list(self.plain.modules())
        held = [part for module in modules for part in (module._modules, module._parameters)]
        self.__dict__["watched"] = [module for module in modules if module is not self.plain]
        self.__dict__["_held"] = held
        self.__dict__["_weights"] = list(self.plain.parameters())
        self.__dict__["_alive"] = [member for part in held for member in part.values()]  # so that ids stay theirs
        with torch.no_grad():
            self.build()
        self.fingerprint = self._fingerprint()
        return True

    def is_supported(self) -> bool:
        """Whether all weights are ordinary parameters, whose versions tell when they change."""
        return all(type(weight) is nn.Parameter and not weight.is_inference() for weight in self.plain.parameters())

    @abstractmethod
    def build(self) -> None:
        """Prepare what is computed once from the weights; attributes go into `self.__dict__`."""

    @abstractmethod
    def run(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """The fast computation."""


def wrap(kind: type[OptimizedModule], plain: nn.Module, **settings: Any) -> Any:
    """A wrapper of this kind around a module; it is an instance of the module's class too, for `isinstance`."""
    return _class_of(kind, type(plain))(plain, **settings)  # type: ignore[arg-type]


def plain_module(module: nn.Module) -> nn.Module:
    """The module that a wrapper holds; any other module is itself."""
    return module.plain if isinstance(module, OptimizedModule) else module


@functools.cache
def _class_of(kind: Any, plain: Any) -> Any:
    return type(kind.__name__, (kind, plain), {"__module__": kind.__module__, "kind": kind})


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers weights of this module for each call: copies of them would go stale without a trace."""
    return any(getattr(member, "_is_fsdp_managed_module", False) for member in module.modules())


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody's hook sees this module's calls. Sharding's hooks do not count, nor transformers' recorders,
    which record only in calls that ask for outputs.
    """
    if not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    hooks += (*module._backward_pre_hooks.values(), *module._backward_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith(BOOKKEEPING) for hook in hooks)
