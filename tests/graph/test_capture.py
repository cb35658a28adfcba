"""Tracing: modes still switch, the batch stays symbolic, provenance and shapes stand, the model is left as it was."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.provenance import module_path
from s2a_fx.graph.training_switch import TrainingSwitch
from s2a_fx.passes import CompressActivations, FreezeWeights
from s2a_fx.zoo import timm_model


def test_traced_model_computes_the_same(family):
    model, x = small_model(family)
    gm = s2a_fx.trace(model, x)
    model.eval()
    gm.eval()
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


def test_batch_stays_symbolic(family):
    model, x = small_model(family)
    gm = s2a_fx.trace(model, x).eval()
    more = torch.cat([x, x, x])
    torch.testing.assert_close(gm(more), model.eval()(more))


def test_every_node_knows_shape_and_module(vit):
    model, x = vit
    gm = s2a_fx.trace(model, x)
    assert all("val" in node.meta for node in gm.graph.nodes)
    assert {module_path(n) for n in gm.graph.nodes} >= {"blocks.0.attn", "blocks.2.mlp.act", "head"}


class Statements(nn.Module):
    """Writes to tensors in statements whose value nobody reads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("center", torch.zeros(4))

    def forward(self, x):
        y = self.layer(x)
        y.mul_(2)
        y += 1
        self.act(y)
        self.center.mul_(0.5).add_(y.detach().mean(0))
        return y


@pytest.mark.parametrize(
    "recipe", [(), (FreezeWeights(keep=("layer.bias",)),), (FreezeWeights(keep=("layer.*",)), CompressActivations(smallest=1))]
)
def test_what_writes_in_place_stays_though_its_value_is_read_by_no_one(recipe):
    model, x = Statements(), torch.randn(3, 4)
    expected = copy.deepcopy(model)
    gm = s2a_fx.transform(model, x, recipe)
    gm.center = gm.center.clone()  # a graph shares the model's buffers
    torch.testing.assert_close(gm(x), expected(x))
    torch.testing.assert_close(gm.center, expected.center)


class Dropping(nn.Module):
    """Reads `self.training` in three ways: as an argument, through a module, and by an early return."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.path = timm.layers.DropPath(0.5)
        self.attention_dropout = 0.5

    def forward(self, x):
        x = F.dropout(self.inner(x), 0.5, self.training)
        x = self.path(x)
        q = x.view(-1, 1, 4, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=self.attention_dropout if self.training else 0.0)


def test_dropout_switches_with_the_mode():
    gm = s2a_fx.trace(Dropping(), torch.randn(16, 8))
    switches = [m for m in gm.modules() if isinstance(m, TrainingSwitch)]
    assert len(switches) == 2
    x = torch.randn(16, 8)
    gm.train()
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))


def test_training_mode_with_one_seed_gives_the_model_s_own_output():
    model, x = Dropping().train(), torch.randn(16, 8)
    gm = s2a_fx.trace(model, x)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(gm(x), expected, rtol=0, atol=0)


def test_the_model_keeps_its_mode_and_its_flags():
    model, x = small_model("vit")
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    s2a_fx.transform(model, x, "linear")
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_weights_share_their_storages(vit):
    model, x = vit
    gm = s2a_fx.trace(model, x)
    assert gm.get_parameter("head.weight").data_ptr() == model.head.weight.data_ptr()


def test_meta_model_allocates_nothing():
    gm = s2a_fx.trace(*timm_model("vit_giant_patch14_224", batch_size=2))
    assert all(p.is_meta for p in gm.parameters())


class BranchesOnShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.shape[1] > 2 else x


def test_control_flow_on_shapes_is_followed():
    gm = s2a_fx.trace(BranchesOnShape(), torch.randn(3, 4))
    x = torch.randn(5, 4)
    assert gm(x).shape == (5, 4)
    assert s2a_fx.analyze(BranchesOnShape(), torch.randn(3, 4)).saved_bytes == 3 * 4 * 4


class BranchesOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(_Refuses())

    def forward(self, x):
        return self.inner(x)


class _Refuses(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def test_control_flow_on_values_is_refused_with_module_and_line():
    with pytest.raises(s2a_fx.TraceError, match=r"inner\.0 \(_Refuses\), line \d+ of .*test_capture\.py"):
        s2a_fx.trace(BranchesOnValues(), torch.randn(3, 4))


@pytest.mark.parametrize("inputs", [(), ("image",), None])
def test_inputs_that_are_no_tensors_are_refused(vit, inputs):
    with pytest.raises(s2a_fx.InputError, match="wanted tensors"):
        s2a_fx.trace(vit[0], inputs or ())


def test_image_of_another_size_is_refused(vit):
    with pytest.raises(s2a_fx.InputError, match="does not take inputs of shape"):
        s2a_fx.trace(vit[0], torch.randn(2, 3, 70, 70))


def test_a_batch_too_small_for_batch_norms_is_refused():
    with pytest.raises(s2a_fx.InputError, match=r"more than 1 value per channel.*Pass a larger batch or larger images"):
        s2a_fx.trace(small_model("resnet")[0].train(), torch.randn(1, 3, 32, 32))


def test_a_model_traced_in_eval_mode_stays_in_it():
    model, x = Dropping().eval(), torch.randn(16, 8)
    torch.testing.assert_close(s2a_fx.trace(model, x)(x), model(x), rtol=0, atol=0)


class RewiresByMode(nn.Module):
    """Between train and eval, another operand in one module and another nested constant in the other."""

    def __init__(self):
        super().__init__()
        self.operand, self.constant = _PicksOperand(), _PicksSize()

    def forward(self, x):
        return self.constant(self.operand(x))


class _PicksOperand(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        p, q = self.a(x), self.b(x)
        return (p if self.training else q) * 2


class _PicksSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return F.interpolate(self.a(x), size=(4, 4) if self.training else (8, 8))


def test_modules_rewired_by_the_mode_still_switch():
    model, x = RewiresByMode(), torch.randn(2, 3, 6, 6)
    gm = s2a_fx.trace(model, x)
    for mode in (True, False):
        torch.testing.assert_close(gm.train(mode)(x), model.train(mode)(x), rtol=0, atol=0)


def test_missing_inputs_are_named():
    class TakesTwo(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(s2a_fx.InputError, match="also needs y"):
        s2a_fx.trace(TakesTwo(), torch.randn(2))


class Grid(nn.Module):
    """Makes coordinates of the sizes of its input, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x)
        height, width = x.shape[-2:]
        rows = torch.arange(height, dtype=torch.float32) / float(height)
        columns = torch.arange(width, dtype=torch.float32) / (float(width) if not isinstance(self.fc.bias, float) else 1)
        return self.fc((x * (rows[:, None] + columns)).mean((2, 3)))


class Half(nn.Module):
    """Reads a part of its input, as large as a share of it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x[:, : int(x.shape[1] * 0.5)].mean(1)) * float("2") + int(isinstance(0.5, float))


NUMBERS = {
    "dinov3": (
        lambda: timm.create_model("vit_small_patch16_dinov3", depth=1, embed_dim=64, num_heads=2, num_classes=4),
        (torch.randn(2, 3, 64, 64), torch.randn(3, 3, 64, 64)),
    ),
    "grid": (Grid, (torch.randn(2, 3, 16, 24), torch.randn(3, 3, 24, 32))),
    "half": (Half, (torch.randn(2, 6, 8), torch.randn(1, 9, 8))),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_made_of_sizes_are_traced_by_torch_fx(name, monkeypatch):
    def dynamo(*args):
        raise AssertionError("torch.fx did not trace it")

    monkeypatch.setattr("s2a_fx.graph.capture.capture_by_dynamo", dynamo)
    torch.manual_seed(0)
    make, inputs = NUMBERS[name]
    model = make().eval()
    gm = s2a_fx.trace(model, (inputs[0],))
    for x in inputs:
        assert torch.equal(gm(x), model(x))
    assert "float" not in globals()
    gm = s2a_fx.transform(model, (inputs[0],), "full").train()
    assert s2a_fx.analyze(gm, (inputs[0],)).saved_bytes == measure_saved_bytes(gm, (inputs[0],))


class Casts(nn.Module):
    """Names a dtype by Python's class, and asks for the class of a number."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.fc(x.to(float).to(dtype=torch.float32))
        return x * int(x.shape[0]) if type(self.fc.in_features) is int else x


def test_classes_of_numbers_stay_classes_in_a_file_that_converts_sizes():
    torch.manual_seed(0)
    model, x = Casts(), torch.randn(2, 8)
    gm = s2a_fx.trace(model, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm(x[:1]), model(x[:1]))


def test_the_names_of_numbers_stand_for_nothing_else_where_no_size_is_converted():
    class Asks(nn.Module):
        def forward(self, x):
            asked.append((float, int))
            return x * 2

    asked = []
    s2a_fx.trace(nn.Sequential(nn.Linear(4, 4), Asks()), torch.randn(2, 4))
    assert all(kind is own for kinds in asked for kind, own in zip(kinds, (float, int), strict=True))


class Replaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps = self.steps + 1
        return self.fc(x)


def test_a_refusal_has_the_last_capture_s_for_its_cause():
    with pytest.raises(s2a_fx.TraceError, match="and Dynamo: ") as refusal:
        s2a_fx.trace(Replaces(), torch.randn(2, 8))
    assert isinstance(refusal.value.__cause__, s2a_fx.TraceError)


@pytest.mark.parametrize("recipe", ["bias", "bias+checkpoint", "bias+compress", "s2a", "s2a-max", "s2a-paper", "adapter"])
@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3_qkvb", pytest.param("vit_small_patch16_dinov3", marks=pytest.mark.slow)]
)
def test_recipes_of_dinov3(name, recipe):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, embed_dim=64, num_heads=2, num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    gm = s2a_fx.transform(model, (x,), recipe).train()
    assert s2a_fx.analyze(gm, (x,)).saved_bytes == measure_saved_bytes(gm, (x,))
    gm(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gm.parameters())
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))


def test_visual_prompts_are_refused_where_rotary_positions_are_of_as_many_tokens_as_traced():
    model = timm.create_model("vit_small_patch16_dinov3", depth=2, embed_dim=64, num_heads=2, num_classes=4)
    with pytest.raises(s2a_fx.S2AError, match="was built for its number of tokens"):
        s2a_fx.transform(model, (torch.randn(2, 3, 64, 64),), "vpt")


def test_attributes_are_assigned_to_as_tensors_are():
    class Shifted(nn.Module):
        def forward(self, x):
            turned = x.mT
            turned += 1
            turned -= 1
            return turned + x.mT

    x = torch.rand(3, 4)
    assert torch.equal(s2a_fx.trace(Shifted(), x)(x.clone()), Shifted()(x.clone()))
