"""Models that are no plain ViT, refused by their own name: hierarchical, windowed, video, text, detection models.

By `model_type` of config.json first, then by names of tensors. Features of one format alone are refused there.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import re

from ...errors import HFViTError
from ..tensor_file import TensorFile
from .timm_architectures import PLAIN, entry_point_of


# model_type: (its name, what it is)
MODEL_TYPES = {
    "swin": ("Swin", "hierarchical"),
    "swinv2": ("Swin V2", "hierarchical"),
    "swin2sr": ("Swin2SR", "hierarchical, super-resolution"),
    "donut-swin": ("Donut's Swin", "hierarchical"),
    "maskformer-swin": ("MaskFormer's Swin", "hierarchical"),
    "focalnet": ("FocalNet", "hierarchical, without attention"),
    "hiera": ("Hiera", "hierarchical"),
    "pvt": ("PVT", "hierarchical"),
    "pvt_v2": ("PVT v2", "hierarchical"),
    "mvit": ("MViT", "hierarchical"),
    "levit": ("LeViT", "hierarchical, with convolutions"),
    "cvt": ("CvT", "hierarchical, with convolutions"),
    "dinat": ("DiNAT", "hierarchical"),
    "nat": ("NAT", "hierarchical"),
    "segformer": ("SegFormer", "hierarchical"),
    "poolformer": ("PoolFormer", "hierarchical, without attention"),
    "swiftformer": ("SwiftFormer", "hierarchical, with convolutions"),
    "efficientformer": ("EfficientFormer", "hierarchical, with convolutions"),
    "mobilevit": ("MobileViT", "a convolutional network with attention"),
    "mobilevitv2": ("MobileViT V2", "a convolutional network with attention"),
    "van": ("VAN", "a convolutional network"),
    "convnext": ("ConvNeXt", "a convolutional network"),
    "convnextv2": ("ConvNeXt V2", "a convolutional network"),
    "dinov3_convnext": ("DINOv3's ConvNeXt", "a convolutional network"),
    "resnet": ("ResNet", "a convolutional network"),
    "regnet": ("RegNet", "a convolutional network"),
    "bit": ("BiT", "a convolutional network"),
    "efficientnet": ("EfficientNet", "a convolutional network"),
    "mobilenet_v1": ("MobileNet V1", "a convolutional network"),
    "mobilenet_v2": ("MobileNet V2", "a convolutional network"),
    "vjepa2": ("V-JEPA 2", "a video model"),
    "videomae": ("VideoMAE", "a video model"),
    "timesformer": ("TimeSformer", "a video model"),
    "vivit": ("ViViT", "a video model"),
    "prithvi": ("Prithvi", "a model of time series of satellite images"),
    "sam": ("SAM", "a segmentation model with windowed attention"),
    "sam2": ("SAM 2", "a segmentation model, hierarchical"),
    "sam_hq": ("SAM-HQ", "a segmentation model with windowed attention"),
    "sam_vision_model": ("SAM's encoder", "windowed attention"),
    "vitdet": ("ViTDet", "windowed attention"),
    "yolos": ("YOLOS", "a detection model"),
    "dpt": ("DPT", "a model of depth or segmentation"),
    "depth_anything": ("Depth Anything", "a model of depth"),
    "detr": ("DETR", "a detection model"),
    "owlvit": ("OWL-ViT", "a detection model"),
    "owlv2": ("OWLv2", "a detection model"),
    "vitpose": ("ViTPose", "a model of poses"),
    "vitpose_backbone": ("ViTPose's backbone", "a model of poses"),
    "vitmatte": ("ViTMatte", "a matting model"),
    "radio": ("C-RADIO", "cropped positions, an input conditioner and several class tokens"),
    "mlcd": ("MLCD", "a CLIP tower with rotary positions"),
    "mlcd_vision_model": ("MLCD", "a CLIP tower with rotary positions"),
    "intern_vit_6b": ("InternViT-6B", "RMSNorm of queries and keys"),
    "internvl_vision": ("InternViT", "inside InternVL"),
    "sapiens2": ("Sapiens 2", "grouped-query attention"),
    "clip_text_model": ("CLIP's text tower", "without images"),
    "siglip_text_model": ("SigLIP's text tower", "without images"),
    "clipseg": ("CLIPSeg", "a segmentation model"),
    "blip": ("BLIP", "a language model with images"),
    "vision-encoder-decoder": ("an encoder-decoder", "with a language model"),
    "mlp_mixer": ("MLP-Mixer", "without attention"),
}
# Entry points of timm, and what they are.
TIMM = (
    (
        r".*(swin|pvt|hiera|mvit|levit|cvt|twins|davit|nest_|focal|poolformer|maxvit|coatnet|gcvit)",
        "hierarchical",
    ),
    (r"samvit_", "windowed attention"),
    (r".*(net|vgg|darknet|inception|xception|conv)", "a convolutional network"),
)
# Names of tensors, and what they are of.
NAMES = (
    (r"(.*\.)?layers\.\d+\.blocks\.\d+\.(attn|attention)\.|swin(v2)?\.", "Swin (hierarchical)"),
    (r"(.*\.)?encoder\.layers\.\d+\.blocks\.\d+\.", "Swin (hierarchical)"),
    (r"(.*\.)?stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw)", "ConvNeXt (convolutions)"),
    (r"(.*\.)?blocks\.\d+\.attn\.rel_pos_[hw]|(image|vision)_encoder\..*rel_pos_[hw]", "SAM or ViTDet (windowed)"),
    (r"(.*/)?(MixerBlock_\d+|pre_head_layer_norm)/", "an MLP-Mixer"),
    (r"(.*\.)?lora_[AB]\.|base_model\.model\.", "an adapter (LoRA) without its model: merge it first"),
)
# The same for names that plain ViTs may have beside theirs: looked at when no format knows the file.
NAMES_OF_THE_REST = (
    (r"(.*/)?(root_block|resnet|block\d+/unit\d+)/", "a BiT ResNet without a transformer"),
    (r"(text_model|token_embedding|text_projection|transformer\.resblocks)", "CLIP's or SigLIP's text tower"),
    (r"(visual\.|vision_model\.|(params/)?txt/)", "a CLIP or SigLIP tower of another kind"),
    (r"(.*\.)?(layer1\.0\.conv1|(resnet|bit)\.embedder|conv1\.weight|features\.0\.)", "a convolutional network"),
    (r"(bert|roberta|model\.embed_tokens|transformer\.wte)\b", "a language model"),
)


def refuse(file: TensorFile, sidecars: dict[str, dict]) -> None:
    """Raise for a model type or a patch kernel that is known to be something else.

    Raises:
        HFViTError: what it is, and why it cannot be read.
    """
    stored = sidecars.get("config.json") or {}
    model_type = stored.get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        name, kind = MODEL_TYPES[model_type]
        raise HFViTError(f"{file.path}: this is {name} ({kind}), not a plain ViT")
    architecture = entry_point_of(stored)
    if architecture is not None and not re.match(PLAIN, architecture):
        kind = next((f" ({kind})" for pattern, kind in TIMM if re.match(pattern, architecture)), "")
        raise HFViTError(f"{file.path}: this is timm's {architecture}{kind}, not a plain ViT")
    for name, size in file.shapes.items():
        if len(size) == 5 and re.search(r"patch|conv1|proj", name):
            raise HFViTError(
                f"{file.path}: this is a video or volume model ('{name}' is a kernel of 5 dimensions), not a plain ViT"
            )
    for pattern, what in NAMES:
        match = next((name for name in file if re.match(pattern, name)), None)
        if match:
            raise HFViTError(f"{file.path}: this is {what}, not a plain ViT ('{match}')")


def refuse_by_names(file: TensorFile) -> None:
    """Raise for names of another architecture, once no format knows them.

    Raises:
        HFViTError: what it is.
    """
    for pattern, what in NAMES_OF_THE_REST:
        match = next((name for name in file if re.match(pattern, name)), None)
        if match:
            raise HFViTError(f"{file.path}: this is {what}, not a ViT that hf_vit can load ('{match}')")
