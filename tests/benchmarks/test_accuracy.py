"""The parts of the accuracy benchmark that need no weights: what is drawn, and what is chosen."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

import s2a_fx

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("accuracy")


@pytest.fixture
def setting(accuracy):
    return accuracy.Setting(train=20, validation=8, test=12, epochs=1, warmup=0, batch_size=4)


LABELS = (torch.arange(90) % 3 == 0).long()  # 30 of one class, 60 of the other


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_share_no_image_and_are_balanced(accuracy, setting, seed):
    parts = accuracy.split(LABELS, setting, seed)
    assert [len(part) for part in parts] == [20, 8, 12]
    assert len(torch.cat(parts).unique()) == 40
    assert [LABELS[part].sum().item() for part in parts] == [10, 4, 6]


def test_a_split_is_fixed_by_its_seed(accuracy, setting):
    first, again, other = (accuracy.split(LABELS, setting, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert set(first[0].tolist()) != set(other[0].tolist())


def test_images_that_choose_the_learning_rate_are_in_no_other_part_of_any_seed(accuracy, setting):
    splits = [accuracy.split(LABELS, setting, seed) for seed in range(10)]
    chosen = set(splits[0][1].tolist())
    for train, validation, test in splits:
        assert set(validation.tolist()) == chosen
        assert not chosen & {*train.tolist(), *test.tolist()}


def test_more_images_than_a_class_has_are_refused(accuracy):
    with pytest.raises(SystemExit, match="class 1 has 30 images, asked for 32"):
        accuracy.split(LABELS, accuracy.Setting(train=40, validation=12, test=12, epochs=1, warmup=0, batch_size=4), 0)


def test_every_image_is_flipped_by_a_draw_of_its_own(accuracy):
    image = torch.arange(6.0).view(1, 1, 2, 3)
    forms = [image, image.flip(2), image.flip(3), image.flip(2, 3)]
    found = accuracy.flipped(image.expand(200, 1, 2, 3), torch.Generator().manual_seed(0))
    counts = [sum(torch.equal(f[None], form) for f in found) for form in forms]
    assert sum(counts) == 200 and min(counts) > 20


def test_a_rate_is_chosen_by_the_mean_over_all_seeds_the_smaller_of_equals(accuracy, setting):
    def runs(lr, *validation):
        return [accuracy.Run("m", "full", lr, seed, setting, 0.0, v, None, 1.0) for seed, v in enumerate(validation)]

    fails_once, unfinished = runs(1e-2, 0.9, 0.9, 0.4), runs(3e-2, 0.99, 0.99)
    equals = [*runs(3e-3, 0.8, 0.75, 0.7), *runs(1e-3, 0.75, 0.7, 0.8)]
    found = [*fails_once, *unfinished, *equals]
    assert accuracy.best_rates(found, seeds=3) == [1e-3, 3e-3, 1e-2]
    assert accuracy.best_rates(found, seeds=1) == [3e-2, 1e-2, 3e-3, 1e-3]


@pytest.fixture
def trained(accuracy, monkeypatch):
    """What was trained, in order: runs whose validation accuracy tells how near the rate is to 3e-3."""
    runs = []

    def train(method, lr, seed, setting, data):
        near = 1 - abs(lr - 3e-3)
        runs.append(accuracy.Run(method.model, method.name, lr, seed, setting, 0.0, near, near if setting.test else None, 1.0))
        return runs[-1]

    monkeypatch.setattr(accuracy, "train", train)
    return runs


def test_rates_are_searched_without_test_images_and_the_best_is_run_with_every_seed(accuracy, trained, setting, tmp_path):
    method = accuracy.Method("vit_small_patch14_dinov2", "s2a", tmp_path / "runs.jsonl")
    search = dataclasses.replace(setting, train=10, test=0)
    method.run_all(search, setting, data=None)
    assert [(r.lr, r.seed) for r in trained if r.setting == search] == [
        (1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-3, 1), (3e-3, 2), (1e-3, 1), (1e-3, 2),
    ]  # fmt: skip
    assert [(r.lr, r.seed) for r in trained if r.setting == setting] == [(3e-3, 0), (3e-3, 1), (3e-3, 2)]
    assert method.told(search, setting) == trained[-3:]
    other = dataclasses.replace(trained[-1], lr=1e-3)  # as it is left by an earlier search
    method.file.write_text(method.file.read_text() + json.dumps(dataclasses.asdict(other)) + "\n")
    assert method.told(search, setting) == trained[-3:]
    method.run_all(search, setting, data=None)
    assert len(trained) == 10  # what is in the file is not trained again


def test_the_images_of_the_search_are_the_first_of_those_trained_on(accuracy, setting):
    search = dataclasses.replace(setting, train=10, test=0)
    for seed in range(3):
        few, validation, none = accuracy.split(LABELS, search, seed)
        train, same, test = accuracy.split(LABELS, setting, seed)
        assert set(few.tolist()) <= set(train.tolist()) and not set(few.tolist()) & set(test.tolist())
        assert torch.equal(validation, same) and not len(none)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), [("vit_small_patch14_dinov2", {"img_size": 98}), ("tf_efficientnet_lite0", {})])
def test_the_method_that_is_no_recipe_trains_less_than_one_percent(accuracy, model, options):
    original = timm.create_model(model, num_classes=2, **options)
    body = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in original.get_classifier().parameters())
    gm = s2a_fx.transform(original, torch.empty(2, 3, 98, 98), accuracy.PAIRINGS[model].recipe(accuracy.UNDER_ONE_PERCENT))
    trained = sum(p.numel() for n, p in gm.named_parameters() if p.requires_grad and not n.startswith(("head.", "classifier.")))
    assert 0.9 < 100 * trained / body < 1


def test_differences_are_of_the_same_seed(accuracy):
    figures = {"kept_bytes": 1, "peak_bytes": 1, "trained_percent": 1.0, "trained_percent_without_head": 1.0, "time_over_full": 1.0}
    full = accuracy.Row("m", "full", lr=1.0, test=(0.5, 0.6, 0.9), seeds=(0, 1, 2), **figures)
    ours = accuracy.Row("m", "s2a", lr=1.0, test=(0.6, 0.9), seeds=(1, 2), **figures)
    assert accuracy.table([full, ours]).splitlines()[-1].split("|")[4].strip() == "0.00 ± 0.00"


def test_runs_of_another_setting_are_not_read(accuracy, setting, tmp_path):
    other = accuracy.Setting(20, 8, 12, epochs=2, warmup=0, batch_size=4)
    runs = [accuracy.Run("m", "full", 1e-3, 0, s, 0.0, 0.5, 0.5, 1.0) for s in (setting, other)]
    file = tmp_path / "runs.jsonl"
    assert accuracy.read(file, setting) == []
    file.write_text("".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs))
    assert accuracy.read(file, setting) == runs[:1]
