"""Remove what training adds to the names of a ViT: prefixes of torch.compile, DDP, Lightning and DINO, and counters.

After `unwrap` the formats see the names of their library.
"""

import re

from .tensor_file import TensorFile


# Parts of a prefix: attributes under which a training script stores the network.
WRAPPERS = (
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"),
    *("model", "backbone", "encoder", "network", "net", "student", "teacher", "target_encoder", "ema", "ema_model"),
    *("base_model", "feature_extractor", "trunk", "classifier_model", "averaged_model", "timm_model", "0"),
)
# The tensor that every ViT of a library has exactly once; its name begins with the prefix.
ANCHORS = (
    "patch_embed.proj.weight",  # timm, DINO, MAE, DINOv2, DINOv3
    "patch_embed.backbone.stem.conv.weight",
    "embeddings.patch_embeddings.projection.weight",  # transformers, hf_vit
    "embeddings.patch_embeddings.weight",  # transformers' DINOv3
    "embeddings.patch_embedding.weight",  # transformers' CLIP and SigLIP
    "embeddings.patch_embed.weight",  # transformers' AIMv2
    "conv_proj.weight",  # torchvision
    "visual.conv1.weight",  # OpenAI's CLIP, open_clip
)
COUNTERS = r"(.*\.)?(global_step|step|epoch|n_averaged|num_updates|num_batches_tracked|iteration|decay)$"


def unwrap(file: TensorFile) -> TensorFile:
    """A view of the file with the names of its library; removed prefixes and unused tensors are noted.

    Wrappers inside the network (`blocks.0._orig_mod.attn...`) are removed too. Tensors outside the prefix (another
    network, a projection head) are not used, except a linear head `head.weight`, `head.bias`.
    """
    clean = {
        re.sub(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", n): n for n in file
    }
    if any(re.search(r"\bblocks\.\d+\.\d+\.norm1\.", name) for name in clean):  # DINOv2 trains blocks in chunks
        clean = {re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", name): old for name, old in clean.items()}
    if len(clean) < len(file.shapes):  # two tensors would have one name: the format reports unknown names
        return file
    counters = {name for name in clean if re.match(COUNTERS, name) and not file.shapes[clean[name]]}
    names = {name: old for name, old in clean.items() if name not in counters}
    prefix = _prefix(names)
    inside = {name.removeprefix(prefix): old for name, old in names.items() if name.startswith(prefix)}
    outside = sorted(name for name in names if not name.startswith(prefix))
    for kind in ("weight", "bias"):
        if prefix and f"head.{kind}" in outside and f"head.{kind}" not in inside:
            inside[f"head.{kind}"] = names[f"head.{kind}"]
            outside.remove(f"head.{kind}")
    if prefix:
        file.notes.append(f"'{prefix}' taken off the names")
    if outside:
        more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        file.notes.append(f"not under '{prefix}', not used: {', '.join(outside[:5])}{more}")
    if counters:
        file.notes.append(f"counters, not used: {', '.join(sorted(counters))}")
    return file.renamed(inside) if inside != {name: name for name in file} else file


def _prefix(names: dict[str, str]) -> str:
    """The wrappers before the anchor, with their dot; empty if there is no anchor or more than one prefix."""
    prefixes = {}
    for anchor in ANCHORS:
        for name in names:
            if name == anchor or name.endswith("." + anchor):
                parts = name.removesuffix(anchor).split(".")[:-1]
                count = 0
                while count < len(parts) and (
                    parts[count] in WRAPPERS or parts[count : count + 2] == ["visual", "trunk"]
                ):
                    count += 1  # visual.trunk: timm's model inside one of open_clip
                prefixes[".".join(parts[:count]) + "." if count else ""] = name
    if len(prefixes) != 1:  # such as student and teacher
        return next((prefix for prefix in prefixes if prefix.startswith("teacher")), "")
    return next(iter(prefixes))
