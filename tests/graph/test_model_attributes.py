"""What callers read of a model is read of its graph, and its state dict is the model's."""

import copy
import functools
import io
import pickle

import pytest
import timm
import torch
from slow import fast
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import fx, nn

import s2a_fx
from s2a_fx.analysis.peak import KINDS
from s2a_fx.passes import FreezeWeights

X = torch.randn(2, 4)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "cait_xxs24_224": {"depth": 1, "img_size": 64},
    "levit_128s": {},
}


def small(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **TIMM[name])
    side = TIMM[name].get("img_size", model.default_cfg["input_size"][-1] if name.startswith("levit") else 64)
    return model, torch.randn(2, 3, side, side)


def groups(model, **options):
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.05, **options)
    return [(g["weight_decay"], g.get("lr_scale"), sorted(names[id(p)] for p in g["params"])) for g in optimizer.param_groups]


@pytest.mark.parametrize("name", fast(TIMM, next(iter(TIMM))))
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"])
def test_timm_makes_the_model_s_parameter_groups(name, copied):
    model, x = small(name)
    gm = copied(s2a_fx.transform(model, x, "full+compress"))
    assert groups(gm) == groups(model)
    assert groups(gm, layer_decay=0.5) == groups(model, layer_decay=0.5)


def test_position_embeddings_do_not_decay():
    model, x = small("vit_tiny_patch16_224")
    gm = s2a_fx.transform(model, x, "s2a")
    for p in gm.parameters():
        p.requires_grad_(True)
    found = param_groups_weight_decay(gm, 0.05, no_weight_decay_list=gm.no_weight_decay())
    decayed = [p for group in found if group["weight_decay"] for p in group["params"]]
    assert not any(p is gm.pos_embed or p is gm.cls_token for p in decayed)
    assert len(create_optimizer_v2(gm, "adamw", layer_decay=0.5).param_groups) > 2


def test_the_head_is_the_graph_s_own():
    model, x = small("vit_tiny_patch16_224")
    gm = s2a_fx.transform(model, x, "s2a")
    assert gm.get_classifier() is gm.head
    assert copy.deepcopy(gm).get_classifier() is not gm.head


class Described(nn.Module):
    """Attributes of all kinds, and methods that run the model."""

    main_input_name = "x"
    limits = (1, 2)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = {"labels": ["a", "b"]}
        self.layers = [self.layer]
        self.transform = lambda x: x
        self.constant = torch.ones(4)
        self.cache = None

    @property
    def weight_sum(self):
        return self.layer.weight.sum()

    @functools.cached_property
    def width(self):
        return self.layer.in_features

    def features(self, x):
        return self.layer(x)

    def forward(self, x):
        if self.cache is None:
            self.cache = x.shape[-1]
        return self.features(x) * self.constant


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"])
def test_attributes_and_properties_stay(copied):
    model = Described()
    gm = copied(s2a_fx.trace(model, X))
    assert gm.config == model.config and gm.config is not model.config
    assert (gm.main_input_name, gm.limits, gm.width) == ("x", (1, 2), 4)
    assert torch.equal(gm.weight_sum, gm.layer.weight.sum())
    assert gm.cache is None  # as before the capture
    assert not any(hasattr(gm, name) for name in ("layers", "features"))  # they would lead around the graph
    assert hasattr(gm, "transform") == (copied is not pickled)  # a lambda does not pickle


def test_a_class_that_does_not_pickle_is_no_hindrance():
    class Local(Described):
        def no_weight_decay(self):
            return {"layer.weight", *super().__dict__}

    gm = s2a_fx.trace(Local(), X)
    assert "layer.weight" in gm.no_weight_decay() and "layer.weight" in copy.deepcopy(gm).no_weight_decay()
    again = pickled(gm)
    assert torch.equal(again(X), gm(X))
    assert again.config == gm.config and not hasattr(again, "no_weight_decay")


NAMES = sorted(
    {"meta", "graph", "code", "recompile", "print_readable", "forward_", "training_", "_graph", "_code", "add_submodule"}
    | {"shape_env", "to_folder", "_tracer_cls", "_replace_hooks", "_deepcopy_hooks", "_in_spec", "_wrapped_call"}
    | {"s2a_fx_origin", "self_", "x", "_signature", "_result", "_modules_", "lint"}
)


def named(name, part):
    """A model with a part of that name, which its forward calls or adds."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part.clone())
            else:
                setattr(self, name, copy.deepcopy(part))

        def forward(self, x):
            own = getattr(self, name)
            return own(self.first(x)) if isinstance(own, nn.Module) else self.first(x) + own

    return Named()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "part",
    [nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), nn.Parameter(torch.ones(4)), torch.ones(4), 3],
    ids=["layer", "container", "parameter", "buffer", "number"],
)
def test_any_name_that_modules_take(name, part):
    model, x = named(name, part), torch.randn(5, 4)
    gm = s2a_fx.trace(model, x)
    model.eval()
    gm.eval()
    assert isinstance(gm.graph, fx.Graph) and "forward" in gm.code
    assert list(gm.state_dict()) == list(model.state_dict())
    for other in (gm, copy.deepcopy(gm), pickled(gm)):
        assert torch.equal(other(x), model(x))
        other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in gm.parameters():
            p.add_(1)
    twin = copy.deepcopy(model)
    twin.load_state_dict(gm.state_dict())
    assert torch.equal(gm(x), twin(x))
    assert s2a_fx.analyze(gm, x).saved_bytes == s2a_fx.analyze(model, x).saved_bytes


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_a_head_of_such_a_name_trains(name):
    model = named(name, nn.Linear(4, 3))
    gm = s2a_fx.transform(model, torch.randn(5, 4), (FreezeWeights(keep=("head",)),))
    trained = {key for key, value in gm.state_dict(keep_vars=True).items() if value.requires_grad}
    assert trained == {f"{name}.weight", f"{name}.bias"}


class Unread(nn.Module):
    """Parts that the forward does not read, or in train mode alone, and constants."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.aux = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
        self.unread = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7))
        self.token = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.scale = torch.full((4,), 2.0)
        self.shifts = [torch.ones(4)]

    def forward(self, x):
        y = self.layer(x) * self.scale + self.shifts[0] + torch.arange(4.0)
        return (y, self.aux(y)) if self.training else y


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"])
def test_the_state_dict_is_the_model_s(copied):
    model = Unread()
    gm = copied(s2a_fx.trace(model, X))
    assert sorted(gm.state_dict()) == sorted(model.state_dict())
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in model.parameters())
    assert not any(m.training for m in gm.eval().modules())
    assert torch.equal(gm(X), model.eval()(X))
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


def test_parts_that_are_not_read_have_no_optimizer_state():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.unread, self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.other(self.layer(x))

    model = Twice()
    state = 2 * sum(p.numel() * 4 for m in (model.layer, model.other) for p in m.parameters())
    steps = 4 * 4  # each of the four parameters counts its steps in a float32
    peak = s2a_fx.analyze(model, X, optimizer="adamw").peak
    assert peak.bytes_by_kind[KINDS.index("optimizer")] == state + steps
