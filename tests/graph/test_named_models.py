"""Heads and blocks of further kinds of models: towers of other libraries, dense predictions, features, three dimensions."""

import pytest
import timm
import torch
import torch.nn.functional as F
from slow import fast
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.heads import head_parameters
from s2a_fx.graph.structure import residual_blocks

IMAGES, LABELS = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])


class Convolutions3d(nn.Module):
    """Adds inline, in three dimensions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, 2, 1)
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv3d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = x + conv(x)
        return self.head(x.mean((2, 3, 4)))


class Mixer1d(nn.Module):
    """Adds inline, over a sequence, with a gate."""

    def __init__(self):
        super().__init__()
        self.norms, self.mixes = (
            nn.ModuleList(make() for _ in range(2)) for make in (lambda: nn.LayerNorm(8), lambda: nn.Linear(8, 8))
        )
        self.gates, self.head = nn.ParameterList(nn.Parameter(torch.full((8,), 0.5)) for _ in range(2)), nn.Linear(8, 4)

    def forward(self, x):
        for norm, mix, gate in zip(self.norms, self.mixes, self.gates, strict=True):
            x = x + gate * F.gelu(mix(norm(x)))
        return self.head(x.mean(1))


class WithLoss(nn.Module):
    """Answers with its loss."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Convolutions3d(), nn.Linear(4, 3)

    def forward(self, x, y):
        logits = self.head(F.relu(self.body(x)))
        return F.cross_entropy(logits, y), logits


def small(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **options)


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": 4,
}
PIXELS = {"pixel_values": IMAGES, "labels": LABELS}
MODELS = {
    "coat_tiny": (lambda: small("coat_tiny", img_size=64), torch.randn(2, 3, 64, 64), "head"),
    "3-D convolutions": (Convolutions3d, torch.randn(2, 3, 4, 8, 8), "head"),
    "a sequence": (Mixer1d, torch.randn(2, 6, 8), "head"),
    "a loss inside": (WithLoss, (torch.randn(2, 3, 4, 8, 8), LABELS), "head"),
    "ViT of Hugging Face": (lambda: ViTForImageClassification(ViTConfig(**VIT)), PIXELS, "classifier"),
    "DINOv2 of Hugging Face": (lambda: Dinov2ForImageClassification(Dinov2Config(**VIT)), PIXELS, "classifier"),
}

OWN = [name for name in MODELS if "Hugging" not in name]


@pytest.mark.parametrize("name", fast(MODELS, *OWN))
def test_blocks_and_the_head_are_found(name):
    make, inputs, head = MODELS[name]
    gm = s2a_fx.trace(make(), inputs)
    assert residual_blocks(gm)
    assert head_parameters(gm) == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("name", fast((n for n in MODELS if n not in ("coat_tiny", "DINOv2 of Hugging Face")), *OWN))
def test_prompts_find_a_place_and_checkpoints_keep_what_is_predicted(name):
    make, inputs, _ = MODELS[name]
    model = make().eval()
    arguments = s2a_fx.Inputs(**inputs) if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    for recipe in ("bias+lrp", "bias+checkpoint"):
        gm = s2a_fx.transform(model, arguments, recipe).eval()
        call = (lambda m: m(**inputs)["logits"]) if isinstance(inputs, dict) else (lambda m: m(*arguments))
        torch.testing.assert_close(call(gm), call(model), rtol=1e-4, atol=1e-5)
        if not isinstance(inputs, dict):
            assert s2a_fx.analyze(gm, arguments).saved_bytes == measure_saved_bytes(gm, arguments)


@pytest.mark.parametrize("name", fast(["resnet10t", "convnext_atto", "efficientvim_m1"], "resnet10t"))
def test_features_and_towers_train_their_biases(name):
    options = {"features_only": True} if name != "efficientvim_m1" else {"num_classes": 0}
    model, x = timm.create_model(name, **options), torch.randn(2, 3, 64, 64)
    gm = s2a_fx.transform(model, (x,), "bias")
    trains = {n for n, p in gm.named_parameters() if p.requires_grad}
    assert trains and all(n.rpartition(".")[2] == "bias" for n in trains)


@pytest.mark.parametrize("name", fast(["ese_vovnet19b_slim_dw", "vgg11"], "ese_vovnet19b_slim_dw"))
def test_a_network_that_adds_nothing_has_no_block_and_has_a_head(name):
    model, x = small(name), torch.randn(2, 3, 64, 64)
    with pytest.raises(s2a_fx.PassError, match="found no residual block"):
        s2a_fx.transform(model, (x,), "s2a")
    gm = s2a_fx.transform(model, (x,), "bias+compress")
    assert s2a_fx.analyze(gm, (x,)).saved_bytes == measure_saved_bytes(gm, (x,))
