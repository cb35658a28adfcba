"""The methods that S2A is compared with: LoRA, adapters, visual prompts, UniPT, LST and checkpointing, on four families."""

import copy
import re

import pytest
import timm
import torch
from saved_bytes import cosine
from slow import fast
from small_models import SMALL, small_model
from steps import layers, step, ten_steps
from torch import fx, nn

import s2a_fx
from s2a_fx.analysis.device import device_model
from s2a_fx.analysis.measure import measure_peak_bytes, measure_saved_bytes
from s2a_fx.analysis.simulation import simulate
from s2a_fx.graph.heads import head_paths, last_feature
from s2a_fx.graph.metadata import notes_of
from s2a_fx.graph.structure import residual_blocks, residual_branches
from s2a_fx.passes import (
    AttachLadder,
    AttachSideBranch,
    AttachUniPT,
    CheckpointBlocks,
    FreezeWeights,
    FuseAttention,
    InsertAdapter,
    InsertLoRA,
    InsertLowRankPrompt,
    InsertVisualPrompt,
)
from s2a_fx.zoo import timm_model

METHODS = ["lora", "adapter", "vpt", "unipt", "lst"]
WITHOUT_EFFECT_AT_FIRST = ["lora", "adapter"]


def at_length(*recipes):
    """Recipes of which the first is tried always, the others in the slow run."""
    return [recipes[0], *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in recipes[1:])]


COMBINED = at_length("lora+compress", "adapter+compress", "vpt+compress", "unipt+compress", "lst+compress", "lora+compress-max")
CHECKPOINTED = at_length("bias+checkpoint", "full+checkpoint", "lora+checkpoint", "vpt+checkpoint")


def trained(gm):
    return {name for name, p in gm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", fast(SMALL, "vit", "resnet"))
@pytest.mark.parametrize("recipe", [*METHODS, *COMBINED, *CHECKPOINTED])
def test_predicted_bytes_equal_bytes_held_by_autograd(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))


@pytest.fixture(params=[1, 2])
def threads(request):
    """Kernels of one thread are others than those of several, and take other memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("recipe", at_length("bias+checkpoint", *METHODS))
def test_predicted_peak_is_within_two_percent_of_the_allocator_s(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    assert s2a_fx.analyze(gm, x).peak_bytes == pytest.approx(measure_peak_bytes(gm, (x,), optimizer), rel=0.02)


@pytest.mark.parametrize("recipe", fast(METHODS, "lora"))
def test_ten_steps_lower_the_loss_and_change_what_trains_alone(family, recipe):
    """The head stays as it is: what the method trains must do it."""
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    for path in head_paths(gm):
        gm.get_submodule(path).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    losses = ten_steps(gm, x)
    assert losses[-1] < losses[0]
    changed = {name for name, p in gm.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained(gm)


@pytest.mark.parametrize("recipe", WITHOUT_EFFECT_AT_FIRST)
def test_output_equals_the_original_at_initialization(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    for mode in (True, False):
        outputs = []
        for m in (gm, model):
            torch.manual_seed(1)
            outputs.append(m.train(mode)(x))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", at_length("lst", "lora", "adapter", "vpt", "unipt"))
def test_state_dict_round_trip(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    ten_steps(gm, x)
    other = s2a_fx.transform(small_model(family)[0], x, recipe)
    other.load_state_dict(gm.state_dict())
    assert torch.equal(other.eval()(x), gm.eval()(x))


@pytest.mark.parametrize("family", fast(SMALL, "vit", "swin"))
@pytest.mark.parametrize("recipe", METHODS)
def test_weights_of_the_backbone_keep_their_names_and_train_no_more(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    names = {n for n, _ in model.named_parameters()}
    assert names <= {n for n, _ in gm.named_parameters()}
    heads = {n for n in names if n.startswith(("head.", "fc."))}
    assert trained(gm) & names <= heads


@pytest.mark.parametrize("recipe", at_length("vpt", "lora", "adapter", "unipt", "lst"))
def test_another_batch_size(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe).eval()
    torch.testing.assert_close(gm(torch.cat((x, x)))[:2], gm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", fast(SMALL, "vit", "resnet"))
@pytest.mark.parametrize("recipe", ["unipt", "lst"])
def test_beside_a_frozen_network_nothing_of_it_is_kept(family, recipe):
    model, x = small_model(family)
    report = s2a_fx.analyze(s2a_fx.transform(model, x, recipe), x)
    own = ("parallel_network", "ladder", "head", "fc", "global_pool")
    others = [row for row in report.activations if row.module and row.module.split(".")[0] not in own]
    assert not others
    assert sum(row.bytes for row in report.activations if not row.module) < 64  # the loss


@pytest.mark.parametrize("recipe", CHECKPOINTED)
def test_checkpointing_changes_no_gradient(family, recipe):
    model, x = small_model(family)
    plain = s2a_fx.transform(model, x, recipe.removesuffix("+checkpoint"))
    gm = s2a_fx.transform(plain, x, (CheckpointBlocks(),))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.01 * torch.randn_like(p))
    (y, exact), (output, actual) = step(plain, x), step(gm, x)
    torch.testing.assert_close(output, y)
    assert actual.keys() == exact.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, exact[name])
    for name, buffer in gm.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


def test_what_checkpoints_recompute_is_simulated_with_the_device_s_kernels(vit):
    model, x = vit
    gm = s2a_fx.transform(model, x, "bias+checkpoint")
    events = [simulate(gm, device=device_model(device)).events for device in ("cpu", "cuda")]
    on_cpu, on_cuda = ({e.place.op for e in of_device if e.place.phase == "backward"} for of_device in events)
    assert any("for_cpu" in op for op in on_cpu)
    assert not any("for_cpu" in op for op in on_cuda)


def test_checkpointed_blocks_draw_the_same_again():
    model, x = small_model("vit", proj_drop_rate=0.3, drop_path_rate=0.3)
    gm = s2a_fx.transform(model, x, "bias")
    checkpointed = s2a_fx.transform(gm, x, (CheckpointBlocks(),))
    (y, exact), (output, actual) = step(gm, x), step(checkpointed, x)
    assert torch.equal(output, y)
    assert all(torch.equal(actual[name], exact[name]) for name in exact)


@pytest.mark.parametrize("recipe", COMBINED)
def test_compressed_gradients_are_near(family, recipe):
    model, x = small_model(family)
    plain = s2a_fx.transform(model, x, recipe.rpartition("+")[0])
    torch.manual_seed(2)
    with torch.no_grad():
        for p in plain.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    gm = s2a_fx.transform(plain, x, s2a_fx.recipes.SUFFIXES[recipe.rpartition("+")[2]])
    (y, exact), (output, actual) = step(plain, x), step(gm, x)
    torch.testing.assert_close(output, y, rtol=1e-4, atol=1e-5)
    together = [torch.cat([grads[n].flatten() for n in exact if n != "input"]) for grads in (actual, exact)]
    assert cosine(*together) > 0.99


def peft_name(name):
    return re.sub(r"qkv_lora\.([AB])", r"qkv.lora_\1.default", name)


def test_lora_equals_peft_s(vit):
    peft = pytest.importorskip("peft")
    model, x = vit
    reference = copy.deepcopy(model)
    for p in reference.parameters():
        p.requires_grad_(False)
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["qkv"])).get_base_model()
    gm = s2a_fx.transform(model, x, (FreezeWeights(keep=("head",)), InsertLoRA(rank=4, alpha=12)))
    gm.head.requires_grad_(False)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, mine in gm.named_parameters():
            if "_lora" in name:
                reference.get_parameter(peft_name(name)).copy_(mine.normal_(std=0.1))
    (y, exact), (output, actual) = step(reference, x), step(gm, x)
    torch.testing.assert_close(output, y, rtol=1e-5, atol=1e-6)
    for name, gradient in actual.items():
        path = name.replace("qkv_lora.A.weight", "qkv.lora_A.default.weight").replace(
            "qkv_lora.B.weight", "qkv.lora_B.default.weight"
        )
        torch.testing.assert_close(gradient, exact[path], rtol=1e-4, atol=1e-5)
    assert measure_saved_bytes(gm, (x,)) == measure_saved_bytes(reference, (x,))


def adapted(model, x, **options):
    gm = s2a_fx.transform(model, x, (FreezeWeights(keep=("head",)), InsertLoRA(**options)))
    return sorted(name for name, m in gm.named_modules() if name.endswith("_lora")), gm


@pytest.mark.parametrize(
    ("family_name", "first"),
    [
        ("vit", "blocks.0.attn.qkv_lora"),
        ("swin", "layers.0.blocks.0.attn.qkv_lora"),
        ("convnext", "stages.0.blocks.0.mlp.fc1_lora"),
        ("resnet", "layer1.0.conv1_lora"),
    ],
)
def test_lora_stands_by_default_where_the_method_says(family_name, first):
    assert adapted(*small_model(family_name))[0][0] == first


def test_lora_stands_where_patterns_say(vit):
    assert adapted(*vit, targets=("fc1", "blocks.2.attn.proj"))[0] == [
        *(f"blocks.{i}.mlp.fc1_lora" for i in range(2)),
        "blocks.2.attn.proj_lora",
        "blocks.2.mlp.fc1_lora",
    ]


def test_lora_says_what_layers_there_are(vit):
    with pytest.raises(s2a_fx.PassError, match=r"no layer is called 'query'; there are .*qkv, fc1, fc2, head"):
        adapted(*vit, targets=("query",))


def test_lora_leaves_other_layers_alone_with_a_note():
    _, gm = adapted(*small_model("convnext"), targets=("conv_dw", "fc1"))
    assert any(n.node == "stages_0_blocks_0_conv_dw" and "one group" in n.reason for n in notes_of(gm))


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": -1.0}, {"targets": "qkv"}, {"targets": ()}], ids=str)
def test_lora_refuses_bad_options(options):
    with pytest.raises(s2a_fx.InputError, match="InsertLoRA: "):
        InsertLoRA(**options)


def test_two_adapters_a_block_of_a_transformer_or_its_last_alone(vit):
    model, x = vit
    both, last = (s2a_fx.transform(model, x, (InsertAdapter(last=last),)) for last in (False, True))
    assert (len(layers(both, "Adapter")), len(layers(last, "Adapter"))) == (6, 3)


def test_adapters_refuse_a_reduction_that_does_not_divide(vit):
    with pytest.raises(s2a_fx.InputError, match="192 channels, which reduction=7 does not divide"):
        s2a_fx.transform(*vit, (InsertAdapter(reduction=7),))


def test_prompts_are_extra_tokens_that_only_the_block_sees(vit):
    model, x = vit
    gm = s2a_fx.transform(model, x, (InsertVisualPrompt(tokens=5),))
    assert next(n for n in gm.graph.nodes if n.target == "blocks.0.mlp.fc1").meta["val"].shape == (2, 22, 768)
    assert [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target is torch.cat][1:] == [(2, 17, 192)] * 3
    prompts = [m.tokens.shape for m in layers(gm, "PromptTokens")]
    assert prompts == [(5, 192)] * 3


def maps(gm):
    return [n.meta["val"].shape[-2:] for n in gm.graph.nodes if str(n.target).endswith("attn.softmax")]


def test_prompts_in_windows_are_keys_of_every_window():
    model, x = small_model("swin")
    prompted = s2a_fx.transform(model, x, (InsertVisualPrompt(tokens=6),))
    plain = maps(s2a_fx.trace(model, x))
    assert len(plain) == 5
    assert maps(prompted) == [(queries + 6, keys + 6) for queries, keys in plain]


def test_prompts_skip_stages():
    model, x = small_model("swin")
    gm = s2a_fx.transform(model, x, (InsertVisualPrompt(tokens=6, skip=1),))
    assert all("layers.0" not in name for name, m in gm.named_modules() if type(m).__name__ == "PromptTokens")
    assert len(layers(gm, "PromptTokens")) == 4


def test_a_border_refuses_another_size():
    model, x = small_model("convnext")
    gm = s2a_fx.transform(model, x, "vpt")
    with pytest.raises(s2a_fx.ShapeError, match=r"border was built for 16x16 positions, got 24x24"):
        gm(torch.randn(2, 3, 96, 96))


def test_blocks_that_cannot_take_more_tokens_are_refused_before_any_is_edited():
    model = timm.create_model("beit_base_patch16_224", depth=2, num_classes=5)
    gm = s2a_fx.trace(model.to("meta"), torch.empty(2, 3, 224, 224, device="meta"))
    graph, modules, values = str(gm.graph), dict(gm.named_modules()), {n: n.meta["val"] for n in gm.graph.nodes}
    with pytest.raises(s2a_fx.PassError, match=r"blocks\.1 was built for its number of tokens"):
        InsertVisualPrompt()(gm)
    assert (str(gm.graph), dict(gm.named_modules())) == (graph, modules)
    assert all(n.meta["val"] is values[n] for n in gm.graph.nodes)


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x).relu()


@pytest.mark.parametrize(
    "graph_pass", [InsertLoRA(), InsertAdapter(), InsertVisualPrompt(), AttachUniPT(), AttachLadder(), CheckpointBlocks()]
)
def test_a_model_without_what_a_method_needs_is_refused(graph_pass):
    with pytest.raises(s2a_fx.PassError, match=type(graph_pass).__name__):
        s2a_fx.transform(Headless(), torch.randn(2, 8), (graph_pass,))


def test_a_second_ladder_is_refused(vit):
    with pytest.raises(s2a_fx.PassError, match="has a ladder already"):
        s2a_fx.transform(*vit, (AttachLadder(), AttachLadder()))


def test_the_gate_of_a_ladder_starts_half_way(vit):
    gm = s2a_fx.transform(*vit, "lst")
    assert [m.gate.item() for m in layers(gm, "LadderLayer")] == [0.0] * 3


def test_a_prompt_of_cells_is_the_same_within_each_cell():
    model, x = small_model("convnext")
    gm = s2a_fx.transform(model, x, (InsertLowRankPrompt(rank=2, cells=2),))
    prompt = layers(gm, "LowRankPrompt")[0]
    assert prompt.A.shape == (4, 2)
    with torch.no_grad():
        prompt.A.normal_()
    zero = torch.zeros(1, prompt.channels, *prompt.grid)
    added = prompt(zero)[0]
    assert torch.equal(added[:, :8, :8], added[:, :1, :1].expand(-1, 8, 8))
    assert not torch.equal(added[:, 0, 0], added[:, 15, 15])


def test_cells_that_do_not_divide_are_refused():
    with pytest.raises(s2a_fx.InputError, match="16x16, which cells=3 does not divide"):
        s2a_fx.transform(*small_model("convnext"), (InsertLowRankPrompt(cells=3),))


def test_a_side_branch_of_some_blocks():
    model, x = small_model("convnext")
    gm = s2a_fx.transform(model, x, (AttachSideBranch(skip=1, every=2),))
    assert [name for name, m in gm.named_modules() if type(m).__name__ == "LiteSideBlock"] == [
        "side_branch.stages_2_blocks_0.block",
        "side_branch.stages_3_blocks_0.block",
    ]


@pytest.mark.parametrize("name", ["lora+", "lora+zip", "nothing+compress", "s2a+compress+compress"])
def test_unknown_recipes_are_told(name):
    with pytest.raises(s2a_fx.InputError, match="with or without \\+compress"):
        s2a_fx.recipes.resolve(name)


@pytest.mark.parametrize("recipe", fast(["bias+lrp+lsb", *METHODS], "bias+lrp+lsb"))
def test_inserting_leaves_the_model_s_blocks_as_they_were(family, recipe):
    model, x = small_model(family)
    gm, plain = s2a_fx.transform(model, x, recipe), s2a_fx.trace(model, x)
    assert [b.path for b in residual_blocks(gm)] == [b.path for b in residual_blocks(plain)]
    assert len(residual_branches(gm)) == len(residual_branches(plain))


@pytest.mark.parametrize("method", [InsertLoRA(), InsertAdapter(), InsertVisualPrompt(tokens=3)], ids=lambda m: type(m).__name__)
def test_methods_compose_in_either_order(method):
    model, x = small_model("vit")
    prompt = InsertLowRankPrompt()
    counts = []
    for recipe in ((method, prompt, AttachSideBranch()), (prompt, AttachSideBranch(), method)):
        gm = s2a_fx.transform(model, x, recipe)
        assert s2a_fx.analyze(gm, x).saved_bytes == measure_saved_bytes(gm, (x,))
        counts.append([len(layers(gm, name)) for name in ("LoRA", "Adapter", "PromptTokens", "LowRankPrompt", "LiteSideBlock")])
    assert counts[0] == counts[1]


def test_the_last_feature_is_that_of_the_last_block_however_small():
    model = timm.create_model("resnet18", num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    assert last_feature(s2a_fx.trace(model, x)).name == "layer4_1_act2"
    gm = s2a_fx.transform(model, x, "unipt")
    assert not any(row.module.startswith("layer") for row in s2a_fx.analyze(gm, x).activations)


@pytest.mark.parametrize("recipe", ["unipt", "lst"])
def test_features_pooled_without_their_first_tokens(recipe):
    model, x = small_model("vit", global_pool="avg", class_token=True)
    gm = s2a_fx.transform(model, x, recipe)
    shapes = {n.name: tuple(n.meta["val"].shape) for n in gm.graph.nodes if isinstance(n.meta["val"], torch.Tensor)}
    ran = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                ran[n.name] = tuple(result.shape)
            return result

    Shapes(gm).run(x)
    assert ran == shapes


@pytest.mark.parametrize(
    ("name", "recipe", "reason"),
    [
        ("beit_base_patch16_224", "lora", "found no layer to adapt"),
        pytest.param("cait_xxs24_224", "lst", "found no residual block laid out like", marks=pytest.mark.slow),
        ("pvt_v2_b0", "vpt", "was built for its number of tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, recipe, reason):
    model, x = timm_model(name, num_classes=5, batch_size=2)
    with pytest.raises(s2a_fx.PassError, match=reason):
        s2a_fx.transform(model, x, recipe)


@pytest.mark.slow
def test_a_comparison_tells_what_does_not_fit():
    model, x = timm_model("pvt_v2_b0", num_classes=5, batch_size=2)
    comparison = s2a_fx.compare(model, x, ["full", "vpt"], tell_refusals=True)
    assert [r.recipe for r in comparison.reports] == ["full"]
    assert "vpt does not fit: InsertVisualPrompt: " in str(comparison)
    assert list(comparison.to_json()["refusals"]) == ["vpt"]
    with pytest.raises(s2a_fx.PassError, match="no recipe fits PyramidVisionTransformerV2: vpt: "):
        s2a_fx.compare(model, x, ["vpt"], tell_refusals=True)
    with pytest.raises(s2a_fx.PassError):
        s2a_fx.compare(model, x, ["full", "vpt"])


def test_a_layer_called_twice_is_adapted_alike():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    gm = s2a_fx.transform(Shared(), torch.randn(2, 8), (InsertLoRA(targets=("fc",)),))
    assert len(layers(gm, "LoRA")) == 1


def test_attention_over_maps_gets_no_border():
    model, x = small_model("swin")
    gm = s2a_fx.transform(model, x, (FuseAttention(), InsertVisualPrompt(tokens=6)))
    assert not layers(gm, "PromptBorder")
    assert len(layers(gm, "PromptTokens")) == 5
