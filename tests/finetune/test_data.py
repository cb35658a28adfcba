"""What images a run is shown, and what classes it takes them for."""

import os
import shutil
import socket
from io import BytesIO

import pytest
import torch
from colours import small_run, write_colours
from PIL import Image
from timm.data import ImageDataset, create_transform

import s2a_fx.finetune.data as data
from s2a_fx.errors import InputError
from s2a_fx.finetune import finetune
from s2a_fx.finetune.data import make_loader, open_data
from s2a_fx.finetune.distributed import Processes
from s2a_fx.finetune.draws import Drawn
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


@pytest.mark.parametrize("place", ["train/0.png", "train/red/day/0.png", "val/0.png"])
def test_an_image_in_no_folder_of_a_class_is_refused(place, tmp_path):
    folder = write_colours(tmp_path / "data", 2, 1)
    (folder / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / place)
    with pytest.raises(InputError, match=rf"{place}: lies in no folder of a class; wanted .*/CLASS/IMAGE"):
        open_data(small_run(folder, tmp_path / "run"), Processes())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize(
    ("split", "content"), [("train", "cut"), pytest.param("val", "cut", marks=pytest.mark.slow), ("val", "text")]
)
def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(split, content, dataset, workers, tmp_path):
    folder = write_colours(tmp_path / "data", 4, 2)
    file = folder / split / "green" / "1.png"
    file.write_bytes(file.read_bytes()[:200] if content == "cut" else b"no image")
    options = small_run(folder, tmp_path / "run", dataset=dataset, epochs=1, batch_size=4, workers=workers)
    with pytest.raises(InputError) as error:
        finetune(options)
    assert "cannot be read" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{file}: ")


FOLDERS = ["", "torch/image_folder"]


@pytest.mark.parametrize("dataset", FOLDERS)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("broken link", r"is a link to nowhere\.png and cannot be read \(No such file"),
        ("circle", r"is a link to 1\.png and cannot be read \(Too many levels"),
        ("pipe", "is a pipe, wanted a plain file"),
        ("socket", "is a socket, wanted a plain file"),
    ],
)
def test_an_image_that_is_no_plain_file_is_refused_before_the_run(kind, told, split, dataset, tmp_path, monkeypatch):
    folder = write_colours(tmp_path / "data", 4, 2)
    file = folder / split / "green" / "1.png"
    file.unlink()
    monkeypatch.chdir(file.parent)  # a socket's name has a hundred letters at most
    if kind == "pipe":
        os.mkfifo(file.name)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(file.name)
    else:
        file.symlink_to("nowhere.png" if kind == "broken link" else file.name)
    with pytest.raises(InputError, match=rf"{split}/green/1\.png: {told}"):
        open_data(small_run(folder, tmp_path / "run", dataset=dataset), Processes())


def test_links_to_images_are_images(tmp_path):
    folder = write_colours(tmp_path / "data", 2, 2)
    (folder / "train").rename(tmp_path / "elsewhere")
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    file = folder / "val" / "red" / "0.png"
    file.rename(tmp_path / "0.png")
    file.symlink_to(tmp_path / "0.png")
    found = open_data(small_run(folder, tmp_path / "run"), Processes())
    assert (len(found.train), len(found.val)) == (6, 6)


@pytest.mark.parametrize("dataset", FOLDERS)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("becomes", "workers"),
    [
        ("nothing", 0),
        pytest.param("nothing", 1, marks=pytest.mark.slow),
        pytest.param("a folder", 0, marks=pytest.mark.slow),
        pytest.param("a broken link", 0, marks=pytest.mark.slow),
    ],
)
def test_an_image_that_goes_in_mid_run_ends_it_with_its_name(becomes, split, dataset, workers, tmp_path):
    folder = write_colours(tmp_path / "data", 4, 2)
    file = folder / split / "green" / "1.png"

    def say(line):
        if line.startswith("it fits"):  # after the files were looked at
            file.unlink()
            if becomes == "a folder":
                file.mkdir()
            elif becomes == "a broken link":
                file.symlink_to("nowhere.png")

    with pytest.raises(InputError) as error:
        finetune(small_run(folder, tmp_path / "run", dataset=dataset, epochs=1, batch_size=4, workers=workers), say)
    reason = "Is a directory" if becomes == "a folder" else "No such file or directory"
    assert str(error.value) == f"{file}: cannot be read ({reason}); mend it or take it out."


class Listed:
    """A reader, as those of timm's other data sets are, of images in memory."""

    def __init__(self, *images):
        self.images = images

    def __getitem__(self, index):
        return BytesIO(self.images[index]), index

    def __len__(self):
        return len(self.images)

    def filename(self, index, basename, absolute):
        return None


def test_a_broken_image_of_any_reader_of_timm_s_is_not_replaced(tmp_path):
    whole = BytesIO()
    Image.effect_noise((64, 64), 100).save(whole, "png")
    dataset = ImageDataset("", reader=Listed(whole.getvalue()[:500], whole.getvalue()))
    options = small_run(tmp_path, tmp_path)
    config = data_config(build_model(options, 3)[0], options)
    shown = make_loader(Drawn(dataset, 0), config, options, Processes(), torch.device("cpu"), train=False).dataset
    assert shown[1][1] == 1
    with pytest.raises(InputError, match="image 0 of the data set: cannot be read"):
        shown[0]


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
