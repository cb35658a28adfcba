"""The parts of the accuracy benchmark that need no weights: what is drawn, and what is chosen."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from s2a_fx.recipes import resolve

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


def test_the_rate_is_chosen_on_the_validation_images_of_all_seeds_the_smaller_of_equals(accuracy, setting):
    def run(lr, seed, validation, test):
        return accuracy.Run("m", "full", lr, seed, setting, loss=0.0, validation=validation, test=test, seconds=1.0)

    def runs(lr, *validation):
        return [run(lr, seed, found, test=1 - lr) for seed, found in enumerate(validation)]

    fails_once, unfinished = runs(1e-2, 0.9, 0.9, 0.4), runs(3e-2, 0.99, 0.99)
    equals = [*runs(3e-3, 0.8, 0.75, 0.7), *runs(1e-3, 0.75, 0.7, 0.8)]
    assert accuracy.best_rate([*fails_once, *unfinished, *equals]) == 1e-3
    assert accuracy.best_rate(unfinished) is None


def test_methods_that_are_no_recipe_differ_from_one_in_what_they_say(accuracy):
    assert sum(a != b for a, b in zip(accuracy.RECIPES["s2a, rank 18"], resolve("s2a"), strict=True)) == 1


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
    file.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    assert accuracy.read(file, setting) == runs[:1]
