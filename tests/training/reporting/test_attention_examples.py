"""Images of what a model looks at, drawn at the end of training and shown on its card.

python -m pytest tests/training/reporting/test_attention_examples.py
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from hf_vit.interpretability import plots
from training.config.arguments import TrainArguments
from training.data.dataset import open_dataset
from training.data.transforms import EvalTransform
from training.engine.trainer import Trainer
from training.reporting import attention_examples


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {
        "image_size": (16, 24), "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "num_labels": 2,
    }  # fmt: skip
    model = HFViTForImageClassification(HFViTConfig(**(sizes | changes)))
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture
def images(tmp_path):
    """Two classes of images of different proportions; the first of class `a` cannot be read."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "in" / split / label).mkdir(parents=True)
            for number, (height, width) in enumerate([(40, 20), (30, 90), (400, 700)]):
                pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "in" / split / label / f"{number}.png")
    (tmp_path / "in" / "test" / "a" / "0.png").write_text("not an image")
    return tmp_path / "in"


def trainer_of(images, folder, model=None, **arguments):
    view = EvalTransform((16, 24))
    train, test = (open_dataset(str(images), split=split).with_transform(view, 0) for split in ("train", "test"))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no"} | arguments
    return Trainer(
        model or tiny(), TrainArguments(output_dir=str(folder), **settings), train, test, image_processor=processor
    )


def test_the_card_shows_images_only_when_asked(images, tmp_path):
    for count, folder in ((0, tmp_path / "none"), (3, tmp_path / "three")):
        trainer = trainer_of(images, folder, card_examples=count, ema_decay=0.9)
        trainer.train()
        trainer.create_model_card()
        facts, card = json.loads((folder / "facts.json").read_text()), (folder / "README.md").read_text()
        shown = attention_examples.EXAMPLES_NAME
        assert (shown in facts["figures"]) == (f"]({shown})" in card) == (folder / shown).is_file() == bool(count)
    assert "position_embedding_similarity.png" in facts["figures"]
    assert "The first images of each class in split test, 3 in all, not picked by hand" in card
    with Image.open(tmp_path / "three" / shown) as figure:
        assert len(np.unique(np.asarray(figure.convert("L")))) > 100


def test_examples_are_the_first_of_each_class(images, tmp_path, monkeypatch):
    seen = {}

    def keep(columns, titles, names):
        seen.update(columns=columns, titles=titles, names=names)
        return figure(columns, titles, names)

    figure = plots.draw_examples
    monkeypatch.setattr(plots, "draw_examples", keep)
    trainer = trainer_of(images, tmp_path / "out", card_examples=50)
    trainer.output_dir.mkdir()
    facts = {}
    attention_examples.add(
        facts, trainer.output_dir, 50, trainer.model, trainer.eval_dataset, trainer.normalize, trainer.image_processor
    )
    assert facts["figures"] == ["attention_examples.png"]
    assert seen["names"] == ["image", "rollout", "relevance"]
    assert [title[0] for title in seen["titles"]] == list("babab")  # the first `a` is unreadable
    shapes = [[image.shape[:2] for image in column] for column in seen["columns"]]
    narrow, wide, large = (320, 160), (107, 320), (183, 320)  # the proportions of the originals
    assert shapes == [[narrow] * 3, [wide] * 3, [wide] * 3, [large] * 3, [large] * 3]
    told = trainer.model(trainer.normalize(trainer.eval_dataset[4]["pixel_values"][None])).logits.argmax().item()
    assert seen["titles"][2] == ("b" if told == 1 else "b, taken for a")


def test_labels_in_any_order_are_spread():
    order = list(attention_examples._spread(np.array([2, 2, 0, 2, 1, 0])))
    assert order == [2, 4, 0, 5, 1, 3]


def test_what_cannot_be_drawn_is_refused_before_training(images, tmp_path):
    class Blank(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"pixel_values": torch.zeros(3, 16, 24), "labels": 0}

    arguments = TrainArguments(output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, card_examples=1)
    with pytest.raises(HFViTError, match="--card_examples shows original images"):
        Trainer(tiny(), arguments, Blank(), Blank(), ViTImageProcessorPil())
    with pytest.raises(HFViTError, match="no transformer blocks"):
        trainer_of(images, tmp_path / "out", tiny(num_hidden_layers=0), card_examples=1)
    with pytest.raises(HFViTError, match="--card_examples -1: give 0 or more"):
        TrainArguments(card_examples=-1)
    assert not (tmp_path / "out").exists()
