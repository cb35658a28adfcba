"""What cannot be asked for is told in one line, before anything is written."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from colours import small_run, write_colours

from s2a_fx.cli import main
from s2a_fx.errors import S2AError
from s2a_fx.finetune import FinetuneOptions, finetune
from s2a_fx.finetune.model import load_weights
from s2a_fx.zoo import create_model


def _refused(options, told):
    with pytest.raises(S2AError, match=told) as error:
        finetune(options)
    assert "\n" not in str(error.value)
    assert not options.folder.exists()


def test_data(tmp_path):
    data = tmp_path / "data"
    _refused(small_run(data, tmp_path / "run"), "there is no such folder")
    data.mkdir()
    _refused(small_run(data, tmp_path / "run"), "cannot be opened: Found 0 images|no folder for the split")
    write_colours(data, 4, 2)
    shutil.rmtree(data / "val")
    _refused(small_run(data, tmp_path / "run"), "no folder for the split 'validation'")
    shutil.copytree(data / "train", data / "val")
    _refused(small_run(data, tmp_path / "run", batch_size=32), "12 training images do not fill one step")
    (data / "val" / "red").rename(data / "val" / "pink")
    _refused(small_run(data, tmp_path / "run"), "pink: in the split 'validation' and not in 'train'")
    for split in ("train", "val"):
        shutil.rmtree(data / split)
        (data / split / "red").mkdir(parents=True)
        _black_image(data / split / "red")
    _refused(small_run(data, tmp_path / "run"), "got 1 class, wanted two at least")


def _black_image(folder):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "0.png")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "vit_tini_patch16_224"}, "unknown model.*vit_tiny_patch16_224"),
        ({"recipe": "s3a"}, "unknown recipe 's3a'"),
        ({"model_options": {"foo": 5}}, "cannot be built for 32 x 32 images with foo=5: .*unexpected keyword argument 'foo'"),
        ({"optimizer": "adamv"}, "optimizer: timm refuses 'adamv'"),
        ({"augment": "nonsense"}, "augment: timm refuses 'nonsense'"),
        ({"num_classes": 2}, "got 3 classes, wanted no more than the 2"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"resume": True}, "no checkpoint to resume from"),
        ({"memory": 1000}, "does not fit"),
        ({"model": "timm/resnet10t"}, "unknown model 'timm/resnet10t'; wanted a name of timm's own.*'resnet10t'"),
        ({"model": "resnet10t.nonsense"}, "resnet10t.nonsense cannot be built.*Invalid pretrained tag"),
        ({"model": "resnet10t", "model_options": {"act_layer": "nonsense"}}, "resnet10t cannot be built.*'nonsense'"),
        ({"optimizer": "adahessian"}, "optimizer: 'adahessian' needs second derivatives"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option(changes, told, colours, tmp_path):
    _refused(small_run(colours, tmp_path / "run", **changes), told)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"lr": 0.0}, {"label_smoothing": 1.0}, {"amp": "int8"}, {"warmup_epochs": 80},
        {"batch_size": 3, "mixup": 0.1}, {"workers": -1}, {"parallel": "tp"}, {"seed": 5_000_000_000}, {"crop_pct": 0.01},
        {"model_options": {"num_classes": 5}}, {"model_options": {"in_chans": 4}}, {"pretrained": True, "checkpoint": "file"},
        {"lr": float("nan")}, {"mixup": float("inf")},
        {"weight_decay": float("nan")}, {"model_options": {"norm_layer": torch.nn.LayerNorm}},
    ],
    ids=str,
)  # fmt: skip
def test_value(changes, tmp_path):
    with pytest.raises(S2AError, match=f"{next(iter(changes))}.*got"):
        FinetuneOptions("vit_tiny_patch16_224", tmp_path, **changes)


def test_a_run_that_no_weights_are_named_for(tmp_path, capsys):
    with pytest.raises(S2AError, match=r"got 0 sources of weights.*--pretrained.*--checkpoint FILE.*--from-scratch"):
        FinetuneOptions("vit_tiny_patch16_224", tmp_path)
    assert main(["finetune", "vit_tiny_patch16_224", str(tmp_path)]) == 2
    assert "--from-scratch" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_another_model(colours, tmp_path):
    file = tmp_path / "weights.pt"
    _refused(small_run(colours, tmp_path / "run", checkpoint=str(file)), "there is no such file")
    file.write_bytes(b"not weights")
    _refused(small_run(colours, tmp_path / "run", checkpoint=file), "cannot be read as weights")
    torch.save(create_model("resnet10t").state_dict(), file)
    _refused(small_run(colours, tmp_path / "run", checkpoint=file), "the weights of another model: lacks")


def test_an_output_that_no_folder_can_have(colours, tmp_path):
    with pytest.raises(S2AError, match="cannot be looked into: File name too long; give another --output"):
        finetune(small_run(colours, tmp_path / ("o" * 300)))


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "task.safetensors", ".lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_an_output_whose_files_the_run_could_not_read_again(name, kind, colours, tmp_path):
    file = tmp_path / "run" / name
    file.parent.mkdir()
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(name)}[kind](file)
    lines = []
    with pytest.raises(S2AError, match=rf"{name}: .*(is a pipe|is a folder|symbolic links).*; .*give another --output"):
        finetune(small_run(colours, tmp_path / "run"), lines.append)
    assert lines == [] and [p.name for p in file.parent.iterdir()] == [name]


def test_a_lock_that_is_a_link_empties_no_file(colours, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    finetune(small_run(colours, tmp_path / "run", epochs=1, recipe="linear"))
    assert (tmp_path / "precious").read_text() == "precious"


def test_weights_for_colours_serve_grey_images(tmp_path):
    theirs, ours = create_model("resnet10t"), create_model("resnet10t", in_chans=1)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    assert load_weights(ours, tmp_path / "weights.pt") == ()
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(ours.eval()(grey), theirs.eval()(grey.expand(-1, 3, -1, -1)))


def test_weights_without_the_counts_of_batch_norms_are_taken(tmp_path):
    theirs, ours = create_model("resnet10t"), create_model("resnet10t")
    torch.save({name: t for name, t in theirs.state_dict().items() if "num_batches" not in name}, tmp_path / "weights.pt")
    assert load_weights(ours, tmp_path / "weights.pt") == ()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_a_file_that_would_run_code_is_refused(colours, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": shutil.rmtree}, file)
    _refused(small_run(colours, tmp_path / "run", checkpoint=file), "cannot be read as weights")


def test_a_head_of_another_size_begins_at_zero_and_is_said(colours, tmp_path):
    options = small_run(colours, tmp_path / "run", epochs=1, recipe="linear", checkpoint=tmp_path / "weights.pt")
    model = create_model(options.model, image_size=32, num_classes=7, **options.model_options)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    lines = []
    finetune(options, lines.append)
    assert any("head.weight, head.bias" in line and "begin at zero" in line for line in lines)


@pytest.mark.slow
def test_of_several_processes_one_tells_it(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "s2a_fx.cli"]
    command += ["finetune", "vit_tiny_patch16_224", str(tmp_path / "none"), "--from-scratch", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and done.stderr.count("there is no such folder") == 1


def test_command_line_tells_it_on_one_line_and_exits_with_2(tmp_path, capsys):
    assert main(["finetune", "vit_tiny_patch16_224", str(tmp_path / "none"), "--from-scratch"]) == 2
    assert capsys.readouterr().err.startswith("s2a-fx: error: ")
