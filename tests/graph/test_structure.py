"""Blocks and heads are found from what a graph computes, whoever wrote the additions and whatever stands behind the head."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.heads import classification_heads, head_parameters
from s2a_fx.graph.structure import residual_blocks

IMAGES = torch.randn(2, 3, 32, 32)


class InlineCNN(nn.Module):
    """Adds in the loop of its own forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = x + conv(x)
        return self.head(x.mean((2, 3)))


class PlainViT(nn.Module):
    """Torch's own encoder layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, dropout=0.0)
        self.patch, self.encoder = nn.Conv2d(3, 32, 8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.norm(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1)))


class Tower(nn.Module):
    """An image tower as open_clip writes it: attention modules, a class token, a projection that is a parameter."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 32, 8, 8, bias=False), nn.Parameter(torch.zeros(32))
        self.positions, self.before = nn.Parameter(torch.zeros(17, 32)), nn.LayerNorm(32)
        self.norms_1, self.norms_2 = (nn.ModuleList(nn.LayerNorm(32) for _ in range(2)) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.after, self.projection = nn.LayerNorm(32), nn.Parameter(torch.randn(32, 8))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.before(torch.cat([self.token.expand(x.shape[0], 1, -1), x], 1) + self.positions)
        for norm_1, attention, norm_2, mlp in zip(self.norms_1, self.attentions, self.norms_2, self.mlps, strict=True):
            y = norm_1(x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mlp(norm_2(x))
        return self.after(x[:, 0]) @ self.projection


def timm_model(name, size=32, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options), torch.randn(2, 3, size, size)


def distilled():
    model, x = timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2)
    model.set_distilled_training(True)
    return model, x


MODELS = {
    "inline": lambda: (InlineCNN(), IMAGES),
    "plain ViT": lambda: (PlainViT(), IMAGES),
    "tower": lambda: (Tower(), IMAGES),
    "distilled": distilled,
    "crossvit": lambda: timm_model("crossvit_9_240", 240, embed_dim=(32, 48), num_heads=(2, 2), depth=((1, 1, 0), (1, 1, 0))),
    "coat_lite": lambda: timm_model("coat_lite_tiny", 64, img_size=64, serial_depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    "volo": lambda: timm_model("volo_d1_224", 64, img_size=64),
}
BLOCKS = {"inline": 3, "plain ViT": 2, "tower": 4, "distilled": 2}
HEADS = {"tower": {"projection"}, "distilled": {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_heads_are_found(name):
    model, x = MODELS[name]()
    gm = s2a_fx.trace(model, x)
    assert len(residual_blocks(gm)) == BLOCKS.get(name, len(residual_blocks(gm))) > 0
    assert head_parameters(gm) >= HEADS.get(name, {n for n, _ in model.named_parameters() if n.startswith("head.")})


@pytest.mark.parametrize("recipe", ["bias+lrp", "bias+checkpoint", "s2a-max"])
@pytest.mark.parametrize("name", MODELS)
def test_recipes_find_their_places_and_keep_what_is_predicted(name, recipe):
    model, x = MODELS[name]()
    gm = s2a_fx.transform(model.eval(), x, recipe)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)
    gm.train()
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


class Headed(nn.Module):
    """A head, and what stands between it and the output."""

    def __init__(self, after):
        super().__init__()
        self.body, self.norm, self.head, self.after = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4), after

    def forward(self, x):
        return self.after(self.head(self.norm(self.body(x))))


@pytest.mark.parametrize(
    "after",
    [
        lambda y: F.log_softmax(y, -1),
        torch.sigmoid,
        lambda y: y.argmax(-1),
        lambda y: (F.cross_entropy(y, y.argmax(-1)), y),
        lambda y: {"loss": y.square().mean(), "logits": y},
        lambda y: (y + y.flip(0)) / 2,
    ],
    ids=["log_softmax", "sigmoid", "argmax", "loss", "dict", "average"],
)
def test_a_head_is_found_behind_what_has_no_parameters(after):
    gm = s2a_fx.trace(Headed(after), torch.randn(3, 8))
    assert head_parameters(gm) == {"head.weight", "head.bias"}


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return F.linear(F.normalize(self.norm(x)), F.normalize(self.weight)) * 10


def test_the_weight_of_a_cosine_is_the_head():
    assert head_parameters(s2a_fx.trace(Cosine(), torch.randn(3, 8))) == {"weight"}


def test_several_heads_are_found():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.colour, self.shape = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.body(x))
            return {"colour": self.colour(x), "shape": self.shape(x)}

    found = classification_heads(s2a_fx.trace(Several(), torch.randn(3, 8)))
    assert {node.target for node in found} == {"colour", "shape"}


def test_features_have_no_head_and_their_biases_train():
    model, x = timm_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.reset_classifier(0)
    gm = s2a_fx.transform(model, x, "bias")
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == {n for n, _ in gm.named_parameters() if n.endswith("bias")}
    with pytest.raises(s2a_fx.PassError, match="no classification head"):
        s2a_fx.transform(model, x, "linear")


@pytest.mark.parametrize("name", ["densenet121", "lcnet_035"])
def test_a_model_without_residual_blocks_is_told(name):
    model, x = timm_model(name, 64)
    with pytest.raises(s2a_fx.PassError, match="found no residual block"):
        s2a_fx.transform(model, x, "bias+lrp")
