"""config.json of many families with values changed, from a seed, through `load_checkpoint`: what becomes of each.

    python -m tests.fuzz.checkpoint_configs [--count 2700] [--seed 0]

A folder may load with exactly its weights (values that decide no weight may differ), or be refused by one `HFViTError`
line. It must never end in another exception, nor take longer than `SECONDS` of processor time.
"""

import copy
import json
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification
from hf_vit.checkpoints import load_checkpoint, save_checkpoint
from tests.fuzz.command import report
from tests.fuzz.time_limit import Hang, start_clock, stop_clock


SECONDS = 20
GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens_family"
FAMILIES = ("dinov2_classifier", "dinov3", "clip_classifier", "siglip_classifier", "beit_classifier", "vit_mae")
TIMM = ("timm_eva02_base", "timm_beit", "timm_clip_quickgelu")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 10**6, 10**12, 0.0, -0.5, 1e-300, float("nan"), float("inf"), 1e308),
    *("", "x", "gelu", "nosuch", "1e9", "é", [], [1], [1, 2], [0, 0], [-1, 5], [[1]], {}, {"a": 1}, {"0": "a"}),
)


def mutate(rng: np.random.Generator, config: dict) -> str:
    """Change one to three entries in place; what was done, in words."""
    done = []
    for _ in range(int(rng.integers(1, 4))):
        where = config
        nested = [key for key, value in config.items() if isinstance(value, dict) and value and key != "text_config"]
        if nested and rng.random() < 0.6:
            where = config[str(rng.choice(nested))]
        key = str(rng.choice(sorted(map(str, where))))
        if rng.random() < 0.15:
            where.pop(key, None)
            done.append(f"without {key}")
        else:
            where[key] = copy.deepcopy(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))])
            done.append(f"{key}={where[key]!r:.30}")
        if not config:
            break
    return ", ".join(done)


def outcome(folder: Path, original: dict[str, torch.Tensor]) -> str:
    start_clock(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_checkpoint(folder).state_dict()
    except HFViTError as error:
        return "refused" if str(error).strip() else "empty message"
    except Hang:
        return "hang"
    except Exception as error:
        return type(error).__name__
    finally:
        stop_clock()
    shared = [name for name in loaded if name in original]
    same = all(
        torch.equal(loaded[name], original[name]) for name in shared if loaded[name].shape == original[name].shape
    )
    return "loads" if same and shared else "silently wrong"


def run(count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Outcomes of `count` folders, and a line for each that must not be."""
    outcomes: Counter = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        torch.manual_seed(0)
        own = HFViTForImageClassification(
            HFViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4,
                        image_size=8, num_labels=3, layer_norm_eps=1e-6)
        )  # fmt: skip
        own.save_pretrained(root / "own")
        save_checkpoint(own, root / "vit", "transformers")
        for family in (*FAMILIES, *TIMM):
            shutil.copytree(GOLDENS / family, root / family)
        folders = [root / "own", root / "vit", *(root / family for family in (*FAMILIES, *TIMM))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            originals = {folder: load_checkpoint(folder).state_dict() for folder in folders}
        texts = {folder: (folder / "config.json").read_text() for folder in folders}
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            folder = folders[index % len(folders)]
            config = json.loads(texts[folder])
            done = mutate(rng, config)
            (folder / "config.json").write_text(json.dumps(config))
            result = outcome(folder, originals[folder])
            outcomes[result] += 1
            if result not in ("loads", "refused"):
                bad.append(f"seed {seed}, folder {index}: {folder.name}, {done}: {result}")
            (folder / "config.json").write_text(texts[folder])
    return outcomes, bad


if __name__ == "__main__":
    report(__doc__, run, count=2700, seed=0)
