"""Arguments: the resolved ones are the run again, and those that contradict each other are refused.

pytest tests/training/config/test_arguments.py
"""

import dataclasses
import math

import pytest

from hf_vit.errors import HFViTError
from training.config.arguments import GROUPS, Arguments, DataArguments, TrainArguments
from training.config.parser import parse


def test_the_resolved_config_given_back_is_the_same_run(tmp_path):
    words = "--preset vit-tiny-patch16-224 --dataset digits --warmup_steps 0.2 --eval_steps 5 --save_total_limit null"
    first = parse(words.split(), "pretrain")
    (tmp_path / "again.yaml").write_text(first.to_yaml())
    assert parse(["--config", str(tmp_path / "again.yaml")], "pretrain").as_dict() == first.as_dict()
    assert parse(["--config", str(tmp_path / "again.yaml")], "finetune").as_dict() == first.as_dict()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bf16 --fp16", "one of --bf16"),
        ("--save_total_limit 0", "give 1 or more"),
        ("--load_best_model_at_end", "needs evaluations"),
        ("--per_device_train_batch_size 0", "give 1 or more"),
        ("--optim adamv", "--optim 'adamv': choose from"),
        ("--freeze_backbone --layer_decay 0.7", "no layers on a frozen backbone"),
        ("--freeze_backbone --unfreeze_every 10", "leave out one of them"),
        ("--max_steps 10 --warmup_steps 20", "longer than the training of 10"),
        ("--warmup_steps soon", "give steps, a fraction below 1"),
        ("--layer_decay 1.5", "give a fraction above 0"),
        ("--sweep learning_rate=[0.1,0.2]", "a sweep chooses on a dev split: give --dev_fraction"),
        ("--loss masked_patches --mixup_alpha 0.2", "has no labels for --mixup_alpha"),
        ("--loss masked_patches --cutmix_alpha 1", "has no labels for --cutmix_alpha"),
        ("--logit_adjustment -1", "--logit_adjustment -1.0: give 0 or more"),
        ("--logit_adjustment 1 --loss sigmoid", "--logit_adjustment 1.0 is for --loss softmax"),
        ("--train_sampling_strategy even", "choose from random, balanced"),
        (
            "--train_sampling_strategy balanced --class_weights balanced",
            "--class_weights balanced and --train_sampling_strategy balanced would balance the classes twice",
        ),
        ("--mixup_alpha -1", "--mixup_alpha -1.0: give 0 or more"),
        ("--learning_rate nan", "--learning_rate nan: give finite numbers"),
        ("--weight_decay inf", "--weight_decay inf: give finite numbers"),
        ("--adam_beta1 1.5", "--adam_beta1 1.5: give a number from 0 up to, not including, 1"),
        ("--optim sgd --momentum -1", "--momentum -1.0: give a number from 0"),
        ("--optim muon --muon_momentum 2", "--muon_momentum 2.0: give a number from 0"),
        ("--adam_epsilon -1", "--adam_epsilon -1.0: give 0 or more"),
        ("--seed -1", "--seed -1: give 0 to 4294967295"),
        ("--learning_rate 1e-6 --lr_end 1e-5", "--lr_end 1e-05 is above --learning_rate 1e-06"),
        ("--lr_steps 30 60 90", "--lr_steps 30.0 60.0 90.0: give fractions of the run"),
        ("--max_steps 0", "--max_steps 0: give steps above 0, or -1"),
        ("--max_steps -3", "--max_steps -3: give steps above 0, or -1"),
        ("--num_train_epochs 0", "nothing to train"),
        ("--num_train_epochs nan", "--num_train_epochs nan: give finite numbers"),
        ("--crop_area 0.1 nan", "--crop_area 0.1 nan: give finite numbers"),
        (
            "--learning_rate 1e-3 --lr_end 1e-5 --lr_scheduler_type rsqrt",
            "cosine or linear, not rsqrt",
        ),
        ("--train_fraction 1.5", "--train_fraction 1.5: give a fraction above 0"),
        ("--dev_fraction 0", "--dev_fraction 0.0: give a fraction between 0 and 1"),
        ("--crop_pct 0", "--crop_pct 0.0: give a fraction of at least 0.01"),
        ("--samples_per_class -3", "--samples_per_class -3: give 1 or more"),
        ("--preset vit-tiny-patch16-224 --keep_representation", "--keep_representation is for the head"),
        (
            "--metric_for_best_model f1",
            "--metric_for_best_model f1: choose from accuracy, top5_accuracy, mean_per_class",
        ),
        (
            "--sweep learning_rate=[1,2] --dev_fraction 0.1 --resume_from_checkpoint out",
            "a sweep is many runs, which go on by",
        ),
    ],
)
def test_numbers_that_cannot_be_meant_and_contradictions_are_one_line(words, message):
    with pytest.raises(HFViTError, match=message.replace("(", r"\(")) as error:
        parse(words.split(), "finetune")
    assert "\n" not in str(error.value)


def test_names_do_not_collide_between_the_groups():
    names = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert isinstance(parse([], "finetune"), Arguments)


def test_a_word_that_is_none_of_the_choices_is_refused_also_from_python():
    with pytest.raises(HFViTError, match=r"--optim 'adamw': choose from .*; did you mean adamw_torch"):
        TrainArguments(optim="adamw")
    with pytest.raises(HFViTError, match="--crop 'center': choose from inception"):
        DataArguments(crop="center")
    with pytest.raises(HFViTError, match="--resize_small nan: give finite numbers"):
        DataArguments(resize_small=math.nan)
