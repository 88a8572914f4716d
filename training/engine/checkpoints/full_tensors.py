"""Model and optimizer state as full tensors by parameter name, whatever the sharding of the run (FSDP2's DTensor).

For `trainer_state.py`: a checkpoint that eight sharded processes wrote can be read by one, and the other way round.

Tests: tests/training/engine/checkpoints/test_checkpoint_io.py.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_vit.errors import HFViTError


# State that schedule-free AdamW keeps in its groups, among the hyperparameters.
GROUP_STATE = ("k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")


def gathered(value: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full(tensor: torch.Tensor, keep: bool = True, copies: bool = False) -> torch.Tensor:
    """The full tensor on the CPU; gathers a sharded one from all processes.

    Args:
        keep: False on processes that only take part in the gathering, and get an empty tensor.
        copies: copy a tensor that is on the CPU already, for a checkpoint that is written while training goes on.
    """
    complete = gathered(tensor.detach())
    return complete.to("cpu", copy=copies).contiguous() if keep else complete.new_empty(0)


def reshard(module: nn.Module) -> None:
    """Free the weights that FSDP2 leaves gathered after a forward pass without a backward pass.

    Until then the module's parameters are full copies, not the shards that the optimizer and the average hold.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` on the device of `parameter`, and sharded like it."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def model_weights(model: nn.Module, keep: bool = True, copies: bool = False) -> dict[str, torch.Tensor]:
    """Full weights by name, on the CPU; arguments as in `full`. Every process has to call it."""
    return {name: full(value, keep, copies) for name, value in model.state_dict().items()}


@torch.no_grad()
def set_model_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy full weights into the model, whatever its sharding.

    Raises:
        HFViTError: names or shapes differ.
    """
    parameters = model.state_dict()
    different = sorted(set(parameters) ^ set(weights)) or [
        name for name in parameters if parameters[name].shape != weights[name].shape
    ]
    if different:
        raise HFViTError(
            f"the weights are of another architecture: {different[0]} and {len(different) - 1} others differ"
        )
    for name, value in parameters.items():
        value.copy_(shard_like(weights[name], value))


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict, keep: bool = True, copies: bool = False
) -> tuple[dict, dict]:
    """The optimizer's tensors by "parameter name/slot", and the rest of its state for JSON; arguments as in `full`.

    Every process has to call it.
    """
    tensors, numbers = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # no state yet: a parameter that has had no gradient so far
            for slot, value in optimizer.state.get(parameter, {}).items():
                key = f"{names[parameter]}/{slot}"
                if isinstance(value, torch.Tensor):
                    tensors[key] = full(value, keep, copies)
                elif value is not None:
                    numbers[key] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups, "class": type(optimizer).__name__}


def set_optimizer_state(optimizer, names: dict, tensors: dict, rest: dict[str, Any], hyperparameters: bool) -> None:
    """Restore what `optimizer_state` returned.

    Args:
        hyperparameters: also restore rates, decays and betas; False if this run's arguments have set them.

    Raises:
        HFViTError: another optimizer, or other parameters are trained.
    """
    kind = type(optimizer).__name__
    if rest.get("class", kind) != kind:
        raise HFViTError(f"the state is that of {rest['class']}, this run has {kind}: restore --optim")
    trained = {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    slots: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["numbers"]}.items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    if not slots.keys() <= trained or len(rest["groups"]) != len(optimizer.param_groups):
        raise HFViTError(
            f"the optimizer's state has {len(rest['groups'])} groups and {len(slots)} parameters, this run's has "
            f"{len(optimizer.param_groups)} and {len(trained)}: restore --freeze_backbone, --layer_decay and --optim"
        )
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        restored = saved if hyperparameters else {key: saved[key] for key in GROUP_STATE if key in saved}
        # JSON has no tuples, and optimizers expect one for betas.
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in restored.items()})
        for parameter in group["params"]:
            if names[parameter] in slots:
                optimizer.state[parameter] = {
                    slot: _slot_on_device(slot, value, parameter, group)
                    for slot, value in slots[names[parameter]].items()
                }


def _slot_on_device(slot: str, value: Any, parameter: torch.Tensor, group: dict) -> Any:
    # Step counters stay on the CPU unless the optimizer is fused or capturable, as in torch's own loading.
    if not isinstance(value, torch.Tensor):
        return value
    if slot == "step" and not (group.get("fused") or group.get("capturable")):
        return value
    return shard_like(value, parameter)
