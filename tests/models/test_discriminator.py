from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from stepdistill.errors import RequestError
from stepdistill.methods.base import Follows, Frozen, Heads, Trained
from stepdistill.models.adapters import AdapterBank, lora_config
from stepdistill.models.discriminator import tap
from stepdistill.models.heads import told_of
from stepdistill.models.recompute import StopForward, recomputed
from stepdistill.models.roles import Full, Lora, Places, build_roles
from stepdistill.models.teacher import load_teacher

NEEDS = {"teacher": Frozen(), "student": Trained(), "critic": Trained(), "discriminator": Heads("critic")}
ALL = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
TRAINED = ("student", "critic", "discriminator")
CRITICS = pytest.mark.parametrize("critic", [Lora(rank=4), Full()], ids=["lora", "full"])


def made(family, perturb, features=None, critic=None, **options):
    """Roles whose every weight matters."""
    chosen = {"critic": critic, "discriminator": features and Places(features)}
    settings = {"student": Lora(rank=4)} | {name: setting for name, setting in chosen.items() if setting is not None}
    roles = build_roles(family, NEEDS, settings, **options)
    for seed, name in enumerate(TRAINED):
        perturb(roles.parameters(name), seed)
    return roles


@contextmanager
def calls(network):
    """Module name -> how often it runs to its end."""
    counted = Counter()
    count = lambda name: lambda *_: counted.update([name])
    handles = [module.register_forward_hook(count(name)) for name, module in network.named_modules()]
    yield counted
    for handle in handles:
        handle.remove()


def hooks(network):
    return [name for name, module in network.named_modules() if module._forward_hooks]


@pytest.mark.parametrize(("features", "ran"), [(("down_blocks.0",), ALL[:1]), (None, ALL[:3]),
                                               (("up_blocks.0", "down_blocks.1"), ALL[:4])])
def test_a_pass_ends_at_the_last_feature(family, inputs, perturb, features, ran):
    roles = made(family, perturb, features)
    with calls(family.network) as counted:
        logits = roles["discriminator"](*inputs)
    assert logits.shape == (3, len(features or "1")) and logits.dtype == torch.float32
    inside = lambda name: any(f"{name}.".startswith(f"{block}.") for block in ran)
    blocks = {name for name, _ in family.network.named_modules()
              if name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")}
    assert {name for name in counted if name in blocks and "." in name and not inside(name)} == set(), (
        "what lies after did not run")
    assert all(counted[block] == (block in ran) for block in ALL)
    assert not counted["conv_out"] and not counted[""] and roles.bank.active is None and not hooks(family.network)


@CRITICS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_whole_pass_gives_prediction_and_the_same_logits(family, inputs, perturb, critic, checkpointing):
    roles = made(family, perturb, ALL, critic, gradient_checkpointing=checkpointing)
    network = roles["critic"].network
    with calls(network) as counted:
        prediction, logits = roles["discriminator"].with_prediction(*inputs)
    assert all(counted[name] == 1 for name in (*ALL, "conv_out"))
    assert torch.equal(prediction.raw, roles["critic"](*inputs).raw) and prediction.t is inputs[1]
    assert torch.equal(logits, roles["discriminator"](*inputs)) and logits.shape == (3, 5)
    with torch.no_grad():                                 # adapters may be computed merged here: equal up to rounding
        torch.testing.assert_close(roles["discriminator"](*inputs), logits, rtol=1e-3, atol=1e-6)
    assert (prediction.raw - roles["teacher"](*inputs).raw).abs().max() > 1e-2 and not hooks(network)


def test_heads_read_the_critic_under_its_own_adapter(family, inputs, perturb):
    roles = made(family, perturb, ALL)
    before = roles["discriminator"](*inputs)
    perturb(roles.parameters("student"), 7)
    with roles.bank.use("student"):
        assert torch.equal(roles["discriminator"](*inputs), before) and roles.bank.active == "student"
    perturb(roles.parameters("critic"), 8)
    assert ((roles["discriminator"](*inputs) - before).abs().amax(0) > 1e-3).all()
    one = build_roles(load_teacher(family.source), NEEDS,
                      {"student": Lora(4), "discriminator": Places(("up_blocks.0",))})
    one.load_state_dict("critic", roles.state_dict("critic"))
    one.load_state_dict("discriminator", {k: v for k, v in roles.state_dict("discriminator").items()
                                          if ".up_blocks_0." in k})
    torch.testing.assert_close(one["discriminator"](*inputs)[:, 0], roles["discriminator"](*inputs)[:, 3])


@CRITICS
@pytest.mark.parametrize("features", [pytest.param(None, marks=pytest.mark.long), ALL], ids=["bottleneck", "all"])
@pytest.mark.parametrize("during", ["student", "critic", None])
def test_gradients_are_those_without_checkpointing_whatever_role_is_active(folders, inputs, perturb, critic,
                                                                           features, during):
    """The student's case, to x, and the critic's, to adapter and heads; early and whole passes in one graph."""
    found = []
    for checkpointing in (False, True):
        roles = made(load_teacher(folders["epsilon"]), perturb, features, critic, gradient_checkpointing=checkpointing)
        x, t, cond = inputs[0].clone().requires_grad_(), *inputs[1:]
        prediction, logits = roles["discriminator"].with_prediction(x, t, cond)
        early = roles["discriminator"](x.flip(0), t, cond)
        roles["student"](x, t, cond)
        with roles.bank.use(during if roles.is_lora(during) else None):
            (prediction.x0.square().mean() + logits.sigmoid().mean() + early.square().mean()).backward()
        assert all(p.grad is None for p in roles.parameters("student"))
        found.append([x.grad, *(p.grad for name in TRAINED[1:] for p in roles.parameters(name))])
    assert all(grad is not None and grad.any() for grad in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("during", ["student", None])
@pytest.mark.parametrize("leave", [True, False], ids=["early", "whole"])
def test_a_pass_can_end_within_a_checkpointed_region(perturb, during, leave):
    """A transformer checkpoints the very blocks that are tapped; here also a layer inside of one is the last."""
    names, tapped = ("student", "critic"), ("transformer_blocks.0", "transformer_blocks.1.attn.to_q")
    torch.manual_seed(0)
    network = SD3Transformer2DModel(sample_size=4, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
                                    num_attention_heads=2,
                                    joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
                                    out_channels=4)
    bank = AdapterBank(network, {name: lora_config(4, ("to_q", "to_v", "ff.net.2")) for name in names})
    for seed, name in enumerate(names):
        perturb(bank.parameters_of(name), seed, 0.3)

    def gradients():
        x = torch.linspace(-1, 1, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4).requires_grad_()
        network.zero_grad()
        with bank.use("critic"), tap(network, tapped, leave) as found:
            network(x, torch.linspace(0, 1, 2 * 5 * 16).reshape(2, 5, 16), torch.ones(2, 8),
                    torch.tensor([10.0, 900.0]))
        loss = found[tapped[0]][1].square().mean() + found[tapped[1]].tanh().mean()
        with calls(network) as again, bank.use(during):
            loss.backward()
        assert again["transformer_blocks.0.attn.to_q"] == network.gradient_checkpointing, (
            "computed again in backward, and once")
        assert not again["transformer_blocks.2"] and not again["transformer_blocks.1"], (
            "and not beyond what was asked for")
        return [x.grad, *(p.grad for p in bank.parameters_of("critic") if p.grad is not None)]

    right = gradients()
    network.enable_gradient_checkpointing(bank.checkpoint)
    left = gradients()
    assert len(right) > 4 and all(grad.any() for grad in right)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-8)
    assert not hooks(network)


def test_an_early_end_leaves_no_region_open():
    """Not even while somebody holds the exception, as a debugger does: what comes afterwards is not computed again with
    it."""
    runs = []

    class Early(nn.Module):
        def forward(self, x):
            runs.append(x.exp())
            raise StopForward

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(StopForward) as held:
        recomputed(Early(), x)
    x.exp().sum().backward()
    assert len(runs) == 1 and held.value is not None
    torch.testing.assert_close(x.grad, x.exp())


def test_silent_modules_and_errors_leave_no_hooks(family, inputs):
    run = lambda: family.predict(family.network, *inputs)
    for leave in (False, True):
        with pytest.raises(ValueError, match="down_blocks.0.attentions of this UNet2DConditionModel returned nothing"):
            with tap(family.network, ("mid_block", "down_blocks.0.attentions"), leave):
                run()
    with pytest.raises(ZeroDivisionError), tap(family.network, ("mid_block",)):
        raise ZeroDivisionError
    assert not hooks(family.network)


@pytest.mark.parametrize("compiled", ["mid_block", "down_blocks.0", ""])
def test_a_compiled_module_is_refused_by_name(family, inputs, perturb, compiled):
    roles = made(family, perturb, ("down_blocks.0", "mid_block"))
    family.network.get_submodule(compiled).compile(backend="eager")
    with pytest.raises(RequestError, match=f"{compiled or 'the whole UNet2DConditionModel'} is compiled"):
        roles["discriminator"](*inputs)
    assert not hooks(family.network)


def test_a_wrapped_network_and_a_compiled_neighbour(family, inputs):
    whole = torch.compile(family.network, backend="eager")
    with pytest.raises(RequestError, match="the whole OptimizedModule is compiled"), tap(whole, ["mid_block"]):
        pass
    family.network.up_blocks[1].compile(backend="eager")
    with tap(family.network, ["mid_block"], leave=True) as found:
        family.predict(family.network, *inputs)
    assert found["mid_block"].shape == (3, 32, 4, 4)


def test_frozen_critic_and_heads_let_gradients_through_to_x(family, inputs, perturb):
    roles = made(family, perturb, ALL, gradient_checkpointing=True)
    for name in TRAINED[1:]:
        for parameter in roles.parameters(name):
            parameter.requires_grad_(False)
    prediction = roles["student"](*inputs)
    _, logits = roles["discriminator"].with_prediction(prediction.x0, *inputs[1:])
    logits.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in roles.parameters("student"))
    own = {id(p) for p in roles.parameters("student")}
    assert all(p.grad is None for p in (*family.network.parameters(), *roles.parameters("discriminator"))
               if id(p) not in own)


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_are_float32_on_a_bfloat16_base(folders, inputs, perturb, autocast):
    roles = made(load_teacher(folders["epsilon"], dtype=torch.bfloat16), perturb, ALL, gradient_checkpointing=True)
    x, t, cond = inputs[0].clone().requires_grad_(), *inputs[1:]
    seen = []
    roles["discriminator"].heads["mid_block"].register_forward_hook(
        lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16, autocast):
        _, logits = roles["discriminator"].with_prediction(x, t, cond)
    logits.sum().backward()
    assert ({p.dtype for p in roles.parameters("discriminator")} == {torch.float32} == {logits.dtype}
            and seen == [(torch.float32,) * 2])
    assert x.grad.isfinite().all() and x.grad.any() and all(p.grad.isfinite().all()
                                                            for p in roles.parameters("discriminator"))


def test_first_values_are_a_function_of_the_seed_and_the_feature(folders):
    def heads(seed, *features):
        family, state = load_teacher(folders["epsilon"]), torch.random.get_rng_state()
        roles = build_roles(family, NEEDS, {"student": Lora(4), "discriminator": Places(features)}, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state), "making heads moved the global generator"
        return roles.state_dict("discriminator")

    one, two, other = heads(3, "mid_block"), heads(3, "up_blocks.1", "mid_block"), heads(4, "mid_block")
    assert one.keys() < two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    first = "heads.mid_block.0.weight"
    assert not torch.equal(one[first], other[first]) and not torch.equal(two["heads.up_blocks_1.0.weight"][:, :16],
                                                                         one[first][:, :16])
    assert all(value.any() for key, value in two.items() if key.endswith("weight")), (
        "a zero layer would pass no gradient on")


def test_the_discriminator_is_a_role_of_heads_alone(folders, family, inputs, perturb):
    roles = made(family, perturb, ALL)
    assert roles.names == tuple(NEEDS) == tuple(roles) and len(roles) == 4 and not roles.is_lora("discriminator")
    own = {id(p) for p in roles.parameters("discriminator")}
    assert own.isdisjoint(id(p) for name in ("student", "critic") for p in roles.parameters(name))
    state = roles.state_dict("discriminator")
    assert {id(p) for p in roles["discriminator"].heads.parameters()} == own and len(state) == len(own)
    other = build_roles(load_teacher(folders["epsilon"]), NEEDS, {"student": Lora(4), "discriminator": Places(ALL)})
    for name in TRAINED:
        other.load_state_dict(name, roles.state_dict(name))
    torch.testing.assert_close(other["discriminator"](*inputs), roles["discriminator"](*inputs))
    few = build_roles(load_teacher(folders["epsilon"]), NEEDS, {"student": Lora(4)})
    assert {key.split(".")[1] for key in few.state_dict("discriminator")} == {"mid_block"}
    with pytest.raises(ValueError, match="'discriminator'.*missing, unknown"):
        few.load_state_dict("discriminator", state)
    before = list(map(id, roles.parameters("discriminator")))
    assert list(map(id, roles.to("cpu").parameters("discriminator"))) == before


@pytest.mark.parametrize(("needs", "settings", "error", "says"), [
    (NEEDS, {"discriminator": Places(("mid_blok",))}, RequestError,
     "mid_blok.*its features are down_blocks.0.*mid_block.*up_blocks.1"),
    (NEEDS, {"discriminator": Places(())}, RequestError, "name some of down_blocks.0"),
    (NEEDS, {"discriminator": Lora(4)}, ValueError, "discriminator: heads are made at Places"),
    (NEEDS, {"critic": Places(ALL)}, ValueError, "critic: heads are made at Places"),
    (NEEDS | {"discriminator": Heads("judge")}, {}, ValueError, "'judge', which is no network: teacher, student, "
     "critic are"),
    (NEEDS | {"second": Heads("discriminator")}, {}, ValueError, "'discriminator', which is no network"),
    (NEEDS | {"slow": Follows("discriminator", 0.9)}, {}, ValueError, "'slow' follows 'discriminator'"),
    ({"teacher": Frozen(), "critic": Trained()}, {"critic": Lora(4)}, ValueError, "needs have none: teacher, critic"),
])
def test_what_cannot_be_judged_is_refused(family, needs, settings, error, says):
    given = settings | ({"student": Lora(4)} if "student" in needs else {})
    with pytest.raises(error, match=says):
        build_roles(family, needs, given)


@CRITICS
def test_heads_on_the_teacher_pass_gradients_to_the_student_s_sample_and_none_to_its_weights(folders, inputs,
                                                                                             perturb, critic):
    """The same ones with and without checkpointing, whether the student is an adapter on that network or one of its
    own."""
    found = []
    for checkpointing in (False, True):
        family = load_teacher(folders["epsilon"])
        needs = {"teacher": Frozen(), "student": Trained(), "discriminator": Heads("teacher")}
        roles = build_roles(family, needs, {"student": critic, "discriminator": Places(ALL)},
                            gradient_checkpointing=checkpointing)
        assert family.network.is_gradient_checkpointing == checkpointing
        perturb(roles.parameters("student"))
        roles["discriminator"](roles["student"](*inputs).x0, *inputs[1:]).square().sum().backward()
        own = {id(p) for p in roles.parameters("student")}
        assert all(p.grad is None for p in family.network.parameters() if id(p) not in own)
        found.append([p.grad for name in ("student", "discriminator") for p in roles.parameters(name)])
    assert all(grad is not None and grad.any() for grad in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


@CRITICS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_heads_on_pairs_see_both_states(family, inputs, perturb, critic, checkpointing):
    """Their input is what heads on single states would be given of each, one beside the other; one pass serves both."""
    needs = NEEDS | {"discriminator": Heads("critic", pair=True)}
    features = ("down_blocks.0", "mid_block")
    settings = {"student": Lora(4), "critic": critic, "discriminator": Places(features)}
    roles = build_roles(family, needs, settings, gradient_checkpointing=checkpointing)
    perturb(roles.parameters("critic"))
    x_t, t, cond = inputs
    x_r, r = x_t.flip(0).clone().requires_grad_(), t.flip(0)
    discriminator, network = roles["discriminator"], roles["critic"].network
    with calls(network) as counted:
        logits = discriminator.pair(x_r, r, x_t, t, cond)
    assert logits.shape == (3, 2) and counted["mid_block"] == 1 and not counted["conv_out"]
    maps = []
    for state, time in ((x_r, r), (x_t, t)):
        with tap(network, features) as found:
            roles["critic"](state, time, cond)
        maps.append([family.feature_map(found[name], state) for name in features])
    for k, head in enumerate(discriminator.heads.values()):
        torch.testing.assert_close(head(torch.cat([maps[0][k], maps[1][k]], 1)).mean((1, 2, 3)), logits[:, k],
                                   rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert x_r.grad.any() and all(p.grad.any() for p in roles.parameters("discriminator"))
    assert any(p.grad is not None and p.grad.any() for p in roles.parameters("critic"))


@pytest.mark.parametrize("of", ["teacher", "slow"])
def test_heads_on_networks_that_nobody_trains(family, inputs, of):
    needs = {"teacher": Frozen(), "student": Trained(), "slow": Follows("student", 0.9), "discriminator": Heads(of)}
    roles = build_roles(family, needs, {"student": Lora(4)})
    roles["discriminator"](*inputs).sum().backward()
    assert all(p.grad is not None for p in roles.parameters("discriminator"))


def test_heads_of_nodes_judge_each_its_own_times(family, inputs, perturb):
    """Each head alone, whatever the others are, on the samples that are nearest to its node; all have gradients."""
    needs = NEEDS | {"discriminator": Heads("critic", kind="tokens", nodes=4)}
    roles = build_roles(family, needs, {"student": Lora(rank=4)})
    perturb(roles.parameters("discriminator"), 3)
    x, _, cond = inputs
    judge, t = roles["discriminator"], torch.tensor([0.5, 0.001, 0.48], dtype=torch.float64)
    (logits,), told = judge(x, t, cond), told_of(cond, t)
    (heads,) = judge.heads.values()
    with tap(family.network, judge.features, leave=True) as found:
        judge.role(x, t, cond)
    feature = judge.role.teacher.feature_map(found[judge.features[0]], x).float()
    for i, node in enumerate((2, 0, 2)):
        torch.testing.assert_close(logits[i:i + 1], heads.each[node](feature[i:i + 1], told[i:i + 1]))
    logits.sum().backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert [any(p.grad.any() for p in each.parameters()) for each in heads.each] == [True, False, True, False]
