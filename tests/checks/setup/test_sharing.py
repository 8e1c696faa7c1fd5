from __future__ import annotations

import copy

import pytest
from torch import nn

from safeloop.checks.setup.sharing import CopyIsTheOriginal
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_patterns


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def found_in(model):
    model = nn.ModuleDict(model) if isinstance(model, dict) else model
    return list(CopyIsTheOriginal.find(SetupView(model, owned_by_patterns(model, {"main": ["*"]}))))


def tied(one):
    """Another module, whose parameters are all those of `one`."""
    other = copy.deepcopy(one)
    for path, module in one.named_modules():
        for name, parameter in module._parameters.items():
            setattr(other.get_submodule(path), name, parameter)
    return other


@pytest.mark.parametrize("share", [lambda one: one, copy.copy, tied], ids=["same", "shallow copy", "all tied"])
@pytest.mark.parametrize(
    ("trained", "apart"),
    [
        ("online", "target"),
        ("policy_net", "target_net"),
        ("eval_net", "target_net"),
        ("q_network", "target_q_network"),
        ("qnetwork_local", "qnetwork_target"),
        ("actor", "actor_target"),
        ("critic", "critic_targ"),
        ("student", "teacher"),
        ("model", "ema_model"),
        ("model", "ema"),
        ("encoder", "momentum_encoder"),
        ("online_encoder", "target_encoder"),
        ("policy", "old_policy"),
        ("policy", "policyOld"),
        ("model", "ref_model"),
        ("actor", "reference"),
        ("net", "frozen_net"),
        ("dqn", "dqnTarget"),
        ("net", "slow_net"),
    ],
)
def test_a_network_kept_apart_that_is_the_trained_one_is_named(trained, apart, share):
    one = net()
    (fault,) = found_in({trained: one, apart: share(one)})
    assert (fault.code, fault.severity, fault.names) == ("SL212", "warning", (apart, trained))
    assert f"`{apart} = copy.deepcopy({trained})`" in fault.fix


def test_the_order_does_not_matter_and_the_full_names_are_told():
    one = net()
    agent = nn.Module()
    agent.q = nn.ModuleDict({"target": one, "online": one, "head": nn.Linear(2, 2)})
    (fault,) = found_in(agent)
    assert fault.names == ("q.target", "q.online")
    assert "`q.target` and `q.online` are one module, with 4 parameters" in fault.what


@pytest.mark.parametrize("names", [("critic1", "critic2"), ("critic_1", "critic_2"), ("qf1", "qf2"), ("q1", "q2")])
def test_twin_critics_that_are_one_are_named(names):
    one = net()
    assert [fault.code for fault in found_in(dict.fromkeys(names, one))] == ["SL212"]


@pytest.mark.parametrize("name", ["experts", "ensemble", "critics"])
def test_a_list_of_one_module_where_the_members_should_differ_is_named(name):
    model = nn.Module()
    model.add_module(name, nn.ModuleList([net()] * 3))
    (fault,) = found_in(model)
    assert fault.what == f"the 3 entries of `{name}` are one Sequential, with the same parameters"


def shared(*names):
    one = net()
    return dict.fromkeys(names, one)


def tied_words():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["emb"].weight
    return model


def albert():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8)] * 6)
    return model


def words_of_source_and_target():
    table = nn.Embedding(9, 4)
    return {"src_embed": table, "tgt_embed": table, "target_embed": table, "generator": nn.Linear(4, 9)}


def wrapped():
    one = net()
    return {"model": nn.Sequential(one), "module": one}


@pytest.mark.parametrize(
    "model",
    [
        {"online": net(), "target": net()},
        (lambda one: {"online": one, "target": copy.deepcopy(one)})(net()),
        (lambda one: {"student": one, "teacher": copy.deepcopy(one).requires_grad_(False)})(net()),
        shared("source_encoder", "target_encoder"),
        shared("text_encoder", "target_encoder"),
        shared("encoder", "ref_encoder"),
        shared("encoder_q", "encoder_k"),
        shared("left", "right"),
        shared("actor", "critic"),
        shared("layer1", "layer2"),
        shared("head_cls", "head_box"),
        (lambda one: {"student": one, "teacher": one})(net().requires_grad_(False)),
        tied_words(),
        albert(),
        words_of_source_and_target(),
        wrapped(),
        {"online": nn.ReLU(), "target": nn.ReLU()},
        {"q1": net(), "q2": net()},
        (lambda one: {"online": one, "target": nn.Sequential(one, nn.Linear(2, 2))})(net()),
    ],
)
def test_copies_siamese_networks_tied_weights_and_blocks_used_again_are_right(model):
    assert found_in(model) == []


def test_an_entry_that_is_none_is_no_network():
    model = nn.Module()
    model.online, model.target = net(), None
    model.register_module("teacher", None)
    assert setup_faults(SetupView(model, owned_by_patterns(model, {"main": ["*"]}))) == []
