"""Blocks and heads are found from what a graph computes, whoever wrote the additions and whatever stands behind the head."""

import pytest
import timm
import torch
import torch.nn.functional as F
from slow import fast
from torch import nn

import s2a_fx
from s2a_fx.analysis.measure import measure_saved_bytes
from s2a_fx.graph.heads import classification_heads, head_parameters
from s2a_fx.graph.structure import residual_blocks, residual_branches

IMAGES = torch.randn(2, 3, 32, 32)
TOKENS = torch.randn(2, 6, 8)


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


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, num_labels=5
    )
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    return model, {"pixel_values": IMAGES, "labels": torch.tensor([1, 3])}


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
    "repvit": lambda: timm_model("repvit_m0_9", 64),
    "ViT by keyword": lambda: hugging_face("ViT"),
    "DINOv2 by keyword": lambda: hugging_face("Dinov2"),
}
BLOCKS = {"inline": 3, "plain ViT": 2, "tower": 4, "distilled": 2, "coat_lite": 4, "volo": 20, "repvit": 49}
BLOCKS |= {"ViT by keyword": 2, "DINOv2 by keyword": 2}
HEADS = {"tower": {"projection"}, "distilled": {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}}
HEADS["repvit"] = {"head.head.l.weight", "head.head.l.bias", "head.head_dist.l.weight", "head.head_dist.l.bias"}
HEADS |= {name: {"classifier.weight", "classifier.bias"} for name in ("ViT by keyword", "DINOv2 by keyword")}


def answer(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


class Positional(nn.Module):
    """A model that is called by keyword, called by position."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values):
        return self.model(**dict(zip(self.names, values, strict=True)))


def kept(model, inputs):
    if isinstance(inputs, dict):
        return measure_saved_bytes(Positional(model, inputs), tuple(inputs.values()))
    return measure_saved_bytes(model, (inputs,))


def assert_alike(found, wanted):
    """Equal to float tolerance, outputs that are dataclasses too."""
    if hasattr(wanted, "to_tuple"):
        found, wanted = found.to_tuple(), wanted.to_tuple()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", fast(MODELS, *(name for name in MODELS if "DINOv2" not in name)))
def test_blocks_and_heads_are_found(name):
    model, x = MODELS[name]()
    gm = s2a_fx.trace(model, x)
    assert len(residual_blocks(gm)) == BLOCKS.get(name, len(residual_blocks(gm))) > 0
    assert head_parameters(gm) >= HEADS.get(name, {n for n, _ in model.named_parameters() if n.startswith("head.")})


@pytest.mark.parametrize("recipe", fast(["bias+lrp", "bias+checkpoint", "s2a-max"], "bias+checkpoint"))
@pytest.mark.parametrize("name", fast(MODELS, "plain ViT", "coat_lite", "crossvit", "distilled"))
@pytest.mark.filterwarnings("error:erase_node")
def test_recipes_find_their_places_and_keep_what_is_predicted(name, recipe):
    model, x = MODELS[name]()
    gm = s2a_fx.transform(model.eval(), x, recipe)
    with torch.no_grad():
        assert_alike(answer(gm, x), answer(model, x))
    gm.train()
    assert s2a_fx.analyze(gm, x).saved_bytes == kept(gm, x)
    with torch.no_grad():
        assert_alike(answer(gm, x), answer(model.train(), x))


def test_the_side_branch_reads_whole_images_where_a_model_runs_parts_of_them_too():
    model, x = timm_model("tnt_s_patch16_224", 64, img_size=64, depth=2, embed_dim=48)
    assert len(residual_blocks(s2a_fx.trace(model, x))) == 5  # the last module is a block; of the other, four additions
    gm = s2a_fx.transform(model, x, "bias+lrp+lsb")
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))
    assert {name for name, _ in gm.side_branch.named_children() if name.startswith("blocks")} == {
        "blocks_0_2",
        "blocks_0_3",
        "blocks_1",
    }


def gated(layers, x):
    return x + layers[1](x).sigmoid() * layers[2](layers[0](x))


def scaled(layers, x):
    return layers[0].weight * layers[1](x) * 0.5 + x


def dropped(layers, x):
    keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.9)
    return x.add_(layers[1](layers[0](x)) * keep)


def normed_after(layers, x):
    x = layers[0](x + layers[1](x))
    return layers[3](x + layers[2](x))


def parallel(layers, x):
    y = layers[0](x)
    return x + layers[1](y) + layers[2](y)


def attending(layers, x):
    b, n, c = x.shape
    y = layers[1](x).reshape(b, n, 2, c // 2).transpose(1, 2)
    return x + layers[2]((y @ y.mT).softmax(-1).matmul(y).transpose(1, 2).reshape(b, n, c))


def nested(layers, x):
    y = layers[1](x)
    return x + layers[2](y + layers[0](y))


def long_way_round(layers, x):
    y = x + layers[1](x)
    return x + (y + layers[2](y))


class InOneForward(nn.Module):
    """A body written as a function of its layers, once or several times in one forward."""

    def __init__(self, body, times):
        super().__init__()
        self.body, self.stem, self.head = body, nn.Linear(8, 8), nn.Linear(8, 3)
        layers = lambda: [nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)]  # noqa: E731
        self.layers = nn.ModuleList(nn.ModuleList(layers()) for _ in range(times))

    def forward(self, x):
        x = self.stem(x)
        for layers in self.layers:
            x = self.body(layers, x)
        return self.head(x.mean(1))


class AsModules(nn.Module):
    """The same, each time in a module of its own."""

    def __init__(self, body, times):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(*(Body(body) for _ in range(times)))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.layers = nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)])

    def forward(self, x):
        return self.body(self.layers, x)


BODIES = {gated: 1, scaled: 1, dropped: 1, normed_after: 2, parallel: 1, attending: 1, nested: 1, long_way_round: 2}
"""Each with the blocks that it makes where no module tells which additions belong together."""


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_blocks_are_found_whoever_writes_the_addition(body):
    inline = residual_blocks(s2a_fx.trace(InOneForward(body, 2), TOKENS))
    modules = residual_blocks(s2a_fx.trace(AsModules(body, 2), TOKENS))
    assert len(inline) == 2 * BODIES[body]
    assert [block.path for block in modules if "." not in block.path.removeprefix("blocks.")] == ["blocks.0", "blocks.1"]
    for block in [*inline, *modules]:
        inside = set(block.nodes)
        assert block.entry not in inside
        assert all(user in inside for node in block.nodes if node is not block.output for user in node.users)


@pytest.mark.parametrize("recipe", ["bias+lrp", "bias+checkpoint", "s2a-max"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_recipes_serve_blocks_whoever_writes_the_addition(body, recipe):
    model = InOneForward(body, 2).eval()
    gm = s2a_fx.transform(model, TOKENS, recipe)
    if body is not dropped:  # draws in eval, too
        torch.testing.assert_close(gm(TOKENS), model(TOKENS))
    gm.train()
    assert s2a_fx.analyze(gm, TOKENS).saved_bytes == measure_saved_bytes(gm, (TOKENS,))


def test_the_branches_of_parallel_layers_are_told_apart():
    gm = s2a_fx.trace(AsModules(parallel, 1), TOKENS)
    assert [branch.value.target for branch in residual_branches(gm)] == ["blocks.0.layers.1", "blocks.0.layers.2"]


@pytest.mark.parametrize("recipe", ["lora", "adapter", "lst"])
@pytest.mark.parametrize("name", fast(["inline", "tower"], "inline"))
def test_what_passes_insert_belongs_to_the_blocks_and_is_none(name, recipe):
    model, x = MODELS[name]()
    before = residual_blocks(s2a_fx.trace(model, x))
    after = residual_blocks(s2a_fx.transform(model, x, recipe))
    assert [block.output.name for block in after] == [block.output.name for block in before]


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


def test_heads_stand_in_the_order_of_the_graph():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 3) for _ in range(11))

        def forward(self, x):
            x = F.relu(self.body(x))
            return [head(x) for head in self.heads]

    found = classification_heads(s2a_fx.trace(Many(), torch.randn(3, 8)))
    assert [node.target for node in found] == [f"heads.{index}" for index in range(11)]


@pytest.mark.parametrize("convolve", [F.conv2d, torch.conv2d, torch.ops.aten.conv2d.default])
def test_a_convolution_called_as_a_function_is_a_head(convolve):
    class Convolves(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3, 1, 1)
            self.weight, self.bias = nn.Parameter(torch.randn(5, 8, 1, 1)), nn.Parameter(torch.randn(5))

        def forward(self, x):
            x = F.relu(self.body(x)).mean((2, 3), keepdim=True)
            return convolve(x, self.weight, self.bias).flatten(1)

    assert head_parameters(s2a_fx.trace(Convolves(), torch.randn(2, 3, 8, 8))) == {"weight", "bias"}


def test_a_convolution_of_several_positions_is_no_head_in_whatever_order_it_is_given():
    class Convolves(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Conv2d(3, 8, 3, 1, 1), nn.Parameter(torch.randn(5, 8, 3, 3))

        def forward(self, x):
            x = F.relu(self.body(x)).mean((2, 3), keepdim=True)
            return F.conv2d(weight=self.weight, input=x, padding=1).flatten(1)

    assert not head_parameters(s2a_fx.trace(Convolves(), torch.randn(2, 3, 8, 8)))


def test_features_have_no_head_and_their_biases_train():
    model, x = timm_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.reset_classifier(0)
    gm = s2a_fx.transform(model, x, "bias")
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == {n for n, _ in gm.named_parameters() if n.endswith("bias")}
    with pytest.raises(s2a_fx.PassError, match="no classification head"):
        s2a_fx.transform(model, x, "linear")


@pytest.mark.parametrize("name", fast(["densenet121", "lcnet_035"], "lcnet_035"))
def test_a_model_without_residual_blocks_is_told(name):
    model, x = timm_model(name, 64)
    with pytest.raises(s2a_fx.PassError, match="found no residual block"):
        s2a_fx.transform(model, x, "bias+lrp")
