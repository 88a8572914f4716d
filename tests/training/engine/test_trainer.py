"""The loop: exact sums, accumulation, callbacks, refusals; resuming is in test_trainer_state.py.

pytest tests/training/engine/test_trainer.py
"""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_vit import HFViTForImageClassification
from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, history, tiny
from training.data.dataset import open_dataset
from training.data.samplers import TrainSampler
from training.data.transforms import EvalTransform
from training.engine import preemption
from training.engine.trainer import Trainer


def test_the_first_updates_are_those_of_a_plain_pytorch_loop(tmp_path):
    data, model, plain = Images(40), tiny(), tiny()
    Trainer(model, arguments(tmp_path / "out", max_steps=3, optim="sgd", lr_scheduler_type="constant"), data).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=0.9)
    for keys in TrainSampler(40, 8, seed=42, position=0, stop=24, rank=0, world_size=1):
        items = [data[index] for _, index in keys]
        pixels = (torch.stack([i["pixel_values"] for i in items]).float() / 255 - 0.5) / 0.5
        plain(pixels, labels=torch.tensor([i["labels"] for i in items])).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)


def test_without_clipping_the_step_has_the_gradients_length(tmp_path):
    data, model, plain = Images(8), tiny(), tiny()
    args = arguments(tmp_path / "out", max_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)
    Trainer(model, args, data).train()
    plain((data.pixels.float() / 255 - 0.5) / 0.5, labels=data.labels).loss.backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]) > 1
    moved = plain.classifier.bias.detach() - 1e-2 * plain.classifier.bias.grad
    torch.testing.assert_close(model.classifier.bias.detach(), moved, atol=1e-6, rtol=1e-5)


def test_epochs_are_a_length_and_are_rounded_up(tmp_path):
    args = arguments(tmp_path / "out", max_steps=-1, num_train_epochs=1.9, warmup_steps="1 epoch", logging_steps=1,
                     lr_scheduler_type="constant")  # fmt: skip
    Trainer(tiny(), args, Images(40)).train()
    speed = [json.loads(line) for line in (tmp_path / "out/speed.jsonl").read_text().splitlines()]
    assert speed[-1]["step"] == 10 and speed[-1]["eta_seconds"] == 0 < speed[0]["eta_seconds"]
    rates = [line["learning_rate"] for line in history(tmp_path / "out")]
    assert rates == pytest.approx([0.0, 2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])  # 9.5 steps, 5 of them


def test_it_learns_and_the_logged_loss_is_the_mean_over_images(tmp_path):
    data = Images(40)
    trainer = Trainer(
        tiny(), arguments(tmp_path / "out", max_steps=30, logging_steps=1, learning_rate=0.0), data, data
    )
    trainer.train()
    losses = [line["loss"] for line in history(tmp_path / "out") if "loss" in line]
    assert np.mean(losses[:5]) == pytest.approx(
        trainer.evaluate()["eval_loss"], abs=1e-6
    )  # 5 batches of 8 are an epoch
    learned = Trainer(tiny(), arguments(tmp_path / "more", max_steps=40), data, data)
    learned.train()
    assert learned.evaluate()["eval_accuracy"] == 1.0


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_accumulation_equals_the_large_batch(tmp_path, optim):
    data, found = Images(40), []
    for batch, passes in ((12, 1), (3, 4)):
        model = tiny()
        args = arguments(tmp_path / str(passes), per_device_train_batch_size=batch, gradient_accumulation_steps=passes,
                         optim=optim, logging_steps=1)  # fmt: skip
        Trainer(model, args, data).train()
        found.append((history(tmp_path / str(passes)), model.state_dict()))
    for large, small in zip(*(lines for lines, _ in found)):
        assert large == pytest.approx(small, rel=2e-6, abs=1e-6)
    for name, weight in found[0][1].items():
        if "k_proj.bias" in name:
            continue  # its gradient is zero but for rounding, which AdamW blows up
        torch.testing.assert_close(weight, found[1][1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("batch", [1, 7, 23, 50])
def test_evaluation_counts_every_image_once(tmp_path, batch):
    data, model = Images(23), tiny()
    torch.nn.init.normal_(model.classifier.weight)
    args = arguments(tmp_path / "out", per_device_eval_batch_size=batch, label_smoothing_factor=0.2)
    trainer = Trainer(model, args, eval_dataset=data, compute_metrics=lambda p: {"n": len(p.label_ids)})
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = model.eval()((data.pixels.float() / 255 - 0.5) / 0.5).logits
    assert metrics["eval_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, data.labels)), abs=1e-6
    )
    assert metrics["eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == data.labels).float().mean()))
    assert metrics["eval_n"] == 23 and "eval_top5_accuracy" not in metrics
    predicted = trainer.predict(data)
    assert predicted.metrics["test_n"] == 23 and predicted.metrics["test_loss"] == metrics["eval_loss"]
    np.testing.assert_allclose(predicted.predictions, logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(predicted.label_ids, data.labels.numpy())
    assert not (tmp_path / "out").exists()


def test_mixing_smoothing_and_soft_labels_leave_the_evaluation_alone(tmp_path):
    args = arguments(tmp_path / "out", mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing_factor=0.1, loss="sigmoid")
    trainer = Trainer(tiny(), args, Images(40), Images(11))
    trainer.train()
    with torch.no_grad():
        logits = trainer.model.eval()((trainer.eval_dataset.dataset.pixels.float() / 255 - 0.5) / 0.5).logits
    truth = torch.nn.functional.one_hot(trainer.eval_dataset.dataset.labels, 3).float()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(-1).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(plain), abs=1e-6)
    assert trainer.model.config.problem_type is None


class Recorder(TrainerCallback):
    """Notes every event."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            object.__getattribute__(self, "events").append(name)
        return object.__getattribute__(self, name)


def test_events_come_in_transformers_order(tmp_path):
    recorder = Recorder()
    args = arguments(tmp_path / "out", max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=4,
                     logging_steps=1, save_steps=2, eval_steps=2)  # fmt: skip
    Trainer(tiny(), args, Images(8), Images(5), callbacks=[recorder]).train()
    step = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert recorder.events == [
        "on_init_end", "on_train_begin", "on_epoch_begin", *step, "on_epoch_end", "on_log", "on_epoch_begin",
        *step, "on_epoch_end", "on_log", "on_prediction_step", "on_log", "on_evaluate", "on_save", "on_train_end",
    ]  # fmt: skip


def test_a_callback_that_logs_and_stops(tmp_path):
    class Stop(TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            seen.append((state.global_step, logs["loss"], model.config.model_type))

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4
            return control

    seen = []
    trainer = Trainer(tiny(), arguments(tmp_path / "out", save_strategy="no"), Images(40), callbacks=[Stop])
    assert trainer.train().global_step == 4
    assert [step for step, _, _ in seen] == [2, 4] and {kind for *_, kind in seen} == {"hf_vit"}


def test_early_stopping_and_the_best_weights(tmp_path):
    class Worse(TrainerCallback):
        """Spoils the head after step 4, so that the best evaluation is the one at 4."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step >= 4:
                torch.nn.init.normal_(model.classifier.weight, std=50)

    args = arguments(tmp_path / "out", max_steps=40, eval_steps=2, load_best_model_at_end=True, save_total_limit=1,
                     metric_for_best_model="loss", learning_rate=1e-3)  # fmt: skip
    trainer = Trainer(tiny(), args, Images(40), Images(20), callbacks=[EarlyStoppingCallback(2), Worse()])
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.state.best_global_step == 4
    best = next(line["eval_loss"] for line in history(tmp_path / "out") if line["step"] == 4 and "eval_loss" in line)
    lines = len(history(tmp_path / "out"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-7)
    assert len(history(tmp_path / "out")) == lines
    assert {p.name for p in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_the_most_accurate_weights_are_kept_and_no_others(tmp_path):
    class Scores(TrainerCallback):
        """Puts an accuracy in the place of the one found."""

        def on_step_end(self, args, state, control, **kwargs):
            trainer.compute_metrics = lambda outputs: {"accuracy": accuracies[state.global_step]}

    accuracies = {2: 0.2, 4: 0.6, 6: 0.4}
    args = arguments(tmp_path / "out", eval_steps=2, save_strategy="best", metric_for_best_model="eval_accuracy")
    trainer = Trainer(tiny(), args, Images(40), Images(20), callbacks=[Scores])
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 4)
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4"}  # step 6 is no better


def test_a_callback_that_asks_for_a_checkpoint_gets_one(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 4
            return control

    Trainer(tiny(), arguments(tmp_path / "out", save_strategy="no"), Images(40), callbacks=[Save]).train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_callback_can_end_an_epoch(tmp_path):
    class Skip(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2
            return control

    trainer = Trainer(tiny(), arguments(tmp_path / "out", max_steps=3), Images(40), callbacks=[Skip])
    trainer.train()
    assert trainer.position == 40 + 8


def test_a_loss_that_is_not_finite_names_update_and_files_and_keeps_the_last_good_checkpoint(tmp_path):
    order = list(TrainSampler(40, 8, seed=42, position=0, stop=80, rank=0, world_size=1))
    poison = next(index for _, index in order[4])
    with pytest.raises(HFViTError) as error:
        args = arguments(tmp_path / "out", max_steps=9, logging_steps=50)  # looked at before the checkpoint at 6
        Trainer(tiny(), args, Images(40, poison=poison)).train()
    message = str(error.value)
    assert "not finite at step 5 " in message and f"item {poison}" in message and "checkpoint-3" in message
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    model = tiny()

    class Overflow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                model.classifier.bias.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(HFViTError, match="not finite at step 2 "):
        Trainer(
            model, arguments(tmp_path / "out", max_steps=2, save_steps=0), Images(40), callbacks=[Overflow]
        ).train()


def test_a_pass_without_a_readable_image_counts_nothing(tmp_path):
    found = []
    for name, broken in (("whole", ()), ("broken", (0, 1))):
        for index in range(6):
            path = tmp_path / name / "train" / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * index,) * 3).save(path)
            if index in broken:
                path.write_bytes(b"no image")
        data = open_dataset(str(tmp_path / name), split="train").with_transform(EvalTransform((8, 8)), 0)
        args = arguments(tmp_path / f"{name}-out", max_steps=1, per_device_train_batch_size=1,
                         gradient_accumulation_steps=6, logging_steps=1)  # fmt: skip
        trainer = Trainer(tiny(num_labels=2), args, data)
        trainer.train()
        found.append(history(tmp_path / f"{name}-out")[0]["accuracy"])
        assert len(trainer.unreadable) == len(broken)
    assert found == [0.5, 0.5]  # of 6 images, of 4 images


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint(tmp_path, number):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # a launcher passes on what the terminal has sent already

    before = signal.getsignal(number)
    trainer = Trainer(tiny(), arguments(tmp_path / "out"), Images(40), callbacks=[Signal])
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 2
    assert (tmp_path / "out/checkpoint-2/resume.json").is_file()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    class Twice(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            clock.append(clock[-1] + 2 * preemption.SAME_KEYPRESS)
            os.kill(os.getpid(), signal.SIGINT)

    clock = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[-1])
    trainer = Trainer(tiny(), arguments(tmp_path / "out"), Images(40), callbacks=[Twice])
    trainer.display.sign.enabled = False  # its thread reads the same clock
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 0 and not (tmp_path / "out/.lock").exists()


def test_refusals_leave_no_folder(tmp_path):
    with pytest.raises(HFViTError, match=r"batch of 8 images.*larger than the 7.*per_device_train_batch_size to 7"):
        Trainer(tiny(), arguments(tmp_path / "out"), Images(7)).train()
    with pytest.raises(HFViTError, match="--fp16 needs a GPU"):
        Trainer(tiny(), arguments(tmp_path / "out", fp16=True), Images(40))
    with pytest.raises(HFViTError, match="report_to nowhere: choose from"):
        Trainer(tiny(), arguments(tmp_path / "out", report_to=["nowhere"]), Images(40))
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("precious")
    with pytest.raises(HFViTError, match=r"not empty.*--resume_from_checkpoint true"):
        Trainer(tiny(), arguments(tmp_path / "full"), Images(40)).train()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_given_optimizer_and_schedule_are_used(tmp_path):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    Trainer(model, arguments(tmp_path / "out", logging_steps=1), Images(40), optimizers=(optimizer, schedule)).train()
    rates = [line["learning_rate"] for line in history(tmp_path / "out")]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_the_average_of_the_weights_is_what_is_evaluated_saved_and_drawn(tmp_path, monkeypatch):
    model = tiny()
    trainer = Trainer(model, arguments(tmp_path / "out", ema_decay=0.5), Images(40), Images(10))
    trainer.train()
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    scores = trainer.evaluate()
    trainer.save_model()
    saved = HFViTForImageClassification.from_pretrained(tmp_path / "out")
    assert not torch.equal(saved.classifier.weight, raw["classifier.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, raw[name])  # swapped back
    plain = Trainer(saved, arguments(tmp_path / "x"), eval_dataset=Images(10)).evaluate()
    assert plain == pytest.approx(scores, abs=1e-6)
    drawn = []
    monkeypatch.setattr(
        "training.reporting.run_figures.draw_positions",
        lambda model, path: drawn.append(model.classifier.weight.clone()),
    )
    trainer.create_model_card()
    assert torch.equal(drawn[0], saved.classifier.weight)


@pytest.mark.parametrize(
    "extra",
    [{"bf16": True}, {"activation_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
)
def test_precision_recomputation_and_compilation_train_alike(tmp_path, extra):
    found = []
    for name, values in (("plain", {}), ("other", extra)):
        Trainer(tiny(), arguments(tmp_path / name, logging_steps=1, **values), Images(40)).train()
        found.append([line["loss"] for line in history(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], abs=2e-2 if "bf16" in extra else 1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_drop_path_trains_alike_whether_compiled_or_skipping_the_work(tmp_path, backend):
    found = []
    for name, values in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": backend})):
        model = tiny(num_hidden_layers=3, drop_path_rate=0.5)
        Trainer(model, arguments(tmp_path / name, logging_steps=1, **values), Images(40)).train()
        found.append([line["loss"] for line in history(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], abs=1e-6)  # the same samples are dropped: one draw of one generator


def test_uploads_need_a_token_before_training_and_a_failing_one_does_not_stop_it(tmp_path, monkeypatch, capsys):
    from training.engine import trainer as module

    uploads = []

    def push(folder, name, private, **_):
        uploads.append((name, private, (folder / "model.safetensors").is_file()))
        raise HFViTError("no network")

    args = arguments(tmp_path / "out", push_to_hub=True, hub_model_id="me/it", hub_strategy="every_save")
    monkeypatch.setattr(module, "get_token", lambda: None)
    with pytest.raises(HFViTError, match="hf auth login"):
        Trainer(tiny(), args, Images(40)).train()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "get_token", lambda: "hf_x")
    monkeypatch.setattr(module, "push_folder", push)
    Trainer(tiny(), args, Images(40)).train()
    assert uploads == [("me/it", False, True)] * 2
    assert "not uploaded: no network" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_mixing_is_really_off_at_the_end(tmp_path, workers):
    data, soft = Images(40), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            soft.append(seen[-1])

    seen = []
    args = arguments(
        tmp_path / "out",
        max_steps=6,
        mixup_alpha=1.0,
        mixup_off_steps="50%",
        dataloader_num_workers=workers,
        save_steps=0,
    )
    trainer = Trainer(tiny(), args, data, callbacks=[Watch])
    forward = trainer.loss_module.forward

    def noting(pixel_values, labels):
        seen.append(labels.ndim == 2 and bool(((labels > 0).sum(1) > 1).any()))
        return forward(pixel_values, labels)

    trainer.loss_module.forward = noting
    trainer.train()
    assert soft == [True, True, True, False, False, False]
    with pytest.raises(HFViTError, match="off in all 6 steps"):
        Trainer(tiny(), arguments(tmp_path / "no", mixup_alpha=1.0, mixup_off_steps=6), data).train()


def test_mixing_has_one_weight_for_all_passes_of_an_update(tmp_path):
    """As big_vision: one for the whole step, however many images a device takes at once."""
    args = arguments(tmp_path / "out", max_steps=3, mixup_alpha=1.0, gradient_accumulation_steps=4,
                     per_device_train_batch_size=6, save_steps=0)  # fmt: skip
    trainer, shares = Trainer(tiny(), args, Images(48)), []
    forward = trainer.loss_module.forward

    def noting(pixel_values, labels):
        if (labels > 0.5).any():  # blank images, by which kernels are measured, have no label
            shares.append(round(float(labels[labels > 0.5].min()), 6))
        return forward(pixel_values, labels)

    trainer.loss_module.forward = noting
    trainer.train()
    shares = shares[-12:]  # before the first step, a few passes are tried
    assert [len(set(shares[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(shares)) == 3


def test_unfreezing_moves_the_lowest_layer_last_and_must_reach_it(tmp_path):
    model = tiny(num_hidden_layers=2)
    torch.nn.init.normal_(model.classifier.weight)
    before, moved = {name: p.detach().clone() for name, p in model.named_parameters()}, []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
            moved.append([part for part in parts if any(part in name for name in changed)])

    parts = ["classifier.weight", "layers.1.mlp.fc1.weight", "layers.0.mlp.fc1.weight", "cls_token"]
    args = arguments(tmp_path / "out", max_steps=4, unfreeze_every=1, save_steps=0)
    Trainer(model, args, Images(40), callbacks=[Watch]).train()
    assert moved == [parts[:1], parts[:2], parts[:3], parts]
    with pytest.raises(HFViTError, match=r"begin at step 6, after the end of training \(6\)"):
        Trainer(tiny(num_hidden_layers=2), arguments(tmp_path / "no", unfreeze_every=2), Images(40)).train()


def test_a_global_batch_sets_the_passes(tmp_path):
    args = arguments(tmp_path / "out", per_device_train_batch_size=4, global_batch_size=20)
    trainer = Trainer(tiny(), args, Images(40))
    assert trainer.args.gradient_accumulation_steps == 5 and trainer.global_batch_size == 20
    with pytest.raises(HFViTError, match=r"takes 5 passes on 1 devices, not --gradient_accumulation_steps 2"):
        Trainer(tiny(), dataclasses.replace(args, gradient_accumulation_steps=2), Images(40))
    with pytest.raises(HFViTError, match="no multiple of 8"):
        Trainer(tiny(), arguments(tmp_path / "out", global_batch_size=20), Images(40))


def test_patience_ends_a_run_that_no_longer_gains(tmp_path):
    args = arguments(tmp_path / "out", max_steps=20, eval_steps=2, patience=2, learning_rate=0.0, save_steps=0)
    trainer = Trainer(tiny(), args, Images(40), Images(20))
    trainer.train()
    assert trainer.state.global_step == 6  # the evaluation at 2 is the best, those at 4 and 6 are no better
    with pytest.raises(HFViTError, match="--patience counts evaluations"):
        arguments(tmp_path / "out", patience=2)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step >= self.step


@pytest.mark.parametrize("option", [{"train_sampling_strategy": "balanced"}, {"logit_adjustment": 1.0}])
def test_unequal_classes_are_balanced_and_resume_bit_for_bit(tmp_path, option):
    data, found = Images(40), []
    rare = (data.labels == 2).nonzero().flatten()
    data.labels[rare[3:]] = 0  # three images are left of the third class

    for name, plain in (("plain", {}), ("whole", option), ("parts", option)):
        trainer = Trainer(tiny(), arguments(tmp_path / name, **plain), data, data)
        if name == "parts":
            trainer.add_callback(StopAfter(3))
            trainer.train()
            trainer = Trainer(tiny(), arguments(tmp_path / name, **plain), data, data)
        trainer.train(resume_from_checkpoint=name == "parts")
        found.append((history(tmp_path / name), trainer.model.state_dict()))
    assert found[0][0] != found[1][0] == found[2][0]
    assert all(torch.equal(found[1][1][name], weight) for name, weight in found[2][1].items())
