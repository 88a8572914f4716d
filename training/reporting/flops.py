"""Floating-point operations of a ViT or hybrid, in a forward pass and in training.

For facts.json and the utilization in the progress line. Matrix products and convolutions count, two operations per
multiply-add, as in Table 6 of arXiv:2010.11929 (ViT-B/16, 7 epochs of JFT's 303 million images: 224 exaFLOPs); norms,
activations and softmax do not. The backward pass costs twice the forward pass, or once if no gradient of the input is
needed. Patch dropout, drop path, and the last block that computes only the token which the head reads, are counted as
executed; drop path by its mean (compiled code computes everything). Repeated forward passes of activation
checkpointing do not count. Other networks of transformers are counted by torch: three forward passes per image. For
our models this is a closed form, as a counter would see one draw of drop path; the tests compare it with torch's
`FlopCounterMode`.
"""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from hf_vit import HFViTConfig
from hf_vit.transformers_classifiers import num_channels


# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets; looked up in the device's name, in this order.
PEAKS = {
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def counted_forward_flops(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, image_size: tuple[int, int]
) -> int:
    """Operations of one image's forward pass, counted by torch on the meta device; any classifier of transformers."""
    with torch.device("meta"):  # eager, because fused attention is not counted on every device
        model = model_class._from_config(config, attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, num_channels(config), *image_size))
    return counter.get_total_flops()


def stem_flops(config: HFViTConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """Operations of the ResNet before the patches, and of its first convolution alone, for one image."""
    if config.resnet_depths is None:
        return 0, 0
    width = int(64 * config.resnet_width_factor)
    height, across = (-(-side // 2) for side in image_size)
    root = 2 * height * across * 49 * config.num_channels * width
    height, across = -(-height // 2), -(-across // 2)  # max pool
    total, channels = root, width
    for stage, depth in enumerate(config.resnet_depths):
        features = width * 2**stage
        for unit in range(depth):
            before = height * across
            if unit == 0 and stage > 0:
                height, across = -(-height // 2), -(-across // 2)
            after = height * across
            total += 2 * before * channels * features  # conv1, 1x1, before the stride
            total += 2 * after * 9 * features * features  # conv2, 3x3, carries the stride
            total += 2 * after * features * 4 * features  # conv3, 1x1
            if channels != 4 * features or after != before:
                total += 2 * after * channels * 4 * features
            channels = 4 * features
    return total, root


def forward_flops(config: HFViTConfig, image_size: tuple[int, int] | None = None, training: bool = False) -> int:
    """Operations of one image's forward pass.

    Args:
        config: of the model. image_size: (height, width) in pixels; default: the config's.
        training: count the operations in training: less those saved by patch dropout, drop path and, if the head
            reads one token, the last block.
    """
    first, rest, head = _parts(config, image_size, training)
    return first + rest + head


def train_flops(
    config: HFViTConfig,
    image_size: tuple[int, int] | None = None,
    frozen: bool = False,
    compiled: bool = False,
    all_tokens: bool = False,
) -> int:
    """Operations of one image's forward and backward pass.

    Args:
        frozen: only the classifier is trained, on what the network computes in evaluation.
        compiled: by torch.compile, which computes what drop path discards.
        all_tokens: the last block computes every token, whatever the head reads.
    """
    first, rest, head = _parts(config, image_size, not frozen, compiled, all_tokens)
    if frozen:
        return first + rest + 2 * head
    return 2 * first + 3 * rest + 3 * head


def _parts(
    config: HFViTConfig,
    image_size: tuple[int, int] | None,
    training: bool,
    compiled: bool = False,
    all_tokens: bool = False,
) -> tuple[int, int, int]:
    """Forward operations: of the first convolution, of the rest, of the classifier."""
    size = image_size or config.image_size_hw
    dim, mlp, labels = config.hidden_size, config.intermediate_size, config.num_labels
    rows, columns = config.grid_for(size)
    patches = rows * columns
    stem, root = stem_flops(config, size)
    projection = 2 * patches * config.patch_size_hw[0] * config.patch_size_hw[1] * config.stem_channels * dim
    first, rest = (projection, 0) if config.resnet_depths is None else (root, stem - root + projection)
    tokens_kept = (
        max(1, round(patches * (1 - config.patch_dropout_rate))) if training and config.patch_dropout_rate else patches
    )
    tokens = tokens_kept + config.num_prefix_tokens
    depth = config.num_hidden_layers
    one_token = config.pooling in ("token", "first") and config.head_input == "pooled"
    read = 1 if training and not all_tokens and one_token else tokens
    matrices = 3 if config.mlp_type == "swiglu" else 2
    layer, last = (  # k and v of all tokens; q, attention, output and MLP of those that are computed
        4 * tokens * dim * dim + 4 * some * dim * dim + 4 * some * tokens * dim + 2 * matrices * some * dim * mlp
        for some in (tokens, read)
    )
    drops = training and not compiled and depth > 1  # blocks 0 ... L - 1 at rates 0 ... rate
    kept_before = depth - 1 - (config.drop_path_rate * (depth - 2) / 2 if drops else 0)
    rest += round(kept_before * layer + (1 - config.drop_path_rate * drops) * last)
    if config.pooling == "map":  # one query over the tokens that are pooled, then an MLP
        pooled = tokens if config.map_over_prefix else tokens_kept
        rest += 4 * pooled * dim * dim + 2 * (1 + config.map_query_proj) * dim * dim + 4 * pooled * dim
        rest += 4 * dim * (config.map_intermediate_size or mlp) * config.map_mlp
    if config.representation_size:
        rest += 2 * dim * config.representation_size
    return first, rest, 2 * config.head_width * labels


def color_flops(config: HFViTConfig, image_size: tuple[int, int] | None = None) -> int:
    """Operations of the colors' layer, forward, for one image."""
    rows, columns = config.grid_for(image_size or config.image_size_hw)
    return 2 * rows * columns * config.hidden_size * 8**config.num_channels


def measured_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device: a table for known GPUs in bf16 or fp16, a measured matrix product on the CPU.

    None if unknown. Takes about 0.2 s on the CPU, with as many threads as torch uses.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return (
            next((peak for part, peak in PEAKS.items() if part in name), None)
            if precision in ("bf16", "fp16")
            else None
        )
    if device.type != "cpu" or precision != "fp32":
        return None
    side = 768
    a, b = torch.ones(side, side), torch.ones(side, side)
    best, deadline = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
