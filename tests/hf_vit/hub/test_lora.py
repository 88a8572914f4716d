"""LoRA by peft: a few steps, then the adapter and the merged model, saved, loaded again, and on a local Hub.

python -m pytest tests/hf_vit/hub/test_lora.py
"""

import pytest
import torch
from safetensors.torch import load_file

from hf_vit import HFViTForImageClassification
from tests.helpers.compare import same_outputs
from tests.helpers.hub_process import BLOCK_HF_VIT, WRITER, run
from tests.helpers.hub_server import HubServer


peft = pytest.importorskip("peft", reason="LoRA adapters are those of peft: pip install peft")
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture(scope="module")
def hub():
    with HubServer(users={WRITER: "alice"}) as server:
        yield server


@pytest.fixture(scope="module")
def trained(hub, folder, tmp_path_factory):
    """What a process gives that trains an adapter, merges it, and pushes both with the libraries' own methods."""
    home = tmp_path_factory.mktemp("home")
    code = """
    import json, sys
    import peft, torch
    from transformers import AutoImageProcessor
    from hf_vit import HFViTForImageClassification
    folder, home = sys.argv[1:]
    torch.manual_seed(0)
    model = HFViTForImageClassification.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    losses = []
    for _ in range(5):
        loss = adapted(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapted.eval()
    logits = adapted(pixel_values=pixels).logits
    adapted.save_pretrained(home + "/adapter")
    adapted.push_to_hub("alice/adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(home + "/merged")
    AutoImageProcessor.from_pretrained(folder).save_pretrained(home + "/merged")
    merged.push_to_hub("alice/merged-by-transformers")
    print(json.dumps({"losses": losses, "logits": logits.tolist()}))
    """
    return home, run(hub, home, code, folder, home, token=WRITER)


def test_the_adapter_alone_is_saved_and_loads_onto_the_base(folder, trained):
    home, result = trained
    assert result["losses"][-1] < result["losses"][0]
    names = set(load_file(home / "adapter" / "adapter_model.safetensors"))
    assert any("lora_A" in name for name in names) and not any("mlp" in name for name in names)
    base = HFViTForImageClassification.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, home / "adapter").eval()
    with torch.no_grad():
        assert same_outputs(again(pixel_values=PIXELS).logits, result["logits"])


def test_the_merged_model_is_an_ordinary_one(folder, trained):
    home, result = trained
    merged = HFViTForImageClassification.from_pretrained(home / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(PIXELS).logits, torch.tensor(result["logits"]), rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(HFViTForImageClassification.from_pretrained(folder).state_dict())


def test_both_load_from_the_hub(hub, folder, trained, tmp_path):
    home, result = trained
    sent = set(hub.repositories["alice/adapter"].files("main")[1])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= sent and "model.safetensors" not in sent
    pushed = run(
        hub, tmp_path / "push",
        """
        import json, sys
        from hf_vit.cli.main import main
        print(json.dumps(main(["push", sys.argv[1], "alice/merged"])))
        """,
        home / "merged", token=WRITER,
    )  # fmt: skip
    assert not pushed
    code = (
        BLOCK_HF_VIT
        + """
import json, sys
import peft, torch
from transformers import AutoModelForImageClassification
pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
models = {name: AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
          for name in ("alice/merged", "alice/merged-by-transformers", sys.argv[1])}
models["adapter"] = peft.PeftModel.from_pretrained(models.pop(sys.argv[1]), "alice/adapter")
with torch.no_grad():
    print(json.dumps({name: model.eval()(pixel_values=pixels).logits.tolist() for name, model in models.items()}))
"""
    )
    found = run(hub, tmp_path / "load", code, folder)
    assert list(found) == ["alice/merged", "alice/merged-by-transformers", "adapter"]
    for logits in found.values():
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(result["logits"]), rtol=1e-4, atol=1e-5)
