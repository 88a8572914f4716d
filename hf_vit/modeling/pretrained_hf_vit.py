"""The base class of all models: initialization, loading at any resolution, saving with code, attention maps.

This file travels to the Hub beside the weights: it imports only torch, safetensors, transformers and its sibling
files. Layers whose initialization depends on their part in the network name it (`role`).

Sources: the Flax modules of google-research/vision_transformer `vit_jax/models_vit.py`, `models_resnet.py` at c6de1e5
and google-research/big_vision `models/vit.py` at 0127fb6.
"""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.utils import cached_file

from .configuration_hf_vit import HFViTConfig, as_pair
from .position_embedding import resize_patch_kernel, resize_relative_table


FLOAT_KINDS = ("F64", "F32", "F16", "BF16")  # dtypes in safetensors' names
TRAVELLING_FILES = (
    "configuration_hf_vit.py",
    "position_embedding.py",
    "resnet_stem.py",
    "pretrained_hf_vit.py",
    "modeling_hf_vit.py",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
Size: TypeAlias = int | list[int] | tuple[int, int]  # pixels: one number, or (height, width)


@cache
def register_key_layouts() -> None:
    """Register transformers' own layouts for `from_pretrained`: ViT before v5 and the removed vit-hybrid.

    Called when the first model is made, not at import: transformers builds the layouts of all its own models on the
    first registration, which is most of the time that importing our classes would take.
    """
    layouts: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(r"encoder\.layer\.", r"(?<!\d\.)layers."),
        WeightRenaming("attention.query", "q_proj"),
        WeightRenaming("attention.key", "k_proj"),
        WeightRenaming("attention.value", "v_proj"),
        WeightRenaming("attention.output.dense", "attention.o_proj"),
        WeightRenaming("intermediate.dense", "mlp.fc1"),
        WeightRenaming("output.dense", "mlp.fc2"),
        WeightRenaming(r"backbone\.bit\.embedder\.convolution\.", "backbone.conv_root."),
        WeightRenaming(r"backbone\.bit\.embedder\.norm\.", "backbone.gn_root."),
        WeightRenaming(r"backbone\.bit\.encoder\.stages\.(\d+)\.layers\.", r"backbone.stages.\1.units."),
        WeightRenaming(r"units\.(\d+)\.norm1\.", r"units.\1.gn1."),
        WeightRenaming(r"units\.(\d+)\.norm2\.", r"units.\1.gn2."),
        WeightRenaming(r"units\.(\d+)\.norm3\.", r"units.\1.gn3."),
        WeightRenaming(r"units\.(\d+)\.downsample\.conv\.", r"units.\1.conv_proj."),
        WeightRenaming(r"units\.(\d+)\.downsample\.norm\.", r"units.\1.gn_proj."),
    ]
    register_checkpoint_conversion_mapping("HFViTModel", layouts, overwrite=True)


class HFViTPreTrainedModel(PreTrainedModel):
    """Base class: initialization, loading at any resolution, saving with code, and attention maps."""

    config: HFViTConfig
    config_class = HFViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # transformers' Trainer then divides the loss by the accumulation steps
    _no_split_modules = ["HFViTEmbeddings", "HFViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "patch_embeddings"  # for `get_input_embeddings`

    def __init__(self, config: HFViTConfig, *inputs, **kwargs):
        register_key_layouts()
        super().__init__(config, *inputs, **kwargs)

    @property
    def encoder(self):
        """The encoder inside a model with a head; the encoder itself otherwise."""
        return self.base_model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a layer. Distributions under `initializer="jax"` (Flax modules of vit_jax and big_vision):

        LayerNorm, GroupNorm        ones, zeros; the last norm of a residual unit (`gn3`) has scale zero
        patch projection            LeCun normal (truncated, variance 1 / fan_in), bias zeros
        ResNet convolutions         LeCun normal
        class token                 zeros
        positions, registers        normal 0.02
        q, k, v, o                  Xavier uniform, bias zeros
        MLP                         Xavier uniform, bias normal 1e-6
        LayerScale                  `layer_scale_init`
        relative position biases    zeros
        MAP probe                   Xavier uniform
        representation layer        LeCun normal, bias zeros
        classifier                  zeros, bias `head_bias_init`

        `"truncated_normal"`: every weight and token from a normal of std 0.02 truncated at two stds, biases zero
        except the classifier's. `"normal_tokens"`: as `"jax"`, class token and positions from N(0, 1).
        """
        scheme, role = self.config.initializer, getattr(module, "role", None)
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            # zero: a residual unit is the identity at first (arXiv:1706.02677, section 5.1)
            (init.zeros_ if role == "end_of_branch" else init.ones_)(module.weight)
            if not isinstance(module, nn.RMSNorm):
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            if scheme == "truncated_normal":
                init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            elif role == "classifier":
                init.zeros_(module.weight)
            elif isinstance(module, nn.Conv2d) or role == "representation":
                _lecun_normal(module.weight)
            else:
                init.xavier_uniform_(module.weight)
            # transformers' `init` functions leave alone what a checkpoint has just filled
            if module.bias is not None and role == "mlp" and scheme != "truncated_normal":
                init.normal_(module.bias, std=1e-6)
            elif module.bias is not None:
                init.constant_(module.bias, self.config.head_bias_init if role == "classifier" else 0.0)
        elif role == "layer_scale":
            init.constant_(module.get_parameter("lambda1"), float(self.config.layer_scale_init or 0.0))
        elif role == "probe" and scheme != "truncated_normal":
            # Xavier by Flax's fans of a (1, 1, D) tensor: 1 in, D out
            limit = math.sqrt(6 / (1 + self.config.hidden_size))
            init.uniform_(module.get_parameter("probe"), -limit, limit)
        elif role == "relative_positions":
            for table in module.parameters(recurse=False):
                init.zeros_(table)
        elif role in ("tokens", "probe"):
            self._init_tokens(dict(module.named_parameters(recurse=False)), scheme)

    def _init_tokens(self, tokens: dict[str, nn.Parameter], scheme: str) -> None:
        for name, token in tokens.items():
            if name == "cls_token" and scheme == "jax":
                init.zeros_(token)
            elif scheme == "truncated_normal":
                init.trunc_normal_(token, std=0.02, a=-0.04, b=0.04)
            else:
                init.normal_(token, std=1.0 if scheme == "normal_tokens" and name != "register_tokens" else 0.02)

    # -- loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, keep_representation=False, **kwargs
    ):
        """As transformers' own; differences between config and checkpoint are applied after an exact load.

        Args:
            pretrained_model_name_or_path: folder or Hub id, ours or in the layouts of transformers' `vit` and
                removed `vit-hybrid`; with hf_vit installed, of every family that `hf_vit.load_checkpoint` reads.
            config: a configuration; or give its fields by name: `image_size` resizes the position table, `patch_size`
                and `num_channels` the patch kernel, `num_labels` or an `id2label` of another length make a new zero
                head.
            keep_representation: keep the dense + tanh layer below a new head.

        Raises:
            OSError: nothing at that path or id. ValueError: another architecture, invalid fields, or weights that
                are damaged, not finite or not of this configuration.
        """
        path = pretrained_model_name_or_path
        if path is None:  # transformers loads `state_dict` into a new model then
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config_dict, _ = cls.config_class.get_config_dict(path, **hub)
        if not cls.config_class.reads(config_dict) and config is None:
            return cls._from_other_family(path, hub, kwargs | {"keep_representation": keep_representation})
        source = cls.config_class.from_pretrained(path, **hub)
        if config is None and kwargs == hub:
            config = source  # nothing is changed: the file is read once
        elif config is None or isinstance(config, (str, Path)):
            config, kwargs = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
            kwargs |= hub
        else:
            config = copy.deepcopy(config)  # the caller's object is not changed
        # Load the checkpoint with its own sizes and labels first, so that a mismatch is an error; then resize.
        load = copy.copy(config)  # shallow: transformers makes a deep copy
        for name in ("image_size", "patch_size", "num_channels", "representation_size", "id2label", "label2id"):
            setattr(load, name, getattr(source, name))
        shapes, dtypes = _stored_tensors(path, hub)
        if getattr(source, "quantization_config", None) is None:
            _check_floats(dtypes, path)
        if cls._reads_upstream_pooler and source.representation_size is None and config.representation_size is None:
            load.representation_size = config.representation_size = _stored_pooler_width(shapes)
        _check_sizes_of_file(load, shapes, path)  # before a network of another size is built
        _check_tensor_parallel(load, kwargs.get("tp_plan"))
        wants_info, strict = kwargs.pop("output_loading_info", False), not kwargs.pop("ignore_mismatched_sizes", False)
        # mismatched sizes are reported by `_check_loaded`, in one line with the way out
        loaded: Any = super().from_pretrained(
            path, *model_args, config=load, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        cls._check_loaded(path, info, strict, load, source)
        _check_finite(model, path)
        model._change_to(config, keep_representation)
        return (model, info) if wants_info else model

    @classmethod
    def _from_other_family(cls, path, hub: dict, requested: dict):
        """Load a folder of DINOv2, CLIP, timm, ... by `hf_vit.checkpoints`, which does not travel with this file."""
        try:
            from hf_vit.checkpoints import load_checkpoint
        except ImportError as error:
            raise ValueError(f"{path} is a checkpoint of another family: `pip install hf-vit` reads it") from error
        wants_info = requested.pop("output_loading_info", False)
        dtype = requested.pop("torch_dtype", None)
        fields = {
            name: value for name, value in requested.items() if name not in (*HUB_ARGUMENTS, "trust_remote_code")
        }
        if dtype is not None:
            fields["dtype"] = dtype
        # `HFViTModel.from_pretrained` of a classifier gives its encoder
        model: Any = load_checkpoint(path, revision=hub.get("revision"), **fields)
        if cls.base_model_prefix and not isinstance(model, cls):
            model = model.base_model
        if not isinstance(model, cls):
            raise ValueError(
                f"{cls.__name__} reads folders of hf_vit only: load {path} as HFViTModel and save it first"
            )
        info: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} | {
            "error_msgs": []
        }
        return (model, info) if wants_info else model

    @classmethod
    def _check_loaded(cls, path, info: dict, strict: bool, load: HFViTConfig, source: HFViTConfig) -> None:
        """Check that weights and configuration belong together; raise ValueError."""
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(cls._may_be_missing))
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} encoder tensors ({', '.join(missing[:3])}, ...): a checkpoint in "
                "another layout; hf_vit.load_checkpoint reads those of Google, timm, torchvision and DeiT"
            )
        mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
        if mismatched and strict:
            raise ValueError(
                f"{path}: config.json does not fit the weights, {len(mismatched)} tensors have other shapes "
                f"({', '.join(mismatched[:3])}): correct config.json"
            )
        changed = {name for name in _STRUCTURE if getattr(load, name) != getattr(source, name)}
        unused = sorted(key for key in info["unexpected_keys"] if re.search(cls._has_to_be_used, key))
        if unused and not changed:  # with num_hidden_layers=6, for example, unused blocks are intended
            raise ValueError(
                f"{path}: config.json describes a network without {len(unused)} tensors of the file "
                f"({', '.join(unused[:3])}): correct config.json"
            )

    _reads_upstream_pooler = False  # whether transformers' `pooler.dense` becomes the representation layer
    _may_be_missing = ("classifier.", "colours.", "mask_token")  # a head that is trained next
    _has_to_be_used = r"^(vit\.)?(embeddings\.(?!mask_token)|layers\.|encoder\.|layernorm\.|map_head\.)"

    def _change_to(self, requested: HFViTConfig, keep_representation: bool) -> None:
        """Change a loaded model to the resolution, patch, channels and labels of another configuration."""
        config = self.config
        if requested.patch_size_hw != config.patch_size_hw or requested.num_channels != config.num_channels:
            self.resize_patch_embeddings(requested.patch_size, requested.num_channels, image_size=requested.image_size)
        if requested.image_size_hw != config.image_size_hw:
            self.resize_position_embeddings(requested.image_size)
        if requested.representation_size not in (None, config.representation_size):
            raise ValueError(
                f"representation_size={requested.representation_size} asks for a layer that the checkpoint does not "
                f"have (it has {config.representation_size}): load it as it is, or from scratch"
            )
        self._change_head(requested, keep_representation)

    def _change_head(self, requested: HFViTConfig, keep_representation: bool) -> None:
        """Take over the requested labels; a model without classifier keeps only their names."""
        if requested.representation_size is None:
            self.encoder.pooler, self.config.representation_size = None, None
        self.config.id2label, self.config.label2id = requested.id2label, requested.label2id

    def save_pretrained(  # type: ignore[override]
        self, save_directory, *, save_original_format=False, push_to_hub=False, **kwargs
    ):
        """As transformers' own; also copies the model's code next to the weights.

        The folder loads on any machine with `trust_remote_code=True`. Keys are those of transformers v5;
        `save_original_format=True` writes those that the model came with.
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private") if name in kwargs}
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
        if kwargs.get("is_main_process", True):
            for name in TRAVELLING_FILES:
                source, target = Path(__file__).parent / name, Path(save_directory) / name
                if source.resolve() != target.resolve():  # a folder that was loaded with its code is saved in place
                    shutil.copyfile(source, target)
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub, token=kwargs.get("token"))

    # -- resolution

    @torch.no_grad()
    def resize_position_embeddings(self, image_size: Size) -> None:
        """Resize the position table to the grid of another image size (section 3.2).

        `image_size` is in pixels, one number or (height, width). Class and register tokens stay as they are.
        Raises ValueError for an image smaller than one patch.
        """
        embeddings = self.encoder.embeddings
        grid = self.config.grid_for(image_size)
        if min(grid) < 1:
            down, across = self.config.total_stride
            raise ValueError(f"image_size={image_size} is smaller than one patch, {down} x {across} pixels")
        table = embeddings.position_embeddings
        patches = embeddings.patch_positions(grid)
        if table is not None and patches is not None and grid != embeddings.grid_size:
            prefix = table[:, : self.config.num_class_rows]  # class tokens are not on the grid
            rows = torch.cat([prefix, patches], dim=1)  # (1, [1 +] rows * columns, D)
            embeddings.position_embeddings = nn.Parameter(rows.clone(), requires_grad=table.requires_grad)
        if self.config.relative_position_bias is not None and grid != embeddings.grid_size:
            self._resize_relative_positions(embeddings.grid_size, grid)
        embeddings.grid_size = grid
        self.config.image_size = image_size if isinstance(image_size, int) else as_pair(image_size)

    def _resize_relative_positions(self, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> None:
        for module in self.encoder.modules():
            for name, table in list(module.named_parameters(recurse=False)):
                if name.endswith("relative_position_bias_table"):
                    resized = resize_relative_table(table, old_grid, new_grid)
                    setattr(module, name, nn.Parameter(resized.clone(), requires_grad=table.requires_grad))
                    if hasattr(module, "grid_size"):
                        module.grid_size = new_grid

    @torch.no_grad()
    def resize_patch_embeddings(
        self,
        patch_size: Size,
        num_channels: int | None = None,
        image_size: Size | None = None,
    ) -> None:
        """Resize the patch kernel to another patch size (FlexiViT's pseudo-inverse) or number of channels.

        The position table is resized to the grid of `image_size` (default: the present one) with the new patch.
        Kernels of channels are repeated in turn and scaled so that a gray image in all channels gives the same tokens.
        """
        config, embeddings = self.config, self.encoder.embeddings
        patches = embeddings.patch_embeddings
        first = patches.projection if patches.backbone is None else patches.backbone.conv_root
        if num_channels is not None and num_channels != config.num_channels:
            old = first.weight
            order = torch.arange(num_channels) % config.num_channels  # RGB to 5 channels: R G B R G
            counts = torch.bincount(order, minlength=config.num_channels)[order].to(old)
            weight = old[:, order] / counts[:, None, None]  # (D, C', P, P)
            if num_channels < config.num_channels:  # the mean over channels, so that no color is favored
                weight = old.sum(dim=1, keepdim=True).expand(-1, num_channels, -1, -1) / num_channels
            first.weight = nn.Parameter(weight.clone(), requires_grad=old.requires_grad)
            first.in_channels = config.num_channels = num_channels
        new = as_pair(patch_size)
        if new != config.patch_size_hw:
            kernel = patches.projection.weight
            resized = resize_patch_kernel(kernel, new)
            patches.projection.weight = nn.Parameter(resized, requires_grad=kernel.requires_grad)
            patches.projection.kernel_size = patches.projection.stride = new
            config.patch_size = patch_size if isinstance(patch_size, int) else new
        self.resize_position_embeddings(config.image_size if image_size is None else image_size)

    # -- speed

    def optimize_for_inference(self, dtype: torch.dtype | None = None, int8_calibration: torch.Tensor | None = None):
        """Replace layers by faster ones, in place, and switch to evaluation mode. Returns the model.

        Under `torch.inference_mode()` or `no_grad()` patches, blocks and a hybrid's ResNet are computed by the
        implementations that are the fastest on this machine. They are measured once for each batch size and kept in
        a table on disk: the first pass takes longer, and every process computes the same bits. If there is a compiler,
        C++ kernels are compiled, which takes some seconds. Training, `output_attentions`, hooks, `torch.compile` and
        LoRA use the plain layers; saving writes their weights. Packed copies of weights need about as much memory
        again (in bfloat16 up to 1.7 times as much) and are made again when weights change; on a GPU, after writing
        through `weight.data`, call this again.

        Args:
            dtype: a floating dtype to convert weights to, such as `torch.bfloat16`. Float32 logits stay within 2e-5
                (hybrids 5e-5) of the plain model's. Bfloat16 logits are as close to float32 as plain bfloat16, in
                ViT-B, whose wide layers are summed in parts, up to 1.1 times as far. If the processor only emulates
                bfloat16, a warning says how much slower that is.
            int8_calibration: `(B, C, H, W)`, a few dozen normalized images like those to come: the blocks' linear
                layers become int8 (weights and activations) with quantization steps measured on these images. CPU
                only; logits move by some percent of the largest: check the accuracy on labeled images.

        Raises:
            ImportError: the package is not installed; the files that travel to the Hub are the plain model.
            ValueError: a dtype that cannot be computed in; int8 for layers, devices or processors that do not support
                it, or that it does not make faster.
        """
        try:
            from hf_vit.inference.optimize import optimize_encoder
        except ImportError as error:
            raise ImportError(
                f"optimize_for_inference is in the package, not in the model's own files: pip install hf-vit ({error})"
            ) from error
        if isinstance(dtype, torch.dtype) and dtype in (torch.int8, torch.uint8):
            raise ValueError(f"dtype={dtype}: int8 needs images to measure its steps on, int8_calibration=images")
        computes = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1  # not float8
        if dtype is not None and not computes:
            raise ValueError(f"dtype={dtype} is not a dtype to compute in: use torch.float32 or torch.bfloat16")
        before = [] if int8_calibration is None else [(x, x.data) for x in (*self.parameters(), *self.buffers())]
        self.eval()
        if dtype is not None:
            self.to(dtype)  # type: ignore[arg-type]
        try:
            optimize_encoder(self.encoder, int8_calibration)
        except ValueError:  # int8 is refused: the weights keep their precision
            for tensor, values in before:
                tensor.data = values
            raise
        return self

    # -- looking inside

    @torch.no_grad()
    def attention_maps(self, pixel_values: torch.Tensor, layers: Sequence[int] = (-1,)) -> dict[int, torch.Tensor]:
        """Attention weights of chosen blocks, with any attention backend, without storing those of the others.

        Args:
            pixel_values: `(B, C, H, W)`.
            layers: indices of blocks; negative ones count from the last.

        Returns:
            for each index of `layers`, `(B, heads, queries, keys)`; rows sum to one.

        Raises:
            ValueError: an index out of range.
        """
        blocks = self.encoder.layers
        maps: dict[int, torch.Tensor] = {}
        for index in layers:
            if not -len(blocks) <= index < len(blocks):
                raise ValueError(f"layer {index} does not exist: the model has {len(blocks)}, 0 to {len(blocks) - 1}")

        def record(index: int) -> Callable:
            def hook(attention, args: tuple, kwargs: dict, output: tuple) -> None:
                maps[index] = attention.weights(args[0], **kwargs)

            return hook

        hooks = [blocks[index].attention.register_forward_hook(record(index), with_kwargs=True) for index in layers]
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled encoder does not see new hooks
                self.encoder(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        return {index: maps[index] for index in layers}


def _lecun_normal(weight: torch.Tensor) -> None:
    """Flax's default: a normal truncated at two stds, whose variance after truncation is 1 / fan_in."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978  # std of a unit normal truncated at two stds
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


# -- checks that a file belongs to its configuration

# Fields that decide which tensors there are.
_STRUCTURE = tuple(
    name
    for name in HFViTConfig.__annotations__
    if not name.startswith(("_", "rope_"))
    and name
    not in (
        "layer_norm_eps",
        "group_norm_eps",
        "weight_standardization",
        "weight_standardization_eps",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "drop_path_rate",
        "patch_dropout_rate",
        "position_interpolation",
        "head_bias_init",
        "initializer",
        "num_attention_heads",
    )
)


def _stored_tensors(path, hub: dict) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shape and dtype of every tensor in a safetensors checkpoint, one file or shards; empty for other formats."""
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    files = [cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False, **hub)]
    if files == [None]:
        index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
        if index is None:
            return shapes, dtypes
        try:
            shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{index}: not the index of a sharded checkpoint; download it again") from None
        files = [cached_file(path, name, **hub) for name in shards]
    # headers only: get_slice reads no values
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                shapes |= {key: part.get_shape() for key, part in slices.items()}
                dtypes |= {key: part.get_dtype() for key, part in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or not a safetensors file ({error}); download it again") from None
    return shapes, dtypes


def _check_floats(dtypes: dict[str, str], path) -> None:
    """Refuse integer weights with ValueError: transformers would load the quantized numbers as the values."""
    buffers = ("_ids", "_index", "_tracked")  # position_ids, relative_position_index, num_batches_tracked
    integers = [name for name, kind in dtypes.items() if kind not in FLOAT_KINDS and not name.endswith(buffers)]
    if integers:
        name = integers[0]
        raise ValueError(
            f"{path}: '{name}' holds {dtypes[name]} numbers ({len(integers)} tensors do): quantized without the "
            "settings that tell what they mean; load the weights that they were made from"
        )


def _stored_pooler_width(shapes: dict[str, list[int]]) -> int | None:
    """Width of `pooler.dense` in a checkpoint of transformers, whose config does not have it, or None."""
    return next((shape[0] for name, shape in shapes.items() if name.endswith("pooler.dense.weight")), None)


def _check_sizes_of_file(config: HFViTConfig, shapes: dict[str, list[int]], path) -> None:
    """Compare the configuration's sizes with the file's, in any layout of names; raise ValueError.

    Checked before the network is built: a wrong number in config.json could make it take all memory.
    """

    def stored(*suffixes: str) -> list[int] | None:
        other_parts = ("decoder", "map_head")  # have tensors of the same names, of other sizes
        names = (name for name in shapes if name.endswith(suffixes) and not any(part in name for part in other_parts))
        return next((shapes[name] for name in names), None)

    numbers = [re.match(r"(?:\w+\.)*?layers?\.(\d+)\.", name) for name in shapes]
    blocks = [int(number[1]) for number in numbers if number]
    patch = stored("patch_embeddings.projection.weight")
    mlp = stored("mlp.fc1.weight", "intermediate.dense.weight", "mlp.gate_proj.weight")
    pooler, tokens = stored("pooler.dense.weight"), stored("embeddings.cls_token")
    registers, table = stored("embeddings.register_tokens"), stored("embeddings.position_embeddings")
    height, width = config.patch_size_hw
    pairs: list[tuple[str, Any, Any]] = [
        ("num_hidden_layers", config.num_hidden_layers, max(blocks) + 1 if blocks else None),
        ("hidden_size", config.hidden_size, patch and patch[0]),
        ("patch_size", (height, width), patch and tuple(patch[2:])),
        ("intermediate_size", config.intermediate_size, mlp and mlp[0]),
        ("representation_size", config.representation_size, pooler and pooler[0]),
        ("num_class_tokens", config.num_class_tokens, tokens and tokens[1]),
        ("num_register_tokens", config.num_register_tokens, registers and registers[1]),
        ("the channels that the patch projection reads", config.stem_channels, patch and patch[1]),
        ("rows of the position table", config.num_position_rows, table and table[-2]),
    ]
    for name, configured, actual in pairs:
        fewer = name == "num_hidden_layers" and actual is not None and config.num_hidden_layers < actual
        if actual is not None and configured is not None and configured != actual and not fewer:
            raise ValueError(
                f"{path}: config.json says {name}={configured}, the weights have {actual}: correct config.json; "
                "hf_vit.load_checkpoint reads checkpoints in other layouts"
            )


def _check_tensor_parallel(config: HFViTConfig, plan: Any) -> None:
    """Raise ValueError for fields that tensor parallelism does not support."""
    whole = [name for name in ("attention_norm", "mlp_norm", "relative_position_bias") if getattr(config, name)]
    if plan is not None and whole:
        raise ValueError(
            f"{whole[0]} needs all heads or channels in one place, which tensor parallelism (tp_plan) splits: leave "
            "tp_plan out"
        )


def _check_finite(model: nn.Module, path) -> None:
    """Raise ValueError for weights that are NaN or infinite: every output of such a model would be."""
    weights = {name: p.detach() for name, p in model.named_parameters() if type(p) is nn.Parameter and not p.is_meta}
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    if not weights:
        return
    # one sum a tensor finds the suspects at the speed of memory; `isfinite` would make a mask of each
    sums = torch.stack([weight.sum(dtype=torch.float32).cpu() for weight in weights.values()])
    suspicious = [name for name, total in zip(weights, sums.tolist()) if not math.isfinite(total)]
    broken = [name for name in suspicious if not weights[name].isfinite().all()]  # a sum may overflow by itself
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} tensors hold NaN or infinite numbers ({', '.join(broken[:3])}): the training "
            "diverged or the file is damaged; load an earlier checkpoint"
        )
