"""Finalized models: what `gm.eval()` computes, in plain operators, which torch.export takes."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from slow import fast
from small_models import SMALL, small_model
from steps import Twice, layers
from timm.layers import DropPath
from timm.layers.drop import drop_path
from torch import nn

import s2a_fx
from s2a_fx.graph.edit import replace_node
from s2a_fx.passes import CompressActivations, FreezeWeights, InsertLoRA, InsertLowRankPrompt, QuantizeNonParametric
from s2a_fx.passes.base import Pass

RECIPES = ["s2a", "s2a-max", "s2a-paper", "lora+compress", "adapter", "vpt", "unipt", "lst", "bias+checkpoint"]
OPTIONS = {
    "convnext": {"ls_init_value": 1.0},
    "swin": {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "vit": {"drop_path_rate": 0.1},
}


def trained_model(family, recipe="s2a"):
    """A rewritten model whose trained parameters and statistics are no longer what they were."""
    model, x = small_model(family, **OPTIONS.get(family, {}))
    gm = s2a_fx.transform(model, x, recipe)
    torch.manual_seed(1)
    with torch.no_grad():
        gm(x)  # moves running statistics
        for p in gm.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return gm.eval(), torch.randn(3, *x.shape[1:])


def assert_plain(module):
    assert not [m for m in module.modules() if type(m).__module__.startswith("s2a_fx")]
    for node in module.graph.nodes:
        assert "s2a_fx" not in str(node.target) + str(getattr(node.target, "__module__", ""))
        assert "dropout" not in str(node.target)


def assert_equal_outputs(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


AT_ONCE = [*(("vit", recipe) for recipe in RECIPES), ("convnext", "vpt"), ("resnet", "lora+compress")]
EXPORTED_AT_ONCE = [("vit", "s2a"), ("resnet", "lora+compress")]


def every_pair(at_once):
    """All families under all recipes, of which those `at_once` are tried always, the others in the slow run."""
    pairs = [(family, recipe) for family in SMALL for recipe in RECIPES]
    return [pytest.param(*pair, marks=() if pair in at_once else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("family", "recipe"), every_pair(AT_ONCE))
def test_it_computes_what_the_rewritten_model_computes_in_eval_mode(family, recipe):
    gm, x = trained_model(family, recipe)
    plain = s2a_fx.finalize(gm)
    with torch.no_grad():
        assert_equal_outputs(plain(x), gm(x))
    assert_plain(plain)
    assert not any(p.requires_grad for p in plain.parameters())
    assert not any(m.training for m in plain.modules())


def exported(plain, x):
    """Saved and loaded again; the batch is dynamic."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(plain, (x[:2],), dynamic_shapes=({0: batch},), strict=False)
    assert not [n for n in program.graph.nodes if "s2a_fx" in str(n.target)]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(("family", "recipe"), every_pair(EXPORTED_AT_ONCE))
def test_an_exported_model_is_saved_loaded_and_run_on_other_batch_sizes(family, recipe):
    gm, x = trained_model(family, recipe)
    program = exported(s2a_fx.finalize(gm), x)
    with torch.no_grad():
        assert_equal_outputs(program(x), gm(x))
        assert_equal_outputs(program(x[:1]), gm(x[:1]))


def test_the_rewritten_model_stays_as_it_is_and_shares_what_is_not_folded():
    gm, x = trained_model("vit")
    gm.train()
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    needed = {name: p.requires_grad for name, p in gm.named_parameters()}
    code = gm.code
    plain = s2a_fx.finalize(gm)
    assert gm.code == code and all(m.training for m in gm.modules())
    assert {name: p.requires_grad for name, p in gm.named_parameters()} == needed
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    own = {p.data_ptr() for p in gm.parameters()}
    folded = {n: t for n, t in [*plain.named_parameters(), *plain.named_buffers()] if t.data_ptr() not in own}
    assert all(name.startswith("constants.") for name in folded) and len(folded) == 3  # a prompt for each block
    plain(x)


@pytest.mark.parametrize("family", fast(SMALL, "vit", "resnet"))
def test_it_runs_under_autocast(family):
    model, x = small_model(family)
    plain = s2a_fx.finalize(s2a_fx.transform(model, x, "s2a"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(plain(x), model.eval()(x), rtol=0, atol=0.05)


def test_prompts_are_one_constant_each():
    gm, _ = trained_model("vit", (FreezeWeights(), InsertLowRankPrompt(rank=2)))
    prompt = gm.get_submodule("blocks.0.low_rank_prompt")
    plain = s2a_fx.finalize(gm)
    constants = [b for name, b in plain.named_buffers() if name.startswith("constants.")]
    assert len(constants) == 3 and torch.equal(constants[0], prompt.A @ prompt.B)


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("ending", ["", "+compress"])
def test_low_rank_matrices_are_merged_into_the_weights(family, ending):
    gm, x = trained_model(family, "lora" + ending)
    original = {p.data_ptr() for p in gm.parameters()}
    plain = s2a_fx.finalize(gm)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert [p for p in plain.parameters() if p.data_ptr() not in original]
    with torch.no_grad():
        assert_equal_outputs(plain(x), gm(x))


def test_a_scaled_low_rank_matrix_is_merged_with_its_scale():
    gm, x = trained_model("vit", (FreezeWeights(keep=("head",)), InsertLoRA(rank=4, alpha=10)))
    plain = s2a_fx.finalize(gm)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    with torch.no_grad():
        assert_equal_outputs(plain(x), gm(x))


def test_a_layer_of_which_one_call_goes_without_keeps_its_weight():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x) + self.layer(2 * x).relu())

    x = torch.randn(2, 8)
    gm = s2a_fx.transform(Shared(), x, (FreezeWeights(keep=("head",)), InsertLoRA(rank=2, targets=("layer",))))
    with torch.no_grad():
        for p in gm.parameters():
            p.add_(torch.randn_like(p))
    last = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == "layer"][1]
    adapted = next(user for user in last.users)
    adapted.replace_all_uses_with(last, delete_user_cb=lambda user: user is not adapted)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    plain = s2a_fx.finalize(gm)
    assert torch.equal(plain.layer.weight, gm.layer.weight)
    torch.testing.assert_close(plain(x), gm(x))


def test_a_module_that_is_called_twice_is_merged_once():
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    model = nn.Sequential(Twice(block), nn.Linear(8, 3))
    x = torch.randn(2, 8)
    gm = s2a_fx.transform(model, x, (FreezeWeights(keep=("head",)), InsertLoRA(rank=2, targets=("0.inner.0",))))
    with torch.no_grad():
        for p in gm.parameters():
            p.add_(torch.randn_like(p))
    plain = s2a_fx.finalize(gm)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(plain(x), gm(x))


def test_dropout_and_drop_path_are_gone():
    gm, _ = trained_model("swin", "adapter")
    assert layers(gm, "DropPath") and layers(gm, "Dropout")
    plain = s2a_fx.finalize(gm)
    assert not layers(plain, "DropPath") and not layers(plain, "Dropout") and not layers(plain, "Identity")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["copy", "pickle"])
@pytest.mark.parametrize("recipe", ["s2a", "lora+compress"])
def test_copies_and_pickles_can_be_finalized(recipe, again):
    gm, x = trained_model("vit", recipe)
    plain = s2a_fx.finalize(again(gm))
    assert_plain(plain)
    with torch.no_grad():
        assert_equal_outputs(plain(x), gm(x))
        assert torch.equal(again(plain)(x), plain(x))


@pytest.mark.slow
def test_the_exported_file_runs_where_s2a_fx_is_not_installed(tmp_path):
    gm, x = trained_model("vit")
    program = torch.export.export(s2a_fx.finalize(gm), (x,), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch; sys.modules['s2a_fx'] = None\n"
        "y = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2])); torch.save(y, sys.argv[3])"
    )
    paths = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, cwd=tmp_path)
    with torch.no_grad():
        assert_equal_outputs(torch.load(tmp_path / "y.pt"), gm(x))


def test_attention_of_every_coded_form_becomes_the_plain_one():
    for compress in (CompressActivations(attention_plan="map"), QuantizeNonParametric()):
        gm, x = trained_model("vit", (FreezeWeights(), compress))
        plain = s2a_fx.finalize(gm)
        assert_plain(plain)
        assert F.scaled_dot_product_attention in {n.target for n in plain.graph.nodes}
        with torch.no_grad():
            assert_equal_outputs(plain(x), gm(x))


class Tripled(nn.Module):
    """A module of a user's own pass."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return x * self.scale if self.training else self.inference_form(x)

    def inference_form(self, x):
        return x * self.scale.square().sqrt()


def test_a_module_of_one_s_own_says_what_it_is_at_inference(vit):
    class Triple(Pass):
        def rewrite(self, gm):
            node = next(n for n in gm.graph.nodes if n.target == "head_drop")
            return bool(replace_node(gm, node, Tripled(), node.args))

    model, x = vit
    gm = s2a_fx.transform(model, x, (Triple(),)).eval()
    plain = s2a_fx.finalize(gm)
    assert layers(gm, "Tripled") and not layers(plain, "Tripled")
    with torch.no_grad():
        assert_equal_outputs(plain(x), gm(x))


def test_what_is_no_graph_is_refused(vit):
    with pytest.raises(s2a_fx.InputError, match="transform"):
        s2a_fx.finalize(vit[0])


class Attention(nn.Module):
    def forward(self, x):
        x = x[:, None, None]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)[:, 0, 0]


class Branches(nn.Module):
    """A model that torch.fx cannot follow, and Dynamo can."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x if x.shape[1:].numel() > 3 and len(x.shape) == 2 and not torch.is_complex(x) else -x))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), DropPath(0.5), nn.BatchNorm1d(4), Attention()], ids=lambda m: type(m).__name__)
def test_a_model_that_dynamo_captured_is_finalized(layer):
    model, x = Branches(layer), torch.randn(3, 4)
    gm = s2a_fx.transform(model, x, "full")
    assert_equal_outputs(s2a_fx.finalize(gm)(x), model.eval()(x))


class Counting(nn.Module):
    """Counts its calls in a statement."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x) + self.calls


@pytest.mark.parametrize("export", [False, True])
def test_what_writes_to_a_buffer_is_not_run_and_stays(export):
    model, x = Counting(), torch.randn(2, 4)
    gm = torch.export.export(model, (x,)).module() if export else s2a_fx.transform(model, x, ())
    plain = s2a_fx.finalize(gm)
    assert gm.calls == 0
    first, second = plain(x), plain(x)
    torch.testing.assert_close(second - first, torch.ones(2, 3))


class Halving(nn.Dropout):
    """No mere dropout."""

    def forward(self, x):
        return super().forward(x) if self.training else x / 2


def test_a_class_derived_from_dropout_stays():
    model, x = nn.Sequential(nn.Linear(4, 3), Halving(0.1)), torch.randn(2, 4)
    gm = s2a_fx.transform(model, x, "full").eval()
    assert_equal_outputs(s2a_fx.finalize(gm)(x), gm(x))


def test_hooks_are_not_left_out_in_silence():
    gm, _ = trained_model("vit", "s2a")
    layers(gm, "RecomputedBranch")[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(s2a_fx.InputError, match="has hooks"):
        s2a_fx.finalize(gm)


def _small_windows():
    return torchvision.models.SwinTransformer([4, 4], 32, [1, 2], [2, 4], [4, 4], num_classes=4, dropout=0.1, attention_dropout=0.1)


WINDOWED = {
    "swin_t": lambda: torchvision.models.swin_t(weights=None, num_classes=4),
    "swin_v2_t": lambda: torchvision.models.swin_v2_t(weights=None, num_classes=4),
    "small": _small_windows,
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bias", "s2a"])
@pytest.mark.parametrize("name", WINDOWED)
def test_torchvision_s_windowed_models(name, recipe):
    torch.manual_seed(0)
    gm = s2a_fx.transform(WINDOWED[name](), (torch.randn(2, 3, 64, 64),), recipe).eval()
    finalized = s2a_fx.finalize(gm)
    for images in (2, 3):
        x = torch.randn(images, 3, 64, 64)
        torch.testing.assert_close(finalized(x), gm(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", fast(["vit", "swin", "convnext"], "vit"))
def test_a_finalized_model_is_compressed_again(family):
    model, x = small_model(family)
    plain = s2a_fx.finalize(s2a_fx.transform(model, x, "bias+compress"))
    again = s2a_fx.transform(plain, x, "bias+compress").eval()
    assert_equal_outputs(again(x), plain(x))


@pytest.mark.parametrize(
    ("dropout", "is_idle"),
    [
        (lambda x, training: F.dropout(x, 0.5, training), True),
        (lambda x, training: F.dropout(x, p=0.5, training=training, inplace=True), True),
        (lambda x, training: drop_path(x, 0.5, training), True),
        (lambda x, training: torch.dropout(x, 0.5, training), True),
        (lambda x, training: F.dropout(x, 0.5), False),
    ],
)
def test_what_drops_nothing_in_eval_mode_is_left_out_however_it_is_spelled(dropout, is_idle):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(dropout(2 * x, self.training))

    model, x = Dropped(), torch.randn(4, 8)
    plain = s2a_fx.finalize(s2a_fx.transform(model, x, []))
    assert (len(s2a_fx.find_calls(plain, drop_path)) + len(s2a_fx.find_calls(plain, F.dropout)) == 0) is is_idle
