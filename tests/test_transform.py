"""Rewritten models: equal at the start, trainable, and ordinary modules."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from slow import fast
from small_models import small_model
from torch import nn

import s2a_fx

REWRITING = ["bias+lrp", "bias+lrp+lsb", "s2a-paper"]


@pytest.mark.parametrize("recipe", fast(REWRITING, "s2a-paper"))
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


def _draw_and_fail(gm):
    torch.rand(3)
    raise s2a_fx.PassError("no")


@pytest.mark.parametrize("recipe", ["s2a", "lora+compress", "s2a-max", (_draw_and_fail,)])
def test_the_random_state_stays_as_it_was(vit, recipe):
    model, x = vit
    before = torch.get_rng_state()
    for run in (s2a_fx.transform, lambda *args: s2a_fx.compare(*args[:2], [args[2]])):
        with nullcontext() if isinstance(recipe, str) else pytest.raises(s2a_fx.PassError):
            run(model, (x,), recipe)
        assert torch.equal(torch.get_rng_state(), before)


def test_new_parameters_depend_on_the_seed(vit):
    model, x = vit
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(s2a_fx.transform(model, (x,), "s2a").state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    assert not all(torch.equal(found[0][name], value) for name, value in found[2].items())


class _Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.fc = nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x + self.shift)


class _Joined(_Sum):
    def forward(self, x):
        return torch.cat([self.fc(x), self.fc(self.shift.expand(2, 8))], 1)


@pytest.mark.parametrize("model", [_Sum(), _Joined(), s2a_fx.transform(_Sum(), torch.randn(2, 8), "bias")], ids=str)
def test_inputs_of_a_wrong_shape_are_one_error_and_no_log(model, capfd):
    wrong = torch.randn(3, 8) if isinstance(model, _Joined) else torch.randn(2, 9)
    for run in (s2a_fx.transform, s2a_fx.analyze, s2a_fx.compare):
        with pytest.raises(s2a_fx.InputError, match="does not take inputs of shape"):
            run(model, (wrong,))
    assert capfd.readouterr().err == ""
