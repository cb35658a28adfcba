"""Dynamo's capture: the graph computes, keeps and trains what the model does, in each mode, as do its copies."""

import collections
import contextvars
import copy
import dataclasses
import functools
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from slow import fast
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from s2a_fx.errors import TraceError
from s2a_fx.graph.capture import share_weights, trace
from s2a_fx.graph.dynamo_capture import capture_by_dynamo
from s2a_fx.graph.flow import eliminate_dead_code
from s2a_fx.graph.inputs import Inputs, Signature, Structure
from s2a_fx.graph.regions import SCOPES
from s2a_fx.graph.scopes import close_scopes
from s2a_fx.graph.traced_module import TracedModule

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2])


class Model(nn.Module):
    """Two layers, a batch norm and a counter; `function` is its forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.mean = nn.Buffer(torch.zeros(8))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def flat_capture(model, inputs):
    """The graph module of a flat captured graph, its scopes closed, with the structure of the result and the inputs."""
    own = share_weights(model)
    signature, leaves = Signature.of(own, inputs)
    captured = capture_by_dynamo(own, signature, leaves)
    gm = TracedModule(own, captured.graph, "Captured")
    close_scopes(gm)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, captured.structure, signature, leaves


def fresh(leaves):
    return [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]


def step(module, run):
    """The leaves of the result, the gradients and the buffers of one seeded step."""
    torch.manual_seed(0)
    results = Structure.of(run())[0]
    losses = [r.float().square().sum() for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
    if losses:
        sum(losses).backward()
    return results, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, dict(module.named_buffers())


def assert_equal(expected, found, tolerance=0.0):
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        else:
            assert type(a) is type(b)
            assert a == b


def check(model, inputs, eval_tolerance=0.0, batch=True, pickles=True):
    """Both modes: results, gradients and buffers of the graph and its copies are the model's; so is another batch size."""
    if not isinstance(inputs, Inputs):
        inputs = Inputs(inputs)
    for training in (True, False):
        model = copy.deepcopy(model).train(training)
        gm, structure, signature, leaves = flat_capture(model, inputs)
        tolerance = 0.0 if training else eval_tolerance
        copies = [copy.deepcopy(gm), copy.deepcopy(gm)]
        if pickles:
            copies[1] = pickle.loads(pickle.dumps(gm))
        sizes = [leaves, [torch.cat([t, t[:1]]) if t.ndim else t for t in leaves]] if batch else [leaves]
        for graph, size in zip(copies, reversed(sizes * 2), strict=False):
            plain = copy.deepcopy(model)
            args, kwargs = signature.arguments(fresh(size))
            size = fresh(size)
            expected = step(plain, functools.partial(plain, *args, **kwargs))
            found = step(graph, functools.partial(_call, graph, structure, size))
            assert_equal(expected[0], found[0], tolerance)
            assert set(expected[1]) == set(found[1])
            assert_equal(expected[1].values(), [found[1][name] for name in expected[1]], tolerance)
            names = expected[2].keys() & found[2].keys()
            assert_equal([expected[2][name] for name in names], [found[2][name] for name in names])
    return gm


def _call(gm, structure, leaves):
    return structure.build(gm(*leaves))


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_module"]


# Hugging Face


def hugging_face(name, **options):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
        "patch_size": 16, "num_labels": 4,
    }  # fmt: skip
    configs = {
        "ViT": small,
        "Dinov2": {**small, "drop_path_rate": 0.2},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4},
        "Segformer": {
            "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 16,
            "num_labels": 4,
        },
        "CLIP": {
            "vision_config": {key: value for key, value in small.items() if key != "num_labels"},
            "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
            "num_labels": 4,
        },
        "Siglip": {"vision_config": {key: value for key, value in small.items() if key != "num_labels"}, "num_labels": 4},
        "MobileViT": {
            "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32], "image_size": 32, "num_labels": 4,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**configs[name], **options})
    return getattr(transformers, f"{name}ForImageClassification")(config)


@pytest.mark.parametrize(
    "name",
    [
        "ViT",
        "Dinov2",
        "ResNet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("CLIP", "Segformer", "Siglip", "MobileViT")),
    ],
)
def test_hugging_face_by_keyword_with_its_loss(name):
    check(hugging_face(name), Inputs(pixel_values=IMAGES, labels=LABELS))


@pytest.mark.parametrize("arguments", [{}, {"return_dict": False}, {"output_hidden_states": True}])
def test_hugging_face_answers_in_the_form_that_is_asked_for(arguments):
    check(hugging_face("ViT"), Inputs(pixel_values=IMAGES, **arguments))


@pytest.mark.parametrize("use_reentrant", fast([True, False], True))
def test_hugging_face_checkpoints(use_reentrant):
    model = hugging_face("ViT", hidden_dropout_prob=0.2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    gm = flat_capture(model.train(), Inputs(pixel_values=IMAGES, labels=LABELS))[0]
    assert [target for target in targets(gm) if "checkpoint" in target] == ["vit.layers.0.checkpoint", "vit.layers.1.checkpoint"]
    check(model, Inputs(pixel_values=IMAGES.clone().requires_grad_(), labels=LABELS))


def test_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(hugging_face("ViT"), peft.LoraConfig(target_modules=["query", "q_proj"], r=2, lora_dropout=0.1))
    check(model, Inputs(pixel_values=IMAGES, labels=LABELS))


# torch's transformers


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_transformer_encoder_layer(options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    gm = check(nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)), TOKENS, eval_tolerance=1e-5)
    assert "0.layers.1.linear2" in targets(gm)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=need_weights)

    check(Attention(), TOKENS, eval_tolerance=1e-5)


class Tower(nn.Module):
    """An open_clip-like pair of towers: attention over sequences first, a mask of its own, normalized features, a scale."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn = nn.MultiheadAttention(8, 2)
            layers = {"c_fc": nn.Linear(8, 16), "gelu": nn.GELU(), "c_proj": nn.Linear(16, 8)}
            self.mlp = nn.Sequential(collections.OrderedDict(layers))

        def forward(self, x, mask=None):
            h = self.ln_1(x)
            x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    def __init__(self):
        super().__init__()
        self.patches, self.words = nn.Conv2d(3, 8, 16, 16), nn.Embedding(10, 8)
        self.vision, self.text = self.Block(), self.Block()
        self.mask = nn.Buffer(torch.full((5, 5), float("-inf")).triu(1), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image=None, text=None):
        tokens = self.patches(image).flatten(2).permute(2, 0, 1)
        pooled = F.normalize(self.vision(tokens).mean(0), dim=-1)
        if text is None:
            return {"image_features": pooled, "logits": None}
        words = self.text(self.words(text).transpose(0, 1), self.mask).transpose(0, 1)
        ends = words[torch.arange(words.shape[0]), text.argmax(-1)]
        return {"image_features": pooled, "logits": self.logit_scale.exp() * pooled @ F.normalize(ends, dim=-1).T}


@pytest.mark.parametrize("text", [None, torch.tensor([[1, 2, 9, 0, 0], [3, 9, 0, 0, 0], [4, 5, 6, 7, 9]])])
def test_open_clip_tower(text):
    check(Tower(), Inputs(IMAGES, text), eval_tolerance=1e-5)


# Contexts


def under_no_grad(self, x):
    with torch.no_grad():
        y = self.a(x)
        with torch.enable_grad():
            z = self.b(x)
        y = y + self.a(z)
    return self.b(y) + z


def under_inference_mode(self, x):
    with torch.inference_mode():
        y = self.a(x)
    return self.b(x) + y.clone()


def under_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            z = self.b(y.float())
        return self.a(z).float()


@pytest.mark.parametrize("function", [under_no_grad, under_inference_mode, under_autocast])
def test_contexts_are_scopes(function):
    check(Model(function), X)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}, {"preserve_rng_state": False}])
def test_checkpoints_are_scopes_with_their_options(options):
    options = {"use_reentrant": False, **options}

    def function(self, x):
        y, z = checkpoint(lambda v: (F.gelu(self.norm(self.a(v))), v * 2), x, **options)
        return self.b(F.dropout(y, 0.5, self.training)) + z

    check(Model(function), X.clone().requires_grad_())
    own = share_weights(Model(function))
    signature, leaves = Signature.of(own, X)
    nodes = capture_by_dynamo(own, signature, leaves).graph.nodes
    scopes = {scope for node in nodes for scope in node.meta.get(SCOPES, ())}
    assert [dict(scope.options) for scope in scopes] == [options]


_SELECTIVE = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])


def test_nested_and_selective_checkpoints():
    def function(self, x):
        def inner(v):
            with torch.no_grad():
                w = self.a(v)
            return checkpoint(self.b, v + w, use_reentrant=False, context_fn=_SELECTIVE)

        return checkpoint(inner, x, use_reentrant=False)

    check(Model(function), X)


# Draws and writes


def test_draws_stay_nodes():
    def function(self, x):
        noise = torch.randn(8) + torch.rand_like(x) + torch.empty_like(x).bernoulli_(0.5) + torch.randn(x.shape[0], 8)
        return self.a(x)[:, torch.randperm(8)] + noise * torch.bernoulli(torch.full_like(x, 0.3)) + F.dropout(x, 0.3, self.training)

    check(Model(function), X)


def add_to_buffer(self, x):
    self.mean.mul_(0.5).add_(x.detach().mean(0))
    return self.a(x) + self.mean


def copy_to_buffer(self, x):
    with torch.no_grad():
        self.mean.copy_(self.mean * 0.9 + x.mean(0) * 0.1)
    return self.a(x) * self.mean


def set_item_of_buffer(self, x):
    self.mean[0] = x.detach().mean()
    return self.a(x) * self.mean


def write_to_values(self, x):
    y = self.a(x)
    y.mul_(2)
    y += 1
    y[:, 0] = 0
    y[:, 2:4].add_(1)
    return y


@pytest.mark.parametrize("function", [add_to_buffer, copy_to_buffer, set_item_of_buffer, write_to_values])
def test_writes_in_place_stay(function):
    check(Model(function), X)


def test_a_buffer_that_the_model_replaces_is_refused():
    def function(self, x):
        if x.is_cuda:  # not for torch.fx
            raise ValueError
        self.mean = self.mean * 0.9 + x.detach().mean(0)
        return self.a(x) * self.mean

    with pytest.raises(TraceError, match="mean"):
        trace(Model(function), X)


# Layers


def test_two_calls_of_a_layer_in_a_row_are_two_calls():
    gm = check(Model(lambda self, x: F.linear(self.a(self.a(x)), self.a.weight)), X)
    assert targets(gm) == ["a", "a"]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.3)), IMAGES),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.InstanceNorm2d(4, track_running_stats=True), nn.AlphaDropout(0.2)), IMAGES),
        (Model(lambda self, x: self.norm(F.layer_norm(x, (8,))) + F.gelu(self.a(x))), X),
        (nn.LSTM(8, 8, batch_first=True), TOKENS),
        (nn.Sequential(nn.Threshold(0.1, 2), nn.RReLU(), nn.RMSNorm(8), nn.PReLU()), X),
    ],
)
def test_layers_are_called_as_they_are(model, inputs):
    check(nn.Sequential(model), inputs)


def test_parametrized_layers_are_called_as_they_are():
    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = Model(lambda self, x: self.b(F.relu(self.a(x))))
        parametrize(model.a)
        gm = check(model, X, pickles=False)  # torch does not pickle them
        assert targets(gm) == ["a", "b"]


def double(module, inputs, result):
    return result * 2


def add_one(module, inputs):
    return (inputs[0] + 1,)


def test_forward_hooks_run_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    for module in (model, model[0], model[1], model[1][1]):
        module.register_forward_hook(double)
        module.register_forward_pre_hook(add_one)
    check(model, X)


class Shifted(torch.autograd.Function):
    """Its backward is not the derivative: a graph that differentiated its forward would be found out."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * factor, x + 1

    @staticmethod
    def backward(ctx, grad, other):
        return grad * ctx.factor * 3 + other + ctx.saved_tensors[0], None


def test_autograd_functions_stay_their_authors():
    gm = check(Model(lambda self, x: sum(Shifted.apply(self.a(Shifted.apply(x, 2.0)[0]), 3.0))), X)
    assert targets(gm) == ["shifted", "a", "shifted"]


def test_provenance_is_in_plain_paths_whatever_the_model_calls_itself():
    class Odd(nn.Module):
        def __init__(me):
            super().__init__()
            me.stages = nn.ModuleDict({"first stage": nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU()))})

        def forward(me, x):
            return me.stages["first stage"](x) + 1

    own = share_weights(Odd())
    signature, leaves = Signature.of(own, X)
    graph = capture_by_dynamo(own, signature, leaves).graph
    stacks = {node.target: node.meta["nn_module_stack"] for node in graph.find_nodes(op="call_module")}
    assert list(stacks["stages.first stage.1.0"]) == ["stages.first stage", "stages.first stage.1", "stages.first stage.1.0"]
    assert stacks["stages.first stage.0"]["stages.first stage"] == ("stages.first stage", nn.Sequential)


# Inputs and results


@dataclasses.dataclass
class Answer:
    features: torch.Tensor
    loss: torch.Tensor | None = None
    count: int = 3


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda self, d, scale, o=None: {"y": self.a(d["x"]) * scale + d["l"][0], "n": None, "k": 3, "s": "s"},
         Inputs({"x": X, "l": [X, None]}, scale=3.0, o=None)),
        (lambda self, x, *, n=2, flag=False: self.a(x).view(x.shape[0], n, -1) if flag else x, Inputs(X, n=4, flag=True)),
        (lambda self, x, y, z: self.a(y), Inputs(X, X + 1, X)),
        (lambda self, x, y: self.a(x) * y, Inputs(X, X)),
        (lambda self, x, y: self.a(x) * y, Inputs(X, torch.tensor(2.0))),
        (lambda self, x: (x, self.a(x), self.a.weight, self.mean), Inputs(X)),
        (lambda self, x: Answer(self.a(x)), Inputs(X)),
        (lambda self, x: Pair(self.a(x), collections.OrderedDict(z=x * 2)), Inputs(X)),
        (lambda self, x: [y := self.a(x), y, {"again": y}], Inputs(X)),
        (lambda self, x: (self.a(x), x.shape[0], x.shape[1]), Inputs(X)),
    ],
)  # fmt: skip
def test_inputs_and_results_are_pytrees(function, inputs):
    check(Model(function), inputs)


def test_the_batch_stays_symbolic():
    gm = check(Model(lambda self, x: self.a(x).reshape(x.shape[0] * 2, -1).mean(0) / x.size(0) + x.shape[0] ** 0.5), X)
    assert gm.graph.find_nodes(op="call_method", target="size")


def test_a_model_that_fixes_its_batch_is_captured_for_it():
    check(Model(lambda self, x: self.a(x).reshape(4, 8) + (1 if x.shape[0] == 4 else 2)), X, batch=False)


def test_a_model_that_asks_is_not_compiled():
    gm = check(Model(lambda self, x: self.b(x) if torch.compiler.is_compiling() else self.a(x)), X)
    assert targets(gm) == ["a"]
    assert torch.compile(lambda x: x * 2 if torch.compiler.is_compiling() else x, backend="eager")(X).equal(X * 2)


_ACTIVE = contextvars.ContextVar("active", default=0)


def is_compiling():
    return torch.compiler.is_compiling()


def set_unless_compiled(x):
    """Dynamo cannot follow ContextVar.set."""
    if not is_compiling():
        _ACTIVE.reset(_ACTIVE.set(1))
    return x


def twice(x):
    return set_unless_compiled(set_unless_compiled(x))


def set_in_a_helper(x):
    return x if torch.compiler.is_dynamo_compiling() else _set(x)


def _set(x):
    _ACTIVE.reset(_ACTIVE.set(1))
    return x


@pytest.mark.parametrize("step", [set_unless_compiled, twice, set_in_a_helper, lambda x: set_in_a_helper(twice(x))])
@pytest.mark.parametrize("ask", [is_compiling, torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling])
def test_a_model_takes_the_way_for_compilers_only_where_dynamo_needs_it(step, ask):
    gm = check(Model(lambda self, x: self.b(step(x)) if ask() else self.a(step(x))), X)
    assert targets(gm) == ["a"]


_GLOBAL = torch.arange(8.0)


def test_tensors_that_are_no_parameters_or_buffers_are_constants():
    model = Model(lambda self, x: self.a(x) + self.plain * self.listed[0] + _GLOBAL + torch.tensor([1.0] * 8))
    model.plain, model.listed = torch.randn(8), [torch.randn(8)]
    check(model, X)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_weights_without_values(device):
    model, x = Model(under_no_grad), X
    if device == "meta":
        model, x = model.to("meta"), X.to("meta")
    else:
        with FakeTensorMode():
            model, x = Model(under_no_grad), torch.randn(4, 8)
    gm = flat_capture(model, x)[0]
    assert {name for name, _ in gm.named_parameters()} == {"a.weight", "a.bias", "b.weight", "b.bias"}


# Refusals


def branch(x):
    return x if x.sum() > 0 else -x


def read(x):
    return x * x.sum().item()


def show(x):
    print("seen")
    return x


def hook(x):
    y = x * 2
    y.register_hook(lambda grad: grad * 2)
    return y


def choose_kernel(x):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(x[None], x[None], x[None])


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [branch, read, show])
def test_what_cannot_be_followed_is_refused_with_module_and_line(function):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), Calls(function)))
    line = function.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"1\.1 \(Calls\), line {line} of .*test_dynamo_capture\.py"):
        flat_capture(model, X)


@pytest.mark.parametrize("function", [hook, choose_kernel])
def test_what_a_graph_has_no_node_for_is_refused(function):
    with pytest.raises(TraceError, match="for which a graph has no node"):
        flat_capture(nn.Sequential(nn.Linear(8, 8), Calls(function)), X)


def test_a_parameter_that_no_module_registers_is_refused():
    model = Model(lambda self, x: self.a(x) + self.listed[0](x))
    model.listed = [nn.Linear(8, 8)]
    with pytest.raises(TraceError, match="is no parameter of the model"):
        flat_capture(model, X)


# Both modes, held to the model


@pytest.mark.parametrize("name", fast(["ViT", "Siglip", "Dinov2", "Segformer"], "ViT"))
@pytest.mark.parametrize("checkpoints", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hugging_face_is_traced_faithfully(name, checkpoints):
    model = hugging_face(name)
    if checkpoints:
        model.gradient_checkpointing_enable()
    gm = trace(model, {"pixel_values": IMAGES, "labels": LABELS})
    for training in (True, False):
        expected = step(model, functools.partial(model.train(training), pixel_values=IMAGES, labels=LABELS))[0]
        found = step(gm, functools.partial(gm.train(training), pixel_values=IMAGES, labels=LABELS))[0]
        assert_equal(expected, found)


def test_hugging_face_dinov3_whose_positions_are_cached():
    transformers = pytest.importorskip("transformers")
    model = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16,
        )
    )  # fmt: skip
    gm = trace(model, {"pixel_values": IMAGES})
    for training in (True, False):
        expected = step(model, functools.partial(model.train(training), pixel_values=IMAGES))[0]
        found = step(gm, functools.partial(gm.train(training), pixel_values=IMAGES))[0]
        assert_equal(expected, found)


def test_dead_code_that_keeps_its_own_output_is_no_difference():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = attention, nn.Linear(8, 3)

        def forward(self, x):
            self.attention(x[:, :1], x, x)
            return self.head(x)

    assert "attention" not in "".join(map(str, targets(trace(Pooled(), TOKENS))))


def test_dead_code_and_questions_about_devices_are_no_difference():
    def function(self, x):
        if x.is_cuda:  # not for torch.fx
            raise ValueError
        self.b(x)[:, 0].sum()
        return self.a(x + torch.arange(8, device=x.device))

    gm = trace(Model(function), X)
    assert targets(gm) == ["a"]


# The process


@pytest.mark.slow
def test_torch_compile_does_not_notice_a_hundred_captures():
    compiled = []

    def backend(gm, inputs):
        compiled.append(gm)
        return gm.forward

    def scale(self, x, n=1.0):
        return self.a(x) * n

    model = Model(scale)
    functions = [torch.compile(model, backend=backend), torch.compile(lambda x: x * 2 + 1, backend=backend)]
    for function in functions:
        function(X)
    counters = copy.deepcopy(torch._dynamo.utils.counters)
    options, state, names = torch._dynamo.config.get_config_copy(), torch.get_rng_state(), set(globals())
    flat_capture(model, Inputs(X, n=2.0))
    sources = len(fx.graph_module._loader.eval_cache)
    for n in range(100):
        flat_capture(model, Inputs(X[: 2 + n % 2], n=float(n)))
    gc.collect()
    assert len(fx.graph_module._loader.eval_cache) <= sources
    assert not [o for o in gc.get_objects() if type(o).__name__ == "OutputGraph"]
    assert set(globals()) == names
    assert (torch._dynamo.utils.counters, torch._dynamo.config.get_config_copy()) == (counters, options)
    assert torch.equal(torch.get_rng_state(), state)
    for function in functions:
        function(X)
    assert len(compiled) == 2
    functions[0](X, n=2.0)
    functions[0](X[:3], n=2.0)
    assert len(compiled) == 4, "the first other size is what it would have been without captures"


def test_captures_in_threads_beside_training_and_compilation():
    errors = []

    def guarded(run):
        try:
            run()
        except Exception as error:
            errors.append(error)

    def capture():
        for _ in range(5):
            flat_capture(Model(under_no_grad), X)

    def train():
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        compiled = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
        for _ in range(100):
            model(X).sum().backward()
            compiled(X)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in (capture, capture, capture, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
