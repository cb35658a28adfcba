"""What images a run is shown, and what classes it takes them for."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from colours import small_run, write_colours
from PIL import Image
from timm.data import create_transform

import s2a_fx.finetune.data as data
from s2a_fx.errors import InputError, UnreadableImage
from s2a_fx.finetune import finetune
from s2a_fx.finetune.data import make_loader, open_data
from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.model import build_model, data_config


def _loaders(options):
    model, _ = build_model(options, 3)
    found = open_data(options, Processes())
    settings = (data_config(model, options), options, Processes(), torch.device("cpu"))
    return make_loader(found.train, *settings, train=True), make_loader(found.val, *settings, train=False)


@pytest.mark.parametrize("crop_pct", [None, 0.5])
def test_without_augmentation_the_images_are_those_of_the_evaluation(crop_pct, colours, tmp_path):
    train, val = _loaders(small_run(colours, tmp_path, augment="none", crop_pct=crop_pct, batch_size=10))
    noise = Image.effect_noise((90, 60), 100)
    assert (train.dataset.transform(noise) == val.dataset.transform(noise)).all()
    assert [len(images) for images, _ in train.from_batch(0)] == [10] * 4  # of 48
    assert [len(images) for images, _ in val.from_batch(0)] == [10, 8]


def test_a_smaller_crop_shows_less(colours, tmp_path):
    white_frame = Image.new("RGB", (64, 64), "white")
    white_frame.paste((0, 0, 0), (16, 16, 48, 48))
    seen = [_loaders(small_run(colours, tmp_path, crop_pct=c))[1].dataset.transform(white_frame).max() for c in (1.0, 0.4)]
    assert seen == [255, 0]


def test_images_are_shown_as_timm_s_settings_of_the_model_have_them(colours, tmp_path):
    """Squashed here, not cropped, though the model's own size is another."""
    options = small_run(colours, tmp_path, model="convnext_tiny.fb_in22k_ft_in1k_384", model_options={"depths": (1, 1, 1, 1)})
    config = data_config(build_model(options, 3)[0], options)
    assert config["crop_mode"] == "squash"
    wide = Image.effect_noise((90, 60), 100).convert("RGB")
    wanted = create_transform(**config, use_prefetcher=True)(wide)
    assert (_loaders(options)[1].dataset.transform(wide) == wanted).all()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_image_file_is_refused_before_the_run(kind, split, tmp_path):
    folder = write_colours(tmp_path / "data", 2, 1)
    strange = folder / split / "red" / "0.png"
    strange.unlink()
    if kind == "link":
        strange.symlink_to("nowhere.png")
    else:
        os.mkfifo(strange)
    with pytest.raises(InputError, match=rf"{split}/red/0.png: is (a link that leads nowhere|no plain file)"):
        open_data(small_run(folder, tmp_path / "run"), Processes())


@pytest.mark.parametrize("index", [0, 1])
def test_no_image_stands_for_one_that_is_gone(index, tmp_path):
    """timm's data set reads the next image in the place of one that it cannot open."""
    found = open_data(small_run(write_colours(tmp_path / "data", 2, 1), tmp_path / "run"), Processes())
    for data_set in (found.train, found.val):
        gone = Path(data_set.dataset.filename(index, absolute=True))
        gone.unlink()
        with pytest.raises(UnreadableImage, match=gone.name):
            data_set[index]


@pytest.mark.parametrize("place", ["train/0.png", "train/red/day/0.png", "val/0.png"])
def test_an_image_in_no_folder_of_a_class_is_refused(place, tmp_path):
    folder = write_colours(tmp_path / "data", 2, 1)
    (folder / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / place)
    with pytest.raises(InputError, match=rf"{place}: lies in no folder of a class; wanted .*/CLASS/IMAGE"):
        open_data(small_run(folder, tmp_path / "run"), Processes())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize(("split", "content"), [("train", "cut"), ("val", "cut"), ("val", "text")])
def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(split, content, dataset, workers, tmp_path):
    folder = write_colours(tmp_path / "data", 4, 2)
    file = folder / split / "green" / "1.png"
    file.write_bytes(file.read_bytes()[:200] if content == "cut" else b"no image")
    options = small_run(folder, tmp_path / "run", dataset=dataset, epochs=1, batch_size=4, workers=workers)
    with pytest.raises(InputError) as error:
        finetune(options)
    assert "cannot be read" in str(error.value) and "\n" not in str(error.value)
    assert ("of the data set: " if dataset else f"{file}: ") in str(error.value)


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_class_names_stand_in_the_order_of_their_indices(dataset, colours, tmp_path):
    assert open_data(small_run(colours, tmp_path, dataset=dataset), Processes()).class_names == ("blue", "green", "red")


def test_a_class_that_the_evaluation_lacks_shifts_no_other(tmp_path):
    folder = write_colours(tmp_path / "data", 2, 1)
    shutil.rmtree(folder / "val" / "blue")
    options = small_run(folder, tmp_path / "run")
    assert [target for _, target in open_data(options, Processes()).val] == [1, 2]
    with pytest.raises(InputError, match=r"has 2 classes of the 3.*give both the same classes"):
        open_data(small_run(folder, tmp_path / "run", dataset="torch/image_folder"), Processes())


def test_a_run_is_not_resumed_on_other_classes(tmp_path):
    folder = write_colours(tmp_path / "data", 4, 1)
    options = small_run(folder, tmp_path / "run", epochs=1, recipe="linear")
    finetune(options)
    for split in ("train", "val"):
        (folder / split / "red").rename(folder / split / "crimson")
    with pytest.raises(InputError, match=r"class_names 'green', got 'crimson'"):
        finetune(small_run(folder, tmp_path / "run", epochs=1, recipe="linear", resume=True))


def test_a_data_set_is_fetched_by_the_first_process_alone(colours, tmp_path, monkeypatch):
    asked = []

    class Several(Processes):
        def once_a_machine(self, make):
            asked.append("first")
            make()
            asked.append("all")

    def create(name, download, **settings):
        asked.append(download)
        return create_dataset("", **settings)

    create_dataset = data.create_dataset
    monkeypatch.setattr(data, "create_dataset", create)
    open_data(small_run(colours, tmp_path, dataset="torch/made", download=True), Several())
    assert asked == ["first", True, True, "all", True, True]
