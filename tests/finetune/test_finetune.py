"""What a run does when nothing goes wrong, and what it says."""

import os
import sys

import pytest
import torch
from colours import SMALL, small_run, stored
from safetensors.torch import load_file
from torch import nn

from s2a_fx.cli import main
from s2a_fx.finetune import Precision, evaluate, finetune, training_steps
from s2a_fx.finetune.model import build_model
from s2a_fx.finetune.objective import make_optimizer, no_decay
from s2a_fx.graph.capture import trace


def test_the_loss_falls_and_accuracy_beats_chance(whole_run):
    result, _ = whole_run
    assert [e.number for e in result.epochs] == [1, 2]
    assert result.epochs[1].loss < result.epochs[0].loss
    assert result.best.accuracy.top1 > 0.6
    assert result.best.accuracy.balanced > 0.6


def test_memory_is_told_before_the_first_epoch_and_after_the_last(whole_run):
    result, lines = whole_run
    assert lines[0].endswith("3 classes, 48 images to train on, 18 to evaluate on")
    assert "peaks at" in lines[1]
    assert next(i for i, line in enumerate(lines) if "it fits" in line) < next(
        i for i, line in enumerate(lines) if "epoch 1/2" in line
    )
    assert "MB predicted" in lines[-1] and "MB measured" in lines[-1]
    assert result.measured_bytes is None or result.measured_bytes > 0


def test_checkpoints_hold_what_trains_and_no_frozen_weight(whole_run):
    result, _ = whole_run
    record = stored(result.folder)
    assert "blocks.0.attn.qkv.bias" in record["trained"]
    assert "blocks.0.attn.qkv.weight" not in record["trained"]
    assert sorted(p.name for p in result.folder.iterdir()) == [".lock", "best.pt", "last.pt", "task.safetensors"]


def test_what_does_not_fit_is_refused_before_anything_is_written_and_can_be_forced(colours, tmp_path, capsys):
    command = [
        "finetune",
        "vit_tiny_patch16_224",
        str(colours),
        "--output",
        str(tmp_path / "run"),
        "--memory",
        "0.5MB",
        "--from-scratch",
        "--device",
        "cpu",
    ]
    command += ["--image-size", "32", "--epochs", "1", "--batch-size", "8", "--workers", "0"]
    command += [word for name, value in SMALL.items() for word in ("--model-option", f"{name}={value}")]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "does not fit" in err and "--force" in err
    assert "peaks at" in out
    assert not (tmp_path / "run").exists()
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "run" / "last.pt").exists()


def test_two_batches_added_up_are_one_of_twice_the_size(colours, tmp_path):
    weights = []
    for name, batch, together in (("added", 4, 2), ("whole", 8, 1)):
        options = small_run(
            colours,
            tmp_path / name,
            epochs=1,
            batch_size=batch,
            grad_accumulation=together,
            recipe="bias",
            optimizer="sgd",
            model_options=SMALL,
        )
        finetune(options)
        weights.append(stored(tmp_path / name)["trained"])
    added, whole = weights
    assert added.keys() == whole.keys()
    assert max((added[n] - whole[n]).abs().max() for n in whole) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"mixup": 0.4}, {"amp": "bfloat16", "channels_last": True}, {"amp": "float16", "optimizer": "sgd"}, {"augment": "rand-m5-n1"}],
    ids=["mixup", "bfloat16", "float16", "augment"],
)
def test_a_run_with(changes, colours, tmp_path):
    result = finetune(small_run(colours, tmp_path / "run", epochs=1, **changes))
    assert result.epochs[0].loss == result.epochs[0].loss


def test_the_rate_rises_and_falls_as_in_the_paper(colours, tmp_path):
    finetune(small_run(colours, tmp_path / "run", epochs=4, warmup_epochs=2, recipe="linear", save_every=1))
    (group, *_) = stored(tmp_path / "run")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0, abs=1e-9)
    assert group["initial_lr"] == 3e-3


def test_a_data_set_of_torchvision(colours, tmp_path):
    result = finetune(small_run(colours, tmp_path / "run", epochs=1, recipe="linear", dataset="torch/image_folder"))
    assert result.best.accuracy.top1 > 0


def test_grey_images(colours, tmp_path):
    finetune(small_run(colours, tmp_path / "run", epochs=1, recipe="full", model_options={**SMALL, "in_chans": 1}))
    assert stored(tmp_path / "run")["trained"]["patch_embed.proj.weight"].shape[1] == 1


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")], ids="+".join)
def test_a_run_whose_output_no_one_reads_any_more_goes_on(streams, colours, tmp_path, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    command = ["finetune", "resnet10t", str(colours), "--output", str(tmp_path / "run"), "--device", "cpu", "--from-scratch"]
    command += ["--recipe", "linear", "--image-size", "32", "--epochs", "1", "--workers", "0"]
    with os.fdopen(write, "w") as closed:
        for stream in streams:
            monkeypatch.setattr(sys, stream, closed)
        assert main(command) == 0
    assert "stderr" in streams or "the run goes on without it" in capsys.readouterr().err
    assert (tmp_path / "run" / "task.safetensors").exists()


def test_what_is_trained_and_decays(tmp_path):
    options = small_run(tmp_path, tmp_path, model_options=SMALL, recipe="full")
    model, _ = build_model(options, 3)
    model.blocks.requires_grad_(False)
    gm = trace(model, torch.randn(2, 3, 32, 32))
    groups = make_optimizer(gm, options, no_decay(model)).param_groups
    decaying = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    found = {name: decaying.get(id(p)) for name, p in gm.named_parameters()}
    assert found["head.weight"] and found["patch_embed.proj.weight"]
    assert not any((found["pos_embed"], found["cls_token"], found["head.bias"], found["norm.weight"]))
    assert found["blocks.0.mlp.fc1.weight"] is None


def test_the_task_file_holds_the_best_weights(whole_run):
    result, _ = whole_run
    best = stored(result.folder, "best.pt")["trained"]
    kept = load_file(result.folder / "task.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in best.items())


def test_batch_norms_keep_their_statistics_if_asked_to(colours, tmp_path):
    means = {}
    for frozen in (True, False):
        options = small_run(
            colours, tmp_path / str(frozen), model="resnet10t", epochs=1, recipe="bias", model_options={}, freeze_batch_norm=frozen
        )
        finetune(options)
        means[frozen] = stored(options.folder)["buffers"]["layer1.0.bn1.running_mean"]
    assert means[True].eq(0).all()
    assert not means[False].eq(0).all()


def test_a_balanced_accuracy_is_the_mean_over_classes():
    targets = torch.tensor([0, 0, 0, 1])
    always_0 = nn.Linear(1, 2)
    nn.init.constant_(always_0.weight, 0)
    always_0.bias.data = torch.tensor([1.0, 0.0])
    found = evaluate(always_0, [(torch.zeros(4, 1, 1, 1).flatten(1)[..., None, None].flatten(1), targets)], 2)
    assert found.top1 == 0.75
    assert found.balanced == 0.5


def test_steps_leave_out_what_does_not_fill_an_update():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(2, 3, 2, 2), torch.tensor([0, 1]))] * 5
    losses = list(training_steps(model, batches, optimizer, nn.CrossEntropyLoss(), precision=Precision(), accumulation=2))
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert all(p.grad is None for p in model.parameters())
