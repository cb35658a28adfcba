"""The passes: what they rewrite, what they leave alone and why, and what they refuse."""

from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.metadata import notes_of
from s2a_fx.passes import AttachSideBranch, FreezeWeights, InsertLowRankPrompt, QuantizeNonParametric
from s2a_fx.passes.base import Pass
from s2a_fx.zoo import timm_model


def trained(gm):
    return {name for name, p in gm.named_parameters() if p.requires_grad}


def test_freeze_keeps_biases_and_head(vit):
    names = trained(FreezeWeights()(s2a_fx.trace(*vit)).graph_module)
    assert {"head.weight", "head.bias", "blocks.0.attn.qkv.bias", "norm.bias"} <= names
    assert all(n.endswith("bias") for n in names - {"head.weight"})


def test_freeze_keeps_what_a_pattern_names(vit):
    assert trained(FreezeWeights(keep=("blocks.2.mlp.*",))(s2a_fx.trace(*vit)).graph_module) == {
        f"blocks.2.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }


def test_freeze_refuses_a_pattern_that_names_nothing(vit):
    with pytest.raises(s2a_fx.PassError, match=r"no parameter matches 'block\.\*'"):
        FreezeWeights(keep=("block.*",))(s2a_fx.trace(*vit))


def test_freeze_refuses_a_model_without_head():
    model, x = small_model("vit", num_classes=0)
    with pytest.raises(s2a_fx.PassError, match="no classification head"):
        s2a_fx.transform(model, x, "linear")


@pytest.mark.parametrize(("family_name", "shapes"), [
    ("vit", {(17, 4)}),
    ("swin", {(196, 4), (49, 4), (16, 4), (4, 4)}),
    ("convnext", {(256, 4), (64, 4), (16, 4), (4, 4)}),
])  # fmt: skip
def test_prompt_stands_before_each_block_with_a_row_for_each_position(family_name, shapes):
    model, x = small_model(family_name)
    gm = s2a_fx.transform(model, x, (InsertLowRankPrompt(rank=4),))
    assert {tuple(p.shape) for n, p in gm.named_parameters() if n.endswith("low_rank_prompt.A")} == shapes


def test_prompt_keeps_nothing(vit):
    before = s2a_fx.analyze(s2a_fx.transform(*vit, "bias"), vit[1]).saved_bytes
    assert s2a_fx.analyze(s2a_fx.transform(*vit, "bias+lrp"), vit[1]).saved_bytes == before


def test_prompt_goes_where_a_predicate_says(vit):
    where = InsertLowRankPrompt(rank=2, where=lambda node: node.op == "call_module" and str(node.target).endswith("attn.proj"))
    gm = s2a_fx.transform(*vit, (where,))
    assert "blocks.1.attn.low_rank_prompt.A" in dict(gm.named_parameters())


def test_prompt_refuses_another_resolution():
    model, x = small_model("vit", dynamic_img_size=True)
    gm = s2a_fx.transform(model, x, "bias+lrp")
    with pytest.raises(s2a_fx.ShapeError, match=r"blocks\.0: prompt was built for 17 tokens, got 26; call transform\(\)"):
        gm(torch.randn(2, 3, 80, 80))


def test_prompt_says_when_there_is_no_block():
    model = timm.create_model("vgg11", num_classes=5)
    with pytest.raises(s2a_fx.PassError, match="no residual block"):
        s2a_fx.transform(model, torch.randn(1, 3, 64, 64), "bias+lrp")


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_rank_must_be_a_positive_integer(rank):
    with pytest.raises(s2a_fx.InputError, match="rank must be a positive integer"):
        InsertLowRankPrompt(rank=rank)


def test_side_branch_reads_every_block_and_widens_the_head(family):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, (AttachSideBranch(reduction=8),))
    pools = [m for m in gm.modules() if type(m).__name__ == "ChannelAveragePool"]
    blocks = {"vit": 3, "swin": 5, "convnext": 5, "resnet": 8}[family]
    assert len(pools) == blocks
    head = next(m for n, m in gm.named_modules() if n in ("head", "head.fc", "fc") and isinstance(m, nn.Linear))
    old = model.get_classifier()
    assert head.in_features == old.in_features + old.in_features // 8
    assert torch.equal(head.weight[:, : old.in_features], old.weight)


def test_side_branch_crosses_stages_by_2x2_convolutions():
    model, x = small_model("convnext")
    gm = s2a_fx.transform(model, x, (AttachSideBranch(),))
    kernels = [m.kernel_size for n, m in gm.named_modules() if n.endswith("transition.conv")]
    assert kernels == [(2, 2)] * 3


def test_reduction_must_divide_the_channels(vit):
    with pytest.raises(s2a_fx.InputError, match="192 channels, which reduction=7 does not divide"):
        s2a_fx.transform(*vit, (AttachSideBranch(reduction=7),))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_quantized_once(fused):
    model, x = small_model("vit")
    for block in model.blocks:
        block.attn.fused_attn = fused
    gm = s2a_fx.transform(model, x, (QuantizeNonParametric(),))
    kinds = [type(m).__name__ for m in gm.modules() if type(m).__name__.startswith("Quantized")]
    attention = "QuantizedAttention" if fused else "QuantizedSoftmaxMatmul"
    assert sorted(kinds) == sorted(["QuantizedGELU", attention] * 3)
    codes = [r for r in s2a_fx.analyze(gm, x).activations if r.operand in ("attention.codes", "softmax_matmul.codes")]
    assert [r.bytes for r in codes] == [-(-2 * 3 * 17 * 17 // 2)] * 3


def test_attention_dropout_switches_with_the_mode():
    for fused in (True, False):
        model, x = small_model("vit", attn_drop_rate=0.5)
        for block in model.blocks:
            block.attn.fused_attn = fused
        gm = s2a_fx.transform(model, x, (QuantizeNonParametric(),))
        torch.manual_seed(2)
        expected = model(x)
        torch.manual_seed(2)
        torch.testing.assert_close(gm(x), expected, rtol=0, atol=0)
        gm.eval()
        assert torch.equal(gm(x), gm(x))


def test_relu_before_a_convolution_is_left_alone_with_a_reason():
    model, x = small_model("resnet")
    gm = s2a_fx.transform(model, x, (QuantizeNonParametric(),))
    reasons = {n.node: n.reason for n in notes_of(gm)}
    assert reasons["layer1_0_act1"] == "layer1_0_conv2:ConvolutionBackward0.input keeps the same tensor anyway"


def test_layers_that_keep_nothing_are_left_alone(vit):
    gm = s2a_fx.transform(*vit, (FreezeWeights(keep=("head",)), QuantizeNonParametric()))
    assert all(n.reason == "keeps nothing: no gradient flows through it" for n in notes_of(gm))
    assert len(notes_of(gm)) == 6


class SizedBlock(nn.Module):
    """x + f(x), and the size of the feature map inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.inner(x)
        return x + F.interpolate(self.outer(y), x.shape[-2:]), y.shape[-2:]


def value(result):
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("reads", ["next block", "result"])
def test_blocks_whose_inside_is_read_elsewhere_stay(reads):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = SizedBlock(), SizedBlock(), SizedBlock()

        def forward(self, x):
            x, size = self.first(x)
            if reads == "next block":
                x = F.interpolate(F.adaptive_avg_pool2d(x, size), x.shape[-2:])
            x = self.third(self.second(x)[0])[0].mean((2, 3))
            return x if reads == "next block" else (x, size[0])

    model, x = Network(), torch.randn(2, 4, 9, 9)
    gm = s2a_fx.transform(model, (x,), "bias+checkpoint")
    assert [note.reason for note in notes_of(gm)] == ["first: getitem_1 inside it is read elsewhere"]
    assert value(gm(x)).equal(value(model(x)))
    assert s2a_fx.analyze(gm, (x,), loss=lambda result: value(result).sum()).saved_bytes == measure_saved_bytes(gm, (x,))


def test_layers_hidden_in_leaf_modules_are_named():
    model = timm.create_model("efficientnet_b0", num_classes=5)
    gm = s2a_fx.transform(model, torch.randn(1, 3, 64, 64), (QuantizeNonParametric(),))
    assert any("hidden inside the leaf module BatchNormAct2d" in n.reason for n in notes_of(gm))


def test_inplace_relu_is_read_by_later_users_as_overwritten():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            y = self.act(h)
            return y + h

    model, x = Overwrites(), torch.randn(3, 4)
    gm = s2a_fx.transform(model, x, (QuantizeNonParametric(),))
    assert any(type(m).__name__ == "QuantizedReLU" for m in gm.modules())
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("bits", [0, 3, 16, True])
def test_bits_must_fill_bytes(bits):
    with pytest.raises(s2a_fx.InputError, match="bits must be one of 1, 2, 4, 8"):
        QuantizeNonParametric(bits=bits)


def test_passes_run_in_torch_s_pass_manager(vit):
    manager = PassManager(passes=[FreezeWeights(), InsertLowRankPrompt(rank=2), QuantizeNonParametric()])
    result = manager(s2a_fx.trace(*vit))
    assert result.modified
    assert result.graph_module(vit[1]).shape == (2, 5)


def test_a_graph_without_shapes_is_refused(vit):
    with pytest.raises(s2a_fx.PassError, match="carries no shapes"):
        FreezeWeights()(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))


@pytest.mark.slow
def test_trained_share_is_the_paper_s():
    model, x = timm_model("vit_base_patch16_224", num_classes=100, batch_size=2)
    gm = s2a_fx.transform(model, x, "bias+lrp+lsb")
    backbone = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head"))
    norms = sum(p.numel() for n, p in gm.named_parameters() if "side_branch" in n and "norm" in n)
    count = sum(p.numel() for p in gm.parameters() if p.requires_grad)
    assert count - norms == 771_820  # the formula, which leaves the side branch's normalization out
    assert 100 * (count - norms) / backbone == pytest.approx(0.8996, abs=1e-4)
    assert s2a_fx.compare(model, x, ["bias+lrp+lsb"]).reports[0].trainable_percent == pytest.approx(0.90, abs=0.01)


def test_order_of_prompt_and_side_branch_does_not_matter(vit):
    gm = s2a_fx.transform(*vit, (AttachSideBranch(), InsertLowRankPrompt(rank=2)))
    assert sum(type(m).__name__ == "LowRankPrompt" for m in gm.modules()) == 3


def test_a_second_side_branch_is_refused(vit):
    with pytest.raises(s2a_fx.PassError, match="has a side branch already"):
        s2a_fx.transform(*vit, (AttachSideBranch(), AttachSideBranch()))


def test_prompt_stands_on_the_value_that_the_block_adds_to():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x, position):
            shifted = position * 2
            return x + self.f(x + shifted)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x, position):
            for block in self.blocks:
                x = block(x, position)
            return x

    gm = s2a_fx.transform(Model(), (torch.randn(2, 9, 4), torch.randn(2, 9, 4)), (InsertLowRankPrompt(rank=2),))
    prompts = [n for n in gm.graph.nodes if "low_rank_prompt" in str(n.target)]
    assert [str(n.args[0]) for n in prompts] == ["x", "add_1"]


def test_softmax_without_a_dimension_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.nn.functional.softmax(self.a(x))

    gm = s2a_fx.transform(Model(), torch.randn(2, 3, 4), (QuantizeNonParametric(),))
    assert [n.reason for n in notes_of(gm)] == ["has no explicit dimension"]


def test_recipes_with_other_options_have_other_names(vit):
    recipes = [(FreezeWeights(keep=("head",)),), (FreezeWeights(keep=("bias",)),)]
    assert len(s2a_fx.compare(*vit, recipes).to_json()["recipes"]) == 2
    with pytest.raises(s2a_fx.InputError, match="each once"):
        s2a_fx.compare(*vit, ["full", "full"])


class _Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.body(x).relu()
        return self.head(x)


@dataclass(frozen=True)
class _Stops(Pass):
    def rewrite(self, gm):
        raise s2a_fx.PassError("no")


def test_a_graph_still_runs_after_a_pass_that_fails():
    model, x = _Gated(), torch.randn(2, 8)
    gm = s2a_fx.trace(model, x)
    with pytest.raises(s2a_fx.PassError, match="no"):
        _Stops()(gm)
    out = gm(x)
    assert torch.equal(out, model(x))
    out.sum().backward()
    assert gm.body.weight.grad is None and gm.head.weight.grad is not None
    assert FreezeWeights()(gm).modified
