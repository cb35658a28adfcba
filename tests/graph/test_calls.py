"""One operator is one `Call`, however a model spells it."""

import operator
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.drop import drop_path
from torch import fx, nn

import s2a_fx
from s2a_fx.graph.calls import Call, call_of, canonical, find_calls, operator_of, written_operand
from s2a_fx.graph.training_switch import Difference, TrainingSwitch

aten = torch.ops.aten


class _Root(nn.Module):
    """The parameters that the spellings below read."""

    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self.layer = module if module is not None else nn.Module()


def _call(spelling: Any, *args: Any, module: nn.Module | None = None, **kwargs: Any) -> Call | None:
    """The call of a graph of one node; the strings "x", "y" among the arguments are inputs, "layer.weight" an attribute."""
    graph, root = fx.Graph(), _Root(module)
    nodes: dict[str, fx.Node] = {}

    def node_of(value: Any) -> Any:
        if not isinstance(value, str) or value not in ("x", "y", "n", "weight", "bias", "running_mean", "running_var"):
            return value
        if value not in nodes:
            is_input = value in ("x", "y", "n")
            nodes[value] = graph.placeholder(value) if is_input else graph.get_attr(f"layer.{value}")
            nodes[value].meta["val"] = 2 if value == "n" else torch.empty(2, 8, 6, 6)
        return nodes[value]

    args, kwargs = fx.node.map_aggregate((args, kwargs), node_of)
    if isinstance(spelling, nn.Module):
        root.layer = spelling
        node = graph.call_module("layer", args, kwargs)
    elif isinstance(spelling, str):
        node = graph.call_method(spelling, args, kwargs)
    else:
        node = graph.call_function(spelling, args, kwargs)
    node.meta["val"] = torch.empty(2, 8, 6, 6)
    graph.output(node)
    return call_of(fx.GraphModule(root, graph, "Graph"), node)


def _said(call: Call | None) -> Any:
    """What a call says, its operands as words."""
    assert call is not None

    def word(operand: Any) -> Any:
        if isinstance(operand, tuple):
            return tuple(map(word, operand))
        return str(operand.target) if isinstance(operand, fx.Node) else operand

    operands = {name: word(operand) for name, operand in call.operands.items()}
    return call.operator, operands, dict(call.options), call.draws, call.is_view


def _s(spelling: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return spelling, args, kwargs


_NORM = nn.LayerNorm(6, eps=1e-6)
_BATCH_NORM = nn.BatchNorm2d(8)
_CONVOLUTION = nn.Conv2d(8, 8, 3, padding=1)

SPELLINGS: dict[Any, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    torch.add: [
        _s(operator.add, "x", "y"),
        _s(torch.add, "x", "y"),
        _s(torch.add, input="x", other="y"),
        _s("add", "x", "y"),
        _s("add", "x", other="y"),
        _s(aten.add.Tensor, "x", "y"),
    ],
    torch.mul: [
        _s(operator.mul, "x", 3),
        _s(operator.mul, 3, "x"),
        _s(torch.mul, "x", 3),
        _s(torch.multiply, "x", 3),
        _s("mul", "x", 3),
        _s("multiply", "x", other=3),
        _s(aten.mul.Tensor, "x", 3),
    ],
    torch.div: [_s(operator.truediv, "x", "y"), _s("div", "x", "y"), _s(torch.true_divide, "x", "y")],
    torch.matmul: [
        _s(operator.matmul, "x", "y"),
        _s(torch.matmul, "x", "y"),
        _s(torch.bmm, "x", "y"),
        _s(torch.mm, "x", mat2="y"),
        _s("matmul", "x", "y"),
        _s("bmm", "x", "y"),
        _s(aten.matmul.default, "x", "y"),
    ],
    F.linear: [
        _s(nn.Linear(6, 6), "x"),
        _s(F.linear, "x", "weight", "bias"),
        _s(F.linear, "x", bias="bias", weight="weight"),
        _s(aten.linear.default, "x", "weight", "bias"),
    ],
    F.conv2d: [
        _s(_CONVOLUTION, "x"),
        _s(F.conv2d, "x", "weight", "bias", 1, 1),
        _s(torch.conv2d, "x", "weight", "bias", padding=(1, 1)),
        _s(aten.conv2d.default, "x", "weight", "bias", [1, 1], [1, 1]),
    ],
    F.layer_norm: [
        _s(_NORM, "x"),
        _s(F.layer_norm, "x", (6,), "weight", "bias", 1e-6),
        _s(F.layer_norm, "x", torch.Size([6]), "weight", bias="bias", eps=1e-6),
        _s(torch.layer_norm, "x", (6,), "weight", "bias", 1e-6),
        _s(aten.layer_norm.default, "x", [6], "weight", "bias", 1e-6),
    ],
    F.rms_norm: [_s(F.rms_norm, "x", (6,), "weight", 1e-6), _s(torch.rms_norm, "x", [6], "weight", eps=1e-6)],
    F.group_norm: [
        _s(nn.GroupNorm(2, 8), "x"),
        _s(F.group_norm, "x", 2, "weight", "bias"),
        _s(torch.group_norm, "x", 2, "weight", "bias"),
        _s(aten.group_norm.default, "x", 2, "weight", "bias"),
    ],
    F.batch_norm: [
        _s(_BATCH_NORM, "x"),
        _s(F.batch_norm, "x", "running_mean", "running_var", "weight", "bias", True),
        _s(torch.batch_norm, "x", "weight", "bias", "running_mean", "running_var", True, 0.1, 1e-5, True),
    ],
    F.gelu: [
        _s(nn.GELU("tanh"), "x"),
        _s(timm.layers.GELUTanh(), "x"),
        _s(F.gelu, "x", approximate="tanh"),
        _s(aten.gelu.default, "x", approximate="tanh"),
    ],
    F.silu: [_s(nn.SiLU(), "x"), _s(timm.layers.Swish(), "x"), _s(F.silu, "x"), _s(aten.silu.default, "x")],
    F.relu: [_s(nn.ReLU(), "x"), _s(F.relu, "x"), _s(torch.relu, "x"), _s("relu", "x"), _s(aten.relu.default, "x")],
    torch.sigmoid: [_s(nn.Sigmoid(), "x"), _s(F.sigmoid, "x"), _s("sigmoid", "x"), _s(torch.special.expit, "x")],
    F.leaky_relu: [_s(nn.LeakyReLU(0.2), "x"), _s(F.leaky_relu, "x", 0.2), _s(aten.leaky_relu.default, "x", 0.2)],
    torch.clamp: [_s(torch.clamp, "x", 0, 1), _s("clamp", "x", min=0, max=1), _s("clip", "x", 0, 1)],
    F.softmax: [
        _s(nn.Softmax(-1), "x"),
        _s(F.softmax, "x", -1),
        _s(torch.softmax, "x", dim=-1),
        _s("softmax", "x", -1),
        _s(aten.softmax.int, "x", -1),
        _s(torch.special.softmax, "x", -1),
    ],
    F.scaled_dot_product_attention: [
        _s(F.scaled_dot_product_attention, "x", "x", "y", dropout_p=0.1),
        _s(F.scaled_dot_product_attention, "x", "x", "y", None, 0.1),
        _s(aten.scaled_dot_product_attention.default, "x", "x", "y", None, 0.1),
    ],
    F.dropout: [
        _s(nn.Dropout(0.1), "x"),
        _s(F.dropout, "x", 0.1),
        _s(F.dropout, "x", p=0.1, training=True),
        _s(torch.dropout, "x", 0.1, True),
        _s(aten.dropout.default, "x", 0.1, True),
    ],
    drop_path: [_s(timm.layers.DropPath(0.1), "x"), _s(drop_path, "x", 0.1, True), _s(drop_path, "x", 0.1, training=True)],
    nn.Identity: [_s(nn.Identity(), "x")],
    F.max_pool2d: [
        _s(nn.MaxPool2d(2), "x"),
        _s(F.max_pool2d, "x", 2),
        _s(F.max_pool2d, "x", (2, 2), stride=2),
    ],
    F.adaptive_avg_pool2d: [
        _s(nn.AdaptiveAvgPool2d(1), "x"),
        _s(F.adaptive_avg_pool2d, "x", (1, 1)),
        _s(aten.adaptive_avg_pool2d.default, "x", [1, 1]),
    ],
    F.avg_pool2d: [_s(nn.AvgPool2d(2), "x"), _s(F.avg_pool2d, "x", 2), _s(F.avg_pool2d, "x", (2, 2), (2, 2))],
    torch.mean: [_s(torch.mean, "x", (2, 3)), _s("mean", "x", (2, 3)), _s("mean", "x", axis=(2, 3))],
    torch.cat: [_s(torch.cat, ["x", "y"], 1), _s(torch.concat, ("x", "y"), dim=1), _s(aten.cat.default, ["x", "y"], 1)],
    torch.permute: [_s(torch.permute, "x", (0, 2, 1, 3)), _s("permute", "x", 0, 2, 1, 3), _s("permute", "x", (0, 2, 1, 3))],
    torch.transpose: [_s(torch.transpose, "x", 1, "n"), _s("transpose", "x", 1, 2), _s("swapaxes", "x", axis0=1, axis1=2)],
    torch.reshape: [_s(torch.reshape, "x", (2, -1)), _s("reshape", "x", "n", -1), _s("reshape", "x", ("n", -1))],
    torch.flatten: [_s(nn.Flatten(), "x"), _s(torch.flatten, "x", 1), _s("flatten", "x", 1), _s("flatten", "x", start_dim=1)],
    F.instance_norm: [_s(nn.InstanceNorm2d(8), "x"), _s(F.instance_norm, "x"), _s(F.instance_norm, "x", use_input_stats=True)],
    F.embedding: [_s(nn.Embedding(4, 6), "x"), _s(F.embedding, "x", "weight")],
    F.logsigmoid: [_s(nn.LogSigmoid(), "x"), _s(F.logsigmoid, "x"), _s(aten.log_sigmoid.default, "x")],
    F.softsign: [_s(nn.Softsign(), "x"), _s(F.softsign, "x")],
    F.softshrink: [_s(nn.Softshrink(0.3), "x"), _s(F.softshrink, "x", 0.3), _s(aten.softshrink.default, "x", 0.3)],
    F.hardshrink: [_s(nn.Hardshrink(), "x"), _s(F.hardshrink, "x"), _s("hardshrink", "x", 0.5)],
    F.threshold: [_s(nn.Threshold(0.1, 2.0), "x"), _s(F.threshold, "x", 0.1, 2.0)],
    F.softmin: [_s(nn.Softmin(1), "x"), _s(F.softmin, "x", 1)],
    F.channel_shuffle: [_s(nn.ChannelShuffle(2), "x"), _s(F.channel_shuffle, "x", 2)],
    F.interpolate: [_s(nn.Upsample(scale_factor=2), "x"), _s(F.interpolate, "x", scale_factor=2.0)],
    torch.roll: [_s(torch.roll, "x", (1, 1), (1, 2)), _s("roll", "x", shifts=(1, 1), dims=(1, 2))],
}  # fmt: skip


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda function: getattr(function, "__name__", str(function)))
def test_every_spelling_is_the_same_call(function: Any) -> None:
    modules = [spelling for spelling, _, _ in SPELLINGS[function] if isinstance(spelling, nn.Module)]
    said = [
        _said(_call(spelling, *args, module=modules[0] if modules else _CONVOLUTION, **kwargs))
        for spelling, args, kwargs in SPELLINGS[function]
    ]
    assert said[0][0] is function
    assert all(one == said[0] for one in said)


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda function: getattr(function, "__name__", str(function)))
def test_every_spelling_finds_the_operator(function: Any) -> None:
    for spelling, _, _ in SPELLINGS[function]:
        if not isinstance(spelling, str):
            assert canonical(type(spelling) if isinstance(spelling, nn.Module) else spelling) is function


@pytest.mark.parametrize(
    ("spelling", "args", "kwargs", "written"),
    [
        (operator.iadd, ("x", "y"), {}, "input"),
        (operator.add, ("x", "y"), {}, None),
        ("add_", ("x", "y"), {}, "input"),
        ("mul_", ("x", 2), {}, "input"),
        (aten.silu_.default, ("x",), {}, "input"),
        (torch.relu_, ("x",), {}, "input"),
        (F.relu, ("x",), {"inplace": True}, "input"),
        (F.relu, ("x", True), {}, "input"),
        (F.leaky_relu, ("x", 0.1, True), {}, "input"),
        (F.hardtanh_, ("x",), {}, "input"),
        (nn.ReLU(inplace=True), ("x",), {}, "input"),
        (torch.add, ("x", "y"), {"out": "y"}, "out"),
        (operator.setitem, ("x", 0, "y"), {}, "input"),
        ("copy_", ("x", "y"), {}, "input"),
        ("__init__", ("x",), {}, None),
    ],
)
def test_what_a_call_writes_to(spelling: Any, args: Any, kwargs: Any, written: str | None) -> None:
    call = _call(spelling, *args, **kwargs)
    assert (call.in_place if call is not None else None) == written
    if not isinstance(spelling, nn.Module):
        assert written_operand(spelling, args, kwargs) == written


def test_in_place_forms_are_the_same_operator() -> None:
    for plain, writing in (("add", "add_"), (F.silu, aten.silu_.default), (F.relu, torch.relu_), ("sigmoid", "sigmoid_")):
        args = ("x", "y") if plain == "add" else ("x",)
        assert _said(_call(plain, *args)) == _said(_call(writing, *args))


@pytest.mark.parametrize(
    ("spelling", "args", "draws"),
    [
        (nn.Dropout(0.0), ("x",), False),
        (nn.Dropout(0.5), ("x",), True),
        (timm.layers.DropPath(0.5), ("x",), True),
        (F.dropout, ("x", 0.5, False), False),
        (F.scaled_dot_product_attention, ("x", "x", "x"), False),
        (nn.RReLU(), ("x",), True),
        (torch.rand_like, ("x",), True),
        ("bernoulli_", ("x",), True),
        (aten.bernoulli.p, ("x", 0.5), True),
        (torch.randn_like, ("x",), True),
        (nn.MaxPool2d(2), ("x",), False),
    ],
)
def test_what_draws(spelling: Any, args: Any, draws: bool) -> None:
    call = _call(spelling, *args)
    assert call is not None and call.draws is draws


def test_a_switch_has_the_values_of_both_modes() -> None:
    attention = TrainingSwitch(F.scaled_dot_product_attention, (Difference("dropout_p", 0.1, 0.0),))
    call = _call(attention, "x", "x", "x", dropout_p=0.1)
    assert call is not None and call.operator is F.scaled_dot_product_attention and call.draws
    assert (call.options["dropout_p"], call.eval_options["dropout_p"]) == (0.1, 0.0)
    dropout = _call(TrainingSwitch(F.dropout, (Difference(2, True, False),)), "x", 0.2, True)
    assert dropout is not None and (dropout.options["training"], dropout.eval_options["training"]) == (True, False)


@pytest.mark.parametrize("index", [0, slice(1, None), (slice(None), 0), (Ellipsis, None)])
def test_basic_indices_are_views(index: Any) -> None:
    call = _call(operator.getitem, "x", index)
    assert call is not None and call.is_view


def test_advanced_indices_are_none() -> None:
    call = _call(operator.getitem, "x", (slice(None), [0, 1]))
    assert call is not None and not call.is_view


@pytest.mark.parametrize("spelling", ["detach", "sigmoid"])
def test_what_is_no_view(spelling: str) -> None:
    call = _call(spelling, "x")
    assert call is not None and not call.is_view


def test_subclasses_and_arithmetic_on_sizes_are_no_calls() -> None:
    class Louder(nn.GELU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert _call(Louder(), "x") is None
    graph = fx.Graph()
    n = graph.placeholder("n")
    total = graph.call_function(operator.add, (n, 1))
    n.meta["val"], total.meta["val"] = 2, 3
    graph.output(total)
    assert call_of(fx.GraphModule(nn.Module(), graph), total) is None


class _Norms(nn.Module):
    """Three ways to write the same layer norm, shapes read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(self.norm(x), x.shape[-1:], self.weight)
        x = F.layer_norm(x, self.weight.shape, self.weight)
        return torch.ops.aten.layer_norm.default(x, [8], self.weight)


def test_find_calls_finds_every_spelling_in_a_traced_model() -> None:
    gm = s2a_fx.trace(_Norms(), (torch.randn(2, 4, 8),))
    calls = find_calls(gm, nn.LayerNorm)
    assert [call.path_of("weight") for call in calls] == ["norm.weight", "weight", "weight", "weight"]
    assert {call.options["normalized_shape"] for call in calls} == {(8,)}
    assert find_calls(gm, F.layer_norm) == calls


class _Scoped(nn.Module):
    """A norm under `no_grad`, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


def test_find_calls_finds_what_runs_without_gradients() -> None:
    gm = s2a_fx.trace(_Scoped(), (torch.randn(2, 4, 8),))
    assert [call.path_of("weight") for call in find_calls(gm, F.layer_norm)] == ["first.weight", "second.weight"]


def test_find_calls_finds_functions_that_are_no_operator_of_aten() -> None:
    class Resized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(F.normalize(x), scale_factor=2.0)

    gm = s2a_fx.trace(Resized(), (torch.randn(2, 3, 4, 4),))
    assert find_calls(gm, F.normalize)[0].options["dim"] == 1
    assert find_calls(gm, F.interpolate)[0].options["mode"] == "nearest"


def _user_function(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    "wrong",
    [nn.Sequential, nn.MultiheadAttention, nn.LayerNorm(8), _user_function, "layer_norm", torch.nn.init.normal_, None],
    ids=lambda wrong: getattr(wrong, "__name__", type(wrong).__name__),
)
def test_find_calls_takes_operators_alone(wrong: Any) -> None:
    gm = s2a_fx.trace(_Norms(), (torch.randn(2, 4, 8),))
    with pytest.raises(s2a_fx.InputError, match=r"find_calls: .* is no one operator of torch's; give a function of torch"):
        find_calls(gm, wrong)


def test_the_pass_of_contributing_md_finds_the_norms_of_timm() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "find_calls" in block)
    names: dict[str, Any] = {"__name__": __name__}
    exec(code, names)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    assert not any(isinstance(module, nn.LayerNorm) for module in s2a_fx.trace(model, (x,)).modules())
    gm = s2a_fx.transform(model, (x,), [names["ClampNormInputs"](bound=0.1)]).eval()
    calls = s2a_fx.find_calls(gm, nn.LayerNorm)
    assert [call.operator for call in calls] == [F.layer_norm] * 5
    assert [call_of(gm, call.input).options["max_val"] for call in calls] == [0.1] * 5  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, args: args[0].clamp(-0.1, 0.1))
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize(("spelling", "drawn"), [(torch.rand, True), (torch.zeros, False), (torch.randn, True)])
def test_what_reads_no_tensor_is_a_call(spelling: Any, drawn: bool) -> None:
    call = _call(spelling, (2, 3))
    assert call is not None and call.operator is spelling and not call.operands and call.draws is drawn


def test_a_probability_that_the_graph_computes_may_be_any() -> None:
    call = _call(F.dropout, "x", "y")
    assert call is not None and call.draws


def test_a_class_derived_from_a_layer_is_of_its_operator_and_no_call() -> None:
    class Louder(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2 * super().forward(input)

    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_module(name, (x,)) for name in ("louder", "synced", "pool")]
    graph.output(nodes)
    root = nn.ModuleDict({"louder": Louder(3, 3, 1), "synced": nn.SyncBatchNorm(3), "pool": nn.Sequential()})
    gm = fx.GraphModule(root, graph)
    assert [operator_of(gm, node) for node in nodes] == [F.conv2d, F.batch_norm, None]
    assert [call_of(gm, node) for node in nodes] == [None, None, None]


def test_a_write_by_position_is_no_dead_code() -> None:
    class Rectified(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            F.relu(y, True)
            F.leaky_relu(y, 0.5, True)
            return y

    x = torch.randn(2, 8)
    assert torch.equal(s2a_fx.trace(Rectified(), (x,))(x), Rectified()(x))


def test_every_augmented_assignment_writes() -> None:
    class Assigned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside, y = x > 0, 10 * x
            seen, shown = inside, y
            inside &= x < 1
            y //= 3
            y %= 2
            y **= 2
            return seen + shown

    x = torch.randn(4, 8)
    assert torch.equal(s2a_fx.trace(Assigned(), (x,))(x), Assigned()(x))
