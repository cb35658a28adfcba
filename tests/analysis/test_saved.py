"""Saved tensors: predicted equals what autograd holds, to the byte; holders, kinds and live ranges are told right."""

import pytest
import timm
import torch
import torch.nn.functional as F
from slow import fast
from small_models import SMALL, small_model
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.zoo import timm_model

RECIPES = ["full", "linear", "bias", "s2a-paper", "s2a", "s2a-max"]
FURTHER = {
    "mobilenetv3_small_050": {},
    "mixer_s32_224": {},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "convnextv2_atto": {},
    "pvt_v2_b0": {},
    "beit_base_patch16_224": {"depth": 2},
    "poolformer_s12": {},
    "regnety_002": {},
}


@pytest.mark.parametrize("family", fast(SMALL, "vit", "convnext", "resnet"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_predicted_bytes_equal_bytes_held_by_autograd(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_predicted_bytes_equal_bytes_held_by_autograd_in_further_families(name, recipe):
    model = timm.create_model(name, num_classes=5, **FURTHER[name]).train()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    gm = s2a_fx.transform(model, x, recipe)
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base", "resnet50"])
def test_predicted_bytes_equal_bytes_held_by_autograd_at_full_size(name, recipe):
    model = timm.create_model(name).train()
    x = torch.randn(2, 3, 224, 224)
    gm = s2a_fx.transform(model, x, recipe)
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


KNOWN_MB = {"vit_base_patch16_224": 4493, "swin_base_patch4_window7_224": 7245, "convnext_base": 7425}


@pytest.mark.parametrize("name", fast(KNOWN_MB, "vit_base_patch16_224"))
def test_full_fine_tuning_without_fused_attention_keeps_the_known_bytes(name):
    model, x = timm_model(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert s2a_fx.analyze(model, x, optimizer=None).saved_bytes / 1e6 == pytest.approx(KNOWN_MB[name], rel=0.005)


def test_the_graph_keeps_what_the_model_itself_keeps(family):
    model, x = small_model(family)
    assert s2a_fx.analyze(model, x).saved_bytes == measure_saved_bytes(model, (x,))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.v = nn.Linear(4, 4)

    def forward(self, x):
        scores = (self.q(x) @ x.transpose(-2, -1)).softmax(-1)
        return scores @ self.v(x)


def test_a_storage_with_several_holders_is_one_row():
    report = s2a_fx.analyze(Attention(), torch.randn(2, 3, 4))
    (row,) = [r for r in report.activations if r.op == "softmax"]
    assert [h.operand for h in row.holders] == ["SoftmaxBackward0.result", "BmmBackward0.self"]
    assert row.bytes == 2 * 3 * 3 * 4
    assert (row.made_at, row.last_read_forward, row.last_read_backward) == ("softmax", "matmul_1", "softmax")


def test_parameters_buffers_and_inputs_are_told_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    kinds = {row.kind for row in s2a_fx.analyze(model, torch.randn(2, 3, 8, 8)).saved}
    assert kinds == {"input", "parameter", "activation", "buffer"}


def test_a_view_keeps_its_whole_storage():
    class TakesOneToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(F.relu(x)[:, 0])

    report = s2a_fx.analyze(TakesOneToken(), torch.randn(2, 16, 8))
    assert report.saved_bytes == 2 * 16 * 8 * 4


def test_frozen_linear_drops_its_input_and_frozen_convolution_does_not():
    def kept(layer, x):
        layer.weight.requires_grad_(False)
        return s2a_fx.analyze(nn.Sequential(layer), x.requires_grad_()).saved_bytes

    assert kept(nn.Linear(4, 4), torch.randn(2, 4)) == 0
    assert kept(nn.Conv2d(4, 4, 3), torch.randn(2, 4, 8, 8)) == 2 * 4 * 8 * 8 * 4


def test_cuda_dropout_keeps_a_bool_mask_and_cpu_dropout_a_float_one():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.randn(2, 8)
    cpu, cuda = (s2a_fx.analyze(model, x, device=d).activations for d in ("cpu", "cuda"))
    assert [r.dtype for r in cpu if "Mul" in r.operand] == [torch.float32]
    assert [r.dtype for r in cuda if "Dropout" in r.operand] == [torch.bool]


def test_cuda_attention_is_fused_and_its_allocator_rounds(vit):
    report = s2a_fx.analyze(*vit, device="cuda")
    assert any("EfficientAttention" in row.operand for row in report.activations)
    assert any(row.bytes % 512 for row in report.activations)
    assert all(size % 512 == 0 for moment in report.timeline for size in moment.bytes_by_kind)
