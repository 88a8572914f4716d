"""Optimizers, and their parameter groups: weight decay, and a learning rate for each layer.

For the Trainer. Sources: big_vision `optax.py` (decay mask `.*/kernel$`); Table 3 and Table 4 of arXiv:2010.11929;
layer-wise decay as in MAE `util/lr_decay.py`; Muon with AdamW's rates, arXiv:2502.16982; gradual unfreezing,
arXiv:1801.06146.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments


# Matrices that are not kernels: position tables and tokens, which big_vision's mask leaves out of the decay.
NOT_KERNELS = (
    *("position_embeddings", "cls_token", "register_tokens", "probe", "mask_token", "distillation_token"),
    *("relative_position_bias_table", "shared_relative_position_bias_table"),
)
# Muon is for hidden layers: last ones are left to AdamW. Names beside `classifier` and `colours` are transformers'.
HEADS = ("classifier", "colours", "classifier_distill", "head", "dist_head", "fc")

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
STAGE = re.compile(r"\.backbone\.stages\.(\d+)\.")
FIRST = re.compile(r"(?:^|\.)embeddings\.|(?:^|\.)(?:mask_token|shared_relative_position_bias_table)$")


# -- parameters ----------------------------------------------------------------------------------------------------


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to kernels, not to norms, biases, scales, positions or tokens."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in NOT_KERNELS


def layer_of_parameters(names: Iterable[str]) -> dict[str, int]:
    """The number of the layer that each parameter belongs to, from 0 at the image.

    Plain ViT: 0 for the embeddings (projection, positions, tokens), then the blocks, then everything after them (last
    LayerNorm, pooling, head). Hybrid: 0 for the ResNet's root, then its stages, then as above.
    """
    names = list(names)
    stages = [int(hit[1]) for name in names if (hit := STAGE.search(name))]
    blocks = [int(hit[1]) for name in names if (hit := BLOCK.search(name))]
    hybrid = any(".backbone." in name for name in names)
    embeddings = 1 + max(stages, default=-1) + 1 if hybrid else 0
    top = embeddings + max(blocks, default=-1) + 2  # the layer above the last block

    def number(name: str) -> int:
        if match := BLOCK.search(name):
            return embeddings + 1 + int(match[1])
        if match := STAGE.search(name):
            return 1 + int(match[1])
        if ".backbone." in name:
            return 0
        return embeddings if FIRST.search(name) else top

    return {name: number(name) for name in names}


def check_layers_known(model: nn.Module, option: str) -> None:
    """Raise HFViTError if `layer_of_parameters` does not know the layers of a network.

    Args:
        model: prepared or not, also inside a loss module. option: that needs the layers.
    """
    classifier = next((part for part in model.modules() if hasattr(part, "base_model_prefix")), None)
    if classifier is None or isinstance(classifier.config, HFViTConfig):
        return
    # `layers.N.blocks.M` (Swin) numbers stages, whose blocks would all get one rate.
    expected = re.compile(rf"(?:^|\.){classifier.base_model_prefix}\.layers\.\d+\.(?!blocks\.)")
    if not any(expected.search(name) for name, _ in model.named_parameters()):
        raise HFViTError(
            f"{option}: the order of the layers of {type(classifier).__name__} is not known; leave it out, or "
            "take one of hf_vit's ViTs"
        )


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups of the trainable parameters: with and without decay, and with `layer_decay` one pair for each layer.

    Each group has an `lr_scale`, `layer_decay ** (layers above it)`.
    """
    if layer_decay < 1:
        check_layers_known(model, "--layer_decay")
    layers = layer_of_parameters(name for name, _ in model.named_parameters())
    top = max(layers.values())
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers[name] if layer_decay < 1 else top
        fixed = not decays(name, parameter)
        empty = {
            "params": [],
            "weight_decay": 0.0 if fixed else weight_decay,
            "lr_scale": layer_decay ** (top - layer),
        }
        groups.setdefault((layer, fixed), empty)["params"].append(parameter)
    # Sorted: checkpoints restore groups by their position.
    return [groups[key] for key in sorted(groups)]


# -- optimizers ----------------------------------------------------------------------------------------------------


def create_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """Build the optimizer `args.optim` over the model's trainable parameters.

    Raises:
        HFViTError: an optimizer whose package is not installed.
    """
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    for group in groups:  # LambdaLR takes these as base rates
        group["lr"] = args.learning_rate * group["lr_scale"]
    if args.optim == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
    adamw: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim == "schedule_free_adamw":
        return _schedule_free(model, groups, args.learning_rate, adamw)
    if args.optim == "lamb":
        return Lamb(groups, **adamw)
    adamw["fused"] = args.optim != "adamw_torch" and _fused_works(group["params"] for group in groups)
    if args.optim == "muon":
        matrices, others = _hidden_matrices(model, groups)
        if matrices:
            return MuonWithAdamW(matrices, others, momentum=args.muon_momentum, **adamw)
    return torch.optim.AdamW(groups, lr=args.learning_rate, **adamw)


def _fused_works(groups: Iterable[list[torch.Tensor]]) -> bool:
    """Whether PyTorch has a fused AdamW for all parameters."""
    return all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for group in groups for p in group)


def _hidden_matrices(model: nn.Module, groups: list[dict]) -> tuple[list[dict], list[dict]]:
    """Split each group into its two-dimensional kernels between first and last layer, and the rest."""
    names = {parameter: name for name, parameter in model.named_parameters()}

    def hidden(parameter: torch.Tensor) -> bool:  # the patch embedding, a first layer, has four dimensions
        name = names[parameter]
        return parameter.ndim == 2 and decays(name, parameter) and not set(HEADS) & set(name.split("."))

    matrices = [group | {"params": [p for p in group["params"] if hidden(p)]} for group in groups]
    others = [group | {"params": [p for p in group["params"] if not hidden(p)]} for group in groups]
    return [g for g in matrices if g["params"]], [g for g in others if g["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for hidden matrices and AdamW for everything else, as one optimizer.

    Muon's steps are scaled to AdamW's size (`match_rms_adamw`), so that both share one learning rate and one decay.
    Sharded matrices (FSDP2) are orthogonalized as a whole, in bfloat16; another order of summation changes a step by
    up to 3 % of its length, about as much as bfloat16 does anyway.

    Args:
        matrices, others: parameter groups with their own `lr` and `weight_decay`. momentum: Muon's.
        betas, eps, fused: AdamW's.
    """

    def __init__(self, matrices: list[dict], others: list[dict], *, momentum: float, betas, eps: float, fused: bool):
        super().__init__([dict(group) for group in [*matrices, *others]], {})
        self.muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=fused)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self._share()

    def _share(self) -> None:
        """Let both halves use the groups and the state of the whole, which schedulers and checkpoints see."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        """One step of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss


class Lamb(torch.optim.Optimizer):
    """AdamW whose step has, tensor by tensor, the length of the weights (arXiv:1904.00962), as DeiT-III trains.

    As NVIDIA's FusedLAMB: bias-corrected moments; tensors without decay take AdamW's step as it is. The loop clips the
    global norm. Lengths are those of whole tensors, also of sharded ones (FSDP2).

    Args:
        groups: with their own `lr` and `weight_decay`. betas, eps: of the moments.
    """

    def __init__(self, groups: list[dict], *, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(group, parameters)
        return loss

    def _step(self, group: dict, parameters: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        gradients = [p.grad for p in parameters]
        # torch._foreach_*: one call for all tensors, as in PyTorch's own optimizers
        first, second = ([self.state[p][slot] for p in parameters] for slot in ("exp_avg", "exp_avg_sq"))
        counts = [self.state[p]["step"] for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_div(second, [1 - beta2**count for count in counts])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        directions = torch._foreach_div(first, [1 - beta1**count for count in counts])
        torch._foreach_div_(directions, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
            pairs = zip(torch._foreach_norm(parameters), torch._foreach_norm(directions))
            # A tensor of zeros (a new head) has no length to scale the step to, and takes it as it is.
            ratios = [torch.where((w > 0) & (u > 0), w / u, 1.0) for w, u in pairs]
            torch._foreach_mul_(directions, ratios)
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])


def _schedule_free(model: nn.Module, groups: list[dict], rate: float, adamw: dict[str, Any]) -> torch.optim.Optimizer:
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        raise HFViTError(
            "--optim schedule_free_adamw evaluates averaged weights, and BatchNorm has measured others: choose "
            f"another optimizer for {type(model).__name__}"
        )
    try:
        import schedulefree
    except ImportError:
        raise HFViTError("--optim schedule_free_adamw needs its package: pip install 'hf-vit[schedulefree]'") from None
    optimizer = schedulefree.AdamWScheduleFree(groups, lr=rate, **adamw)
    optimizer.train()  # the weights to take gradients at; `averaged_by` switches to those to evaluate
    return optimizer


@contextmanager
def averaged_by(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the model of a schedule-free optimizer hold the averaged weights; other optimizers do nothing."""
    groups = optimizer.param_groups
    if not groups[0].get("train_mode", False):
        yield
        return
    # eval() and train() compute one from the other, which rounds: only a copy restores the same bits.
    weights = [p.detach().clone() for group in groups for p in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip((p for group in groups for p in group["params"]), weights):
                parameter.copy_(value)


class GradualUnfreezing:
    """Layers begin to train one after another, from the head down, as a function of the step alone.

    Until then a layer's gradient is dropped before clipping, so that the optimizer neither moves it nor keeps state.

    Args:
        model: prepared or not. every: steps between the beginnings of two layers.
    """

    def __init__(self, model: nn.Module, every: int):
        check_layers_known(model, "--unfreeze_every")
        numbers = layer_of_parameters(name for name, _ in model.named_parameters())
        top = max(numbers.values())
        self.last = top * every  # the step at which the lowest layer begins
        # requires_grad stays: DDP and FSDP were prepared for all of them, and need a gradient from each
        self.waiting = [(p, (top - numbers[name]) * every) for name, p in model.named_parameters()]

    def check(self, max_steps: int) -> None:
        """Raise HFViTError if the run ends before its lowest layer begins to train."""
        if self.last >= max_steps:
            raise HFViTError(
                f"--unfreeze_every: the lowest layer would begin at step {self.last}, after the end of training "
                f"({max_steps}): lower it"
            )

    def drop_gradients(self, step: int) -> None:
        """Drop the gradients of the layers that do not train at `step` (from 0)."""
        if step < self.last:
            for parameter, begins in self.waiting:
                if step < begins:
                    parameter.grad = None
