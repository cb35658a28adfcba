"""Rewritten models: equal at the start, trainable, and ordinary modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model

import s2a_fx

REWRITING = ["bias+lrp", "bias+lrp+lsb", "s2a-paper"]


@pytest.mark.parametrize("recipe", REWRITING)
def test_output_equals_the_original_at_initialization(family, recipe):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, recipe)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-6)
    gm.eval()
    model.eval()
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(gm(x), gm(x))


def test_a_step_changes_what_trains_and_nothing_else(family):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, "s2a-paper")
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # matrices that start behind a zero factor get their first gradient in the second step
        F.cross_entropy(gm(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    unused = {n for n, p in gm.named_parameters() if p.requires_grad and torch.equal(p, before[n])}
    assert not unused
    assert all(torch.equal(p, before[n]) for n, p in gm.named_parameters() if not p.requires_grad)


def test_ten_steps_lower_the_loss(family):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, "s2a-paper")
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(gm(x), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_copies_pickles_and_state_dicts_compute_the_same(family):
    model, x = small_model(family)
    gm = s2a_fx.transform(model, x, "s2a-paper").eval()
    with torch.no_grad():
        for p in gm.parameters():
            p.add_(0.01 * torch.randn_like(p))
    expected = gm(x)
    assert torch.equal(copy.deepcopy(gm)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(gm))(x), expected)
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    other = s2a_fx.transform(small_model(family)[0], x, "s2a-paper").eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_a_pass_of_one_s_own_stands_in_a_recipe(vit):
    from torch.fx.passes.infra.pass_base import PassResult

    def freeze_everything_but_the_last_bias(gm):
        for name, p in gm.named_parameters():
            p.requires_grad_(name == "head.bias")
        return PassResult(gm, True)

    gm = s2a_fx.transform(*vit, recipe=(freeze_everything_but_the_last_bias,))
    assert [n for n, p in gm.named_parameters() if p.requires_grad] == ["head.bias"]


def test_a_transformed_model_can_be_transformed_again(vit):
    gm = s2a_fx.transform(*vit, recipe="bias")
    again = s2a_fx.transform(gm, vit[1], recipe=(s2a_fx.passes.InsertLowRankPrompt(rank=2),))
    assert again.get_parameter("blocks.0.low_rank_prompt.A").shape == (17, 2)


def test_unknown_recipe_names_the_near_ones(vit):
    with pytest.raises(s2a_fx.InputError, match=r"bias\+lrp"):
        s2a_fx.transform(*vit, recipe="bias-lrp")


def test_fused_and_unfused_attention_have_alike_gradients():
    outputs = []
    for fused in (True, False):
        model, x = small_model("vit")
        for block in model.blocks:
            block.attn.fused_attn = fused
        gm = s2a_fx.transform(model, x, "s2a-paper")
        F.cross_entropy(gm(x), torch.tensor([0, 1])).backward()
        outputs.append(torch.cat([p.grad.flatten() for p in gm.parameters() if p.requires_grad]))
    assert F.cosine_similarity(*outputs, dim=0) > 0.99
