"""Models with batch norm: forward, statistics, names and bytes are right, and the gradient is that of the plain model."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from slow import fast
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.analysis.saved import is_activation, saved_tensors
from s2a_fx.nn.coded_norms import CodedBatchNorm, CodedMaxPool
from s2a_fx.passes import CompressActivations, FreezeWeights

MODELS = {
    "resnet18": {"zero_init_last": False},
    "test_byobnet": {},  # a regnet
    "mobilenetv3_small_050": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "test_efficientnet": {},
}
COMPRESS = CompressActivations(activation_bits=6, smallest=1 << 12)
BIASES = FreezeWeights(keep=("bias",))


def batch_norm_model(name):
    """A model whose batch norms scale and shift, and four images."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **MODELS[name]).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model, torch.randn(4, 3, 64, 64)


def transformed(model, x, *passes):
    """The transformed model, its weights and statistics its own."""
    return s2a_fx.transform(copy.deepcopy(model), x, passes)


def gradients(gm, x):
    """Output and gradients, by name."""
    y = gm(x)
    y.square().mean().backward() if y.ndim != 2 else F.cross_entropy(y, torch.arange(len(y)) % y.shape[1]).backward()
    return y.detach(), {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}


def kept(gm):
    return [row for row in saved_tensors(gm) if is_activation(row)]


def total(rows):
    return sum(row.bytes for row in rows)


def cosine(a, b):
    return F.cosine_similarity(*(torch.cat([g.flatten() for g in grads.values()]) for grads in (a, b)), 0)


@pytest.mark.parametrize("name", fast(MODELS, "resnet18", "resnetv2_50", "test_efficientnet"))
def test_a_step_is_the_plain_model_s(name):
    model, x = batch_norm_model(name)
    plain, coded = transformed(model, x, FreezeWeights()), transformed(model, x, FreezeWeights(), COMPRESS)
    rows = kept(coded)
    assert all(row.bytes < COMPRESS.smallest for row in rows if row.op.startswith("BatchNorm"))
    assert total(rows) < total(kept(plain)) / 4
    assert total(rows) == measure_saved_bytes(copy.deepcopy(coded), (x,))
    (reference, exact), (y, actual) = gradients(plain, x), gradients(coded, x)
    assert torch.equal(y, reference)
    assert exact.keys() == actual.keys()
    assert cosine(exact, actual) > 0.99
    assert coded.state_dict().keys() == model.state_dict().keys()
    for name, buffer in plain.named_buffers():
        assert torch.equal(coded.get_buffer(name), buffer), name
    for copied in (copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(copied.eval()(x), plain.eval()(x))


def called(gm):
    return [gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module"]


def test_s2a_codes_the_batch_norms_of_a_resnet():
    model, x = batch_norm_model("resnet18")
    gm = s2a_fx.transform(model, x, (*s2a_fx.RECIPES["bias+lrp+lsb"], COMPRESS))
    assert total(kept(gm)) == measure_saved_bytes(gm, (x,))
    assert sum(isinstance(m, CodedBatchNorm) for m in called(gm)) == 20
    assert sum(isinstance(m, CodedMaxPool) for m in called(gm)) == 1


def small(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers), torch.randn(4, 3, 16, 16)


def test_frozen_statistics_are_left_as_they_are_and_nothing_is_kept():
    model, x = small(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    model.train()[1].eval()
    before = copy.deepcopy(model.state_dict())
    plain, coded = transformed(model, x, BIASES), transformed(model, x, BIASES, CompressActivations(smallest=1))
    assert measure_saved_bytes(coded, (x,)) == total(kept(coded)) == 0
    (reference, exact), (y, actual) = gradients(plain, x), gradients(coded, x)
    assert torch.equal(y, reference)
    for name, gradient in exact.items():
        torch.testing.assert_close(actual[name], gradient)
    assert all(torch.equal(value, before[name]) for name, value in coded.state_dict().items() if "running" in name)


def test_statistics_are_frozen_after_the_transform_as_in_any_model():
    gm = transformed(*small(nn.BatchNorm2d(8)), BIASES, CompressActivations(smallest=1))
    for module in gm.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    gm(torch.randn(4, 3, 16, 16))
    assert gm.get_buffer("1.num_batches_tracked") == 0


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.PReLU])
def test_a_norm_with_activation_is_opened(act):
    model, x = small(BatchNormAct2d(8, act_layer=act, drop_layer=nn.Dropout), nn.Conv2d(8, 4, 3))
    plain, coded = transformed(model, x, BIASES), transformed(model, x, BIASES, CompressActivations(smallest=1, activation_bits=6))
    kinds = [type(m).__name__ for m in called(coded)]
    activation = {nn.ReLU: "MaskedActivation", nn.SiLU: "CodedActivation", nn.PReLU: "CodedInput"}[act]
    assert kinds == ["FrozenConvolution", "CodedBatchNorm2d", "CodedDropout", activation, "FrozenConvolution"]
    assert coded.state_dict().keys() == model.state_dict().keys()
    torch.manual_seed(1)
    reference, exact = gradients(plain, x)
    torch.manual_seed(1)
    y, actual = gradients(coded, x)
    assert torch.equal(y, reference)
    assert cosine(exact, actual) > 0.999
    assert torch.equal(plain.eval()(x), coded.eval()(x))


def test_a_norm_that_is_called_twice_is_coded_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), BatchNormAct2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    model, x = Twice(), torch.randn(4, 3, 16, 16)
    plain, coded = transformed(model, x, BIASES), transformed(model, x, BIASES, CompressActivations(smallest=1))
    (reference, exact), (y, actual) = gradients(plain, x), gradients(coded, x)
    assert torch.equal(y, reference)
    assert cosine(exact, actual) > 0.999
    assert coded.norm.num_batches_tracked == 2
    assert torch.equal(coded.norm.running_var, plain.norm.running_var)


def test_pooling_however_it_is_spelled():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            x = F.max_pool2d(self.conv(x), 3, 1, padding=1, ceil_mode=True)
            return torch.max_pool2d(F.max_pool2d(x, kernel_size=(2, 1)), 2, 2)

    model, x = Pools(), torch.randn(2, 3, 20, 20)
    plain, coded = transformed(model, x, BIASES), transformed(model, x, BIASES, CompressActivations(smallest=1))
    assert [type(m).__name__ for m in called(coded)] == ["FrozenConvolution"] + ["CodedMaxPool"] * 3
    (reference, exact), (y, actual) = gradients(plain, x), gradients(coded, x)
    assert torch.equal(y, reference)
    torch.testing.assert_close(exact["conv.bias"], actual["conv.bias"])


def test_a_subclass_is_left_alone_with_a_reason():
    class Own(nn.BatchNorm2d):
        pass

    model, x = small(Own(8), nn.ReLU())
    coded = transformed(model, x, BIASES, CompressActivations(smallest=1))
    assert type(coded.get_submodule("1")) is Own
    assert any("no form serves Own" in n.reason for n in s2a_fx.analyze(coded, x).notes)


def _as_torchvision_s(module):
    """A copy of a model with torchvision's frozen norms in the place of all batch norms."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict({name: value for name, value in module.state_dict().items() if name in frozen.state_dict()})
        return frozen
    for name, child in module.named_children():
        module.add_module(name, _as_torchvision_s(child))
    return module


CONVERSIONS = {
    "timm": freeze_batch_norm_2d,
    "torchvision": _as_torchvision_s,
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", fast(["efficientnet_b0", "resnet10t", "mobilenetv3_small_050"], "resnet10t"))
def test_norms_are_converted_as_in_any_model(name, conversion):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=4), torch.randn(2, 3, 64, 64)
    plain, coded = (s2a_fx.transform(model, (x,), recipe) for recipe in ("bias", "bias+compress"))
    coded = CONVERSIONS[conversion](coded)
    if conversion == "torch":  # SyncBatchNorm does not train on the CPU
        plain.eval()
        coded.eval()
    else:
        plain = freeze_batch_norm_2d(plain)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    output = coded(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert all(p.grad is not None for p in coded.parameters() if p.requires_grad)
    assert all(torch.equal(b, model.state_dict()[n]) for n, b in coded.named_buffers())


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, momentum=None),
        BatchNormAct2d(8, momentum=None),
        nn.InstanceNorm2d(8, momentum=None, track_running_stats=True),
    ],
    ids=lambda norm: type(norm).__name__,
)
@pytest.mark.parametrize("recipe", ["full", "bias", "bias+compress", "linear"])
def test_a_norm_that_averages_over_all_batches(norm, recipe):
    model, x = small(copy.deepcopy(norm), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    gm = s2a_fx.transform(copy.deepcopy(model), (x,), recipe).train()
    assert gm.get_submodule("1").momentum is None
    assert s2a_fx.analyze(gm, (x,)).saved_bytes == measure_saved_bytes(copy.deepcopy(gm), (x,))
    assert s2a_fx.analyze(gm, (x,), mode="compile").saved_bytes
    model.train()
    for batch in (x, 2 * x + 1, -x):
        assert torch.equal(gm(batch), model(batch))
    assert all(torch.equal(b, model.state_dict()[name]) for name, b in gm.named_buffers())
