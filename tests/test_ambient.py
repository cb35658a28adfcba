"""Whatever the caller is inside of, figures and results are those of the top of a program, and all is as before afterwards."""

import contextlib

import pytest
import timm
import torch
from slow import fast
from small_models import small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import s2a_fx
from s2a_fx.passes import CompressActivations

IMAGES = torch.randn(2, 3, 32, 32)
GRAY = IMAGES[:, :1]


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return self.head((x + torch.softmax(self.norm(x), -1)).mean(1))


def unexpected(*args):
    raise AssertionError("the caller's hook saw what is simulated")


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return unexpected()


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def nested_hooks():
    with torch.autograd.graph.saved_tensors_hooks(unexpected, unexpected), torch.autograd.graph.save_on_cpu():
        yield


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "anomaly mode without checks": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy),
    "nested hooks": nested_hooks,
    "hooks disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "fake mode": FakeTensorMode,
    "lenient fake mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "dispatch mode": Sees,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
}
ALWAYS = ("no_grad", "inference_mode", "anomaly mode", "nested hooks", "fake mode", "default device", "default dtype")
MODELS = {"vit": lambda: small_model("vit", depth=1, img_size=32)[0], "CNN": CNN, "tokens": Tokens}


def state():
    """What a call must leave as it was."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_anomaly_check_nan_enabled(),
        top,
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_rng_state().tolist(),
    )


def figures(model):
    report = s2a_fx.analyze(model, IMAGES, optimizer="sgd")  # Adam's counters of steps have the default dtype
    return report.saved_bytes, report.peak.bytes, report.saved, sum(row.bytes for row in report.saved)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", fast(MODELS, next(iter(MODELS))))
@pytest.mark.parametrize(
    "around",
    fast(AROUND, "no_grad", "inference_mode", "anomaly mode", "nested hooks", "fake mode", "default device", "default dtype"),
)
def test_figures_and_models_are_those_of_the_top_of_a_program(around, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    recipe = (CompressActivations(smallest=1),)
    wanted = [figures(m) for m in (model, s2a_fx.transform(model, IMAGES, recipe))]
    loss = model(IMAGES).square().sum()
    rng = torch.get_rng_state()
    with AROUND[around]():
        before = state()
        gm = s2a_fx.transform(model, IMAGES, recipe)
        found = [figures(model), figures(gm)]
        with pytest.raises(s2a_fx.InputError):
            s2a_fx.analyze(model, GRAY)
        assert state() == before
    assert found == wanted
    assert torch.equal(torch.get_rng_state(), rng)
    gm = gm.train()
    gm(IMAGES).square().sum().backward()
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)
    assert not any(t.is_inference() for t in [*gm.parameters(), *gm.buffers()])
    assert loss.isfinite()


@pytest.mark.parametrize("make", [CNN, Tokens, lambda: timm.create_model("resnet10t", num_classes=4)])
def test_fake_weights_inside_their_mode(make):
    wanted = figures(make())
    with FakeTensorMode():
        model = make()
        assert figures(model) == wanted
        s2a_fx.transform(model, torch.randn(2, 3, 32, 32), (CompressActivations(smallest=1),))
    assert figures(model) == wanted
