"""A Hub model whose image processor is not in the cache: asked for, and never assumed because the Hub is silent.

pytest tests/hf_vit/checkpoints/test_download.py
"""

from unittest.mock import Mock

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification
from hf_vit.checkpoints import read_checkpoint
from hf_vit.checkpoints.download import hub_file
from training.evaluation.classifier import load_processor


ABSENT = RemoteEntryNotFoundError("404", response=Mock(status_code=404))
UNREACHABLE = LocalEntryNotFoundError("no network, and not in the cache")


@pytest.fixture
def weights_alone(tmp_path, monkeypatch):
    """A snapshot as another program left it in the cache: without a preprocessor_config.json."""
    config = HFViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         patch_size=8, image_size=16, num_labels=3)  # fmt: skip
    folder = tmp_path / "snapshot"
    HFViTForImageClassification(config).save_pretrained(folder)
    monkeypatch.setattr("hf_vit.checkpoints.download.snapshot_download", lambda *args, **kwargs: str(folder))
    monkeypatch.setattr("hf_vit.checkpoints.download.FIRST_WAIT", 0.0)
    return folder


def hub_answers(monkeypatch, answer):
    monkeypatch.setattr("hf_vit.checkpoints.download.hf_hub_download", Mock(side_effect=answer))


def test_a_processor_that_is_not_in_the_cache_is_asked_for(weights_alone, monkeypatch, tmp_path):
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(
        tmp_path / "late"
    )

    def download(repo_id, name, revision):
        assert (repo_id, revision) == ("someone/some-vit", weights_alone.name)  # of the same commit as the weights
        if name != "preprocessor_config.json":
            raise ABSENT
        return str(tmp_path / "late" / name)

    monkeypatch.setattr("hf_vit.checkpoints.download.hf_hub_download", download)
    assert read_checkpoint("someone/some-vit").image_processing.image_mean == (0.1, 0.1, 0.1)


def test_without_a_processor_on_the_hub_the_usual_numbers_serve(weights_alone, monkeypatch):
    hub_answers(monkeypatch, ABSENT)
    assert read_checkpoint("someone/some-vit").image_processing.image_mean == (0.5, 0.5, 0.5)
    model = HFViTForImageClassification.from_pretrained(weights_alone)
    assert tuple(load_processor("someone/some-vit", model.config).image_mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("failure", [UNREACHABLE, OfflineModeIsEnabled("offline"), ConnectionError("cut")])
def test_a_hub_that_cannot_be_asked_is_an_error(weights_alone, monkeypatch, failure):
    hub_answers(monkeypatch, failure)
    with pytest.raises(HFViTError, match=r"whether it has a preprocessor_config\.json cannot be asked"):
        read_checkpoint("someone/some-vit")
    config = HFViTConfig(image_size=16)
    with pytest.raises(HFViTError, match=r"whether it has a processor_config\.json cannot be asked"):
        load_processor("someone/some-vit", config)


def test_what_the_hub_said_before_serves_without_a_network(monkeypatch, tmp_path):
    repository = tmp_path / "models--someone--some-vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / ".no_exist" / "c0ffee").mkdir(parents=True)
    (repository / ".no_exist" / "c0ffee" / "processor_config.json").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_answers(monkeypatch, UNREACHABLE)
    assert hub_file("someone/some-vit", "processor_config.json") is None
    with pytest.raises(HFViTError, match="HF_HUB_OFFLINE"):
        hub_file("someone/some-vit", "preprocessor_config.json")


def test_a_cut_connection_is_tried_again(monkeypatch):
    passing = LocalEntryNotFoundError("not in the cache")
    passing.__cause__ = ConnectionError("cut")
    monkeypatch.setattr("hf_vit.checkpoints.download.FIRST_WAIT", 0.0)
    hub_answers(monkeypatch, [passing, ConnectionError("cut"), "/somewhere/config.json"])
    assert str(hub_file("someone/some-vit", "config.json")) == "/somewhere/config.json"
