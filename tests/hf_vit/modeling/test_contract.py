"""The contract with the ecosystem: pipelines, precision, export, backends, adapters, sharding plans.

pytest tests/hf_vit/modeling/test_contract.py
"""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, initialization, pipeline
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTModel


TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
HYBRID = {"resnet_depths": (1, 1), "resnet_width_factor": 0.5, "patch_size": 1}


def build(**fields):
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "owl"}
    model = HFViTForImageClassification(HFViTConfig(**(TINY | fields), id2label=names)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


def test_pipelines(folder):
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    answers = pipeline("image-classification", model=str(folder), image_processor=str(folder))(image)
    model, processor = HFViTForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    logits = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert answers[0]["label"] == model.config.id2label[int(logits.argmax())]
    assert answers[0]["score"] == pytest.approx(float(logits.max()), abs=1e-5)
    features = pipeline("image-feature-extraction", model=str(folder), image_processor=str(folder))(image)
    assert torch.tensor(features).shape == (1, 17, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_agrees(folder, dtype):
    model, exact = HFViTForImageClassification.from_pretrained(folder, dtype=dtype).eval(), build()
    x = torch.randn(2, 3, 32, 32)
    logits = model(x).logits  # float32 pixels are taken to the weights' dtype
    assert logits.dtype == dtype and model.get_parameter("vit.embeddings.cls_token").dtype == dtype
    assert (logits.float() - exact(x).logits).abs().max() < 0.1 * exact(x).logits.abs().max()


def test_device_map(folder):
    model = HFViTForImageClassification.from_pretrained(folder, device_map="cpu", image_size=48)
    assert model.config.image_size == 48 and model(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)


@pytest.mark.parametrize("fields", [{}, HYBRID, {"pooling": "map"}], ids=["vit", "hybrid", "map"])
def test_export_with_dynamic_batch(fields):
    model = build(**fields)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(2, 3, 32, 32),)
    program = torch.export.export(model, example, dynamic_shapes={"pixel_values": {0: batch}})
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(x).logits, model(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # compiles
def test_flex_attention_equals_eager():
    model = build()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_registered_attention_function_is_used():
    from transformers import AttentionInterface

    calls = []

    def counting(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        calls.append(type(module).__name__)
        x = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return x.transpose(1, 2), None

    AttentionInterface.register("counting", counting)
    model = build()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x, output_attentions=True)
    model.set_attn_implementation("counting")
    out = model(x, output_attentions=True)
    assert calls == ["HFViTAttention"] * 2
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.attentions[1], expected.attentions[1], atol=1e-5, rtol=1e-5)


def test_peft_lora_on_queries_and_values(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA adapters are those of peft: pip install peft")
    model = build()
    expected = model(x := torch.randn(2, 3, 32, 32)).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    )
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "lora_" in name]) == 2 * 2 * 2  # layers x (q, v) x (A, B)
    torch.testing.assert_close(adapted(pixel_values=x).logits, expected)
    adapted(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    changed = adapted.eval()(pixel_values=x).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(again(pixel_values=x).logits, changed)
    assert not torch.allclose(changed, expected)


TENSOR_PARALLEL = """
import sys
import torch
from hf_vit import HFViTForImageClassification
model = HFViTForImageClassification.from_pretrained(sys.argv[1], tp_plan="auto").eval()
x, expected = torch.load(sys.argv[2], weights_only=True)
weight = model.vit.layers[0].mlp.fc1.weight
local = weight.to_local() if isinstance(weight, torch.distributed.tensor.DTensor) else weight
assert local.shape == (24, 32), local.shape
torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)
print("agrees")
"""


@pytest.mark.slow
def test_tensor_parallel_plan_on_two_processes(folder, tmp_path_factory):
    model, x = HFViTForImageClassification.from_pretrained(folder).eval(), torch.randn(2, 3, 32, 32)
    aside = tmp_path_factory.mktemp("tp")
    torch.save([x, model(x).logits.detach()], aside / "io.pt")
    (aside / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, str(aside / "run.py"), str(folder), str(aside / "io.pt")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2


def test_initial_weights_are_not_drawn_when_a_checkpoint_replaces_them(folder, monkeypatch):
    drawn = []
    for name in ("xavier_uniform_", "trunc_normal_", "normal_"):
        monkeypatch.setattr(initialization, name, lambda tensor, *_, **__: drawn.append(tensor.shape))
    HFViTModel.from_pretrained(folder)
    assert not drawn
