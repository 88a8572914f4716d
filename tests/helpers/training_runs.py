"""A data set, a model and arguments for runs of the Trainer that take milliseconds."""

import json
import math

import torch
from torch.utils.data import Dataset

from hf_vit import HFViTConfig, HFViTForImageClassification
from training.config.arguments import TrainArguments


class Images(Dataset):
    """Random uint8 images whose class is their brightest third."""

    def __init__(self, size, seed=0, poison=None):
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 3, (size,), generator=random)
        self.pixels = torch.randint(0, 100, (size, 3, 8, 8), generator=random, dtype=torch.uint8)
        for index, label in enumerate(self.labels):
            self.pixels[index, label] += 100
        self.poison = poison

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        pixels = self.pixels[index]
        if index == self.poison:
            pixels = torch.full(pixels.shape, math.nan)
        elif self.poison is not None:
            pixels = pixels.float() / 127.5 - 1
        return {"pixel_values": pixels, "labels": int(self.labels[index])}


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 8, "patch_size": 4, "num_labels": 3}  # fmt: skip
    return HFViTForImageClassification(HFViTConfig(**config | fields))


def arguments(folder, **values):
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 5, "learning_rate": 1e-2,
        "warmup_steps": 0, "logging_steps": 2, "save_steps": 3, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainArguments(output_dir=str(folder), **defaults | values)


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
