"""Several threads analyze and transform while others train: right figures, and nobody else's modules touched."""

import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn

import s2a_fx

IMAGES = torch.randn(2, 3, 32, 32)


class CNN(nn.Module):
    """Draws, branches on the mode and writes to buffers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.body, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = x + self.drop(self.body(x))
        if self.training:
            x = x * 1.5
        return self.head(x.mean((2, 3)))


MODELS = {"vit": lambda: small_model("vit", depth=1, img_size=32)[0], "CNN": CNN}


def figures(model, recipe):
    """What threads must agree on."""
    gm = s2a_fx.transform(model, IMAGES, recipe)
    report, rewritten = s2a_fx.analyze(model, IMAGES), s2a_fx.analyze(gm, IMAGES)
    return report.saved, report.peak.bytes, rewritten.saved, rewritten.peak.bytes, gm.code


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))


def losses_of_training(model, steps):
    """Losses of a model that draws nothing: threads share one generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IMAGES), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, [name for name, _ in model.named_modules()]


def run_beside_training(rounds, steps):
    wanted = {name: figures(make(), recipe) for name, make in MODELS.items() for recipe in ["bias+compress"]}
    alone, beside = losses_of_training(plain_model(), steps), plain_model()
    call, read = nn.Module.__dict__["__call__"], nn.Module.__dict__["__getattr__"]
    failures, trained, start = [], [], threading.Barrier(5)

    def guarded(run):
        start.wait()
        try:
            run()
        except BaseException as error:
            failures.append(error)

    def work(name):
        model = MODELS[name]()
        for _ in range(rounds):
            if figures(model, "bias+compress") != wanted[name]:
                failures.append(name)

    runs = [lambda name=name: work(name) for name in ("vit", "CNN", "vit", "CNN")]
    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    trainer = threading.Thread(target=guarded, args=(lambda: trained.append(losses_of_training(beside, steps)),))
    for thread in (*threads, trainer):
        thread.start()
    for thread in (*threads, trainer):
        thread.join()
    assert failures == []
    assert trained == [alone]
    assert (nn.Module.__dict__["__call__"], nn.Module.__dict__["__getattr__"]) == (call, read)


def test_four_threads_beside_training():
    run_beside_training(rounds=2, steps=100)


@pytest.mark.slow
def test_four_threads_for_fifty_rounds_beside_training():
    run_beside_training(rounds=50, steps=10_000)


@pytest.mark.parametrize("name", MODELS)
def test_plain_modules_work_after_a_thread_that_failed(name):
    """Also when the model refuses in the middle of its trace."""

    class Refuses(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    model = MODELS[name]()
    broken = nn.Sequential(model, Refuses())
    errors = []

    def run():
        try:
            s2a_fx.analyze(broken, IMAGES)
        except s2a_fx.S2AError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert model(IMAGES).shape == (2, 5)


def test_random_numbers_that_another_thread_draws_are_its_own():
    """A model that draws none is traced, and one that does is refused by its line."""

    class Draws(nn.Module):
        def forward(self, x):
            return x * np.random.rand()

    def draw():
        while not stop.is_set():
            random.random()
            np.random.rand()

    stop = threading.Event()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3):
            s2a_fx.trace(CNN(), IMAGES)
            with pytest.raises(s2a_fx.TraceError, match=r"line \d+ of .*test_threads.py: draws with Python's or NumPy's random"):
                s2a_fx.trace(nn.Sequential(nn.Linear(4, 4), Draws()), torch.randn(2, 4))
    finally:
        stop.set()
        thread.join()
