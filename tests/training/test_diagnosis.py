"""From signals to words, on signals written by hand."""
from __future__ import annotations

import pytest

from stepdistill.methods import METHODS
from stepdistill.training.diagnosis import PATIENCE, RULES, Rule, bands_of, history, judge

FACTS = {"updates": 100, "guidance": 30.0, "train.lr": 1e-3, "critic.lr": 1e-5, "settings.critic_steps": 1,
         "settings.gan_weight": 0.1}
BANDS = {"diversity/student": [0.4, 2.0], "unfit/critic": [0.0, 0.5], "moved/student": [0.0, 0.05],
         "accuracy/discriminator": [0.3, 0.9],
         "following/student": [0.3, 1.0], "detail/student": [0.4, 2.0], "saturation/student": [0.0, 0.1],
         "spread/student": [0.4, 2.0],
         "offset/student": [0.0, 0.5], "lag/critic": [0.0, 3.0], "pace/critic": [0.1, 50.0],
         "angle/student": [-0.9, 1.0], "share/student/gan": [0.0, 0.9], "clipped/student": [0.0, 0.9]}
WELL = {"diversity/student": 0.9, "unfit/critic": 0.1, "moved/student": 0.01, "accuracy/discriminator": 0.7,
        "drift/teacher": 0.0, "leak/teacher": 0.0,
        "following/student": 0.9, "detail/student": 1.0, "unheard/student": 0.0, "variation/discriminator": 1.0,
        "moved/discriminator": 0.01}


def rows(*values, every=10, **signals):
    """A row a value of each signal, at steps 0, 10, 20, ...; what is not given is well."""
    count = max(map(len, signals.values()))
    return [{"step": i * every} | WELL | {name.replace("__", "/"): series[i] for name, series in signals.items()
                                          if i < len(series)} for i in range(count)]


def names(found):
    return [finding.name for finding in found]


SICK = [("unfit__critic", 0.9, "critic lags", "raise critic_steps from 1 to 5, or raise critic.lr from 1e-05"),
        ("pace__critic", 1e-4, "critic lags", "raise critic_steps from 1 to 5"),
        ("lag__critic", 9.0, "critic lags", "raise critic_steps from 1 to 5"),
        ("moved__student", 0.4, "rate too high", "lower train.lr from 0.001 to 0.0001"),
        ("saturation__teacher", 0.5, "guidance too high", "lower guidance from 30 to 7.5"),
        ("unheard__student", 0.01, "wrong adapter", "which adapter is active"),
        ("variation__discriminator", 0.0, "dead discriminator", "smaller discriminator.lr"),
        ("moved__discriminator", 0.0, "dead discriminator", "raise train.lr from 0.001, or give the discriminator "
         "a rate of its own"),
        ("skipped__student", 0.9, "overflow", "train.precision: bf16 or fp32"),
        ("moved__student", 0.0, "frozen student", "whether the student's loss reaches its weights"),
        ("leak__teacher", 1e-5, "gradients reach the teacher", "torch.no_grad()"),
        ("drift__teacher", 0.1, "the teacher changes", "frozen"),
        ("diversity__student", 0.01, "one picture for all", "lower gan_weight from 0.1"),
        ("detail__student", 0.01, "constant pictures", "lower train.lr"),
        ("following__student", -0.5, "wrong captions", "captions of the data"),
        ("accuracy__discriminator", 0.99, "discriminator wins", "lower train.lr"),
        ("saturation__student", 0.5, "saturated", "guidance"), ("spread__student", 5.0, "too wide", "train.lr"),
        ("spread__student", 0.1, "too narrow", "train.lr"),
        ("offset__student", 2.0, "off centre", "train.lr"), ("angle__student", -0.99, "terms pull apart", "weights"),
        ("share__student__gan", 0.99, "one term drowns the others", "weight"),
        ("clipped__student", 1.0, "always clipped", "train.clip")]


@pytest.mark.parametrize(("signal", "value", "name", "helps"), SICK)
def test_each_sickness_is_named_once_it_has_lasted(signal, value, name, helps):
    after = lambda count: judge(rows(**{signal: [WELL.get(signal.replace("__", "/"), 0.0 if "saturation" in signal
                                                          else 0.5)] * 3 + [value] * count}), BANDS, FACTS)
    found = after(PATIENCE)
    assert names(found) == [name], found
    assert (found[0].since, found[0].found) == (30, 20 + 10 * PATIENCE) and helps in found[0].helps
    assert f"{name}: " in found[0].words and "(since step 30). What helps: " in found[0].words
    assert after(PATIENCE - 1) == []


def test_every_rule_is_of_a_sickness_above():
    assert {rule.name for rule in RULES} == {name for _, _, name, _ in SICK}


def test_a_look_within_the_band_begins_the_count_anew():
    assert judge(rows(unfit__critic=[0.1, 0.9, 0.9, 0.1, 0.9, 0.9]), BANDS, FACTS) == []
    assert names(judge(rows(unfit__critic=[0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9]), BANDS, FACTS)) == ["critic lags"]


def test_a_young_student_is_given_time_but_not_where_no_healthy_run_is_so():
    young = rows(diversity__student=[0.05] * 4, every=5)                  # 15 of 100 updates
    assert (judge(young, BANDS, FACTS) == [] and names(judge(young, BANDS, FACTS | {"updates": 15}))
            == ["one picture for all"])
    assert names(judge(rows(leak__teacher=[1.0] * 3, every=1), BANDS, FACTS)) == ["gradients reach the teacher"]


def test_what_is_not_finite_is_said_at_once_and_alone():
    found = judge([*rows(unfit__critic=[0.9] * 6), {"step": 60, "not_finite": "student/gan of step 57 is nan. It "
                                                    "arises in ToyNetwork.out (Linear)."}], BANDS, FACTS)
    assert (names(found) == ["overflow"] and "ToyNetwork.out (Linear)" in found[0].words
            and "train.precision: fp32" in found[0].helps)


def test_a_slow_collapse_is_told_before_the_band_is_left():
    falling = [0.9, 1.0, 1.0, 0.98, 0.9, 0.8, 0.7, 0.58, 0.55, 0.5]
    found = judge(rows(diversity__student=[1.0, 1.0, *falling]), BANDS, FACTS)
    assert names(found) == ["diversity falls"] and found[0].since == 80 and "0.50 as far apart" in found[0].says
    assert judge(rows(diversity__student=[1.0, 1.0, *falling[:-1]]), BANDS, FACTS) == []
    assert judge(rows(diversity__student=[1.0, 1.0, *falling, 0.55, 0.6, 0.62]), BANDS, FACTS) == [], "it has come back"
    assert judge(rows(diversity__student=[0.1, 0.2, 0.45, 0.55, 0.6, 0.8, 0.9]), BANDS, FACTS) == [], (
        "a student that is on its way up")


def test_a_history_holds_what_is_over():
    signals = rows(unfit__critic=[0.1] * 2 + [0.9] * 4 + [0.1] * 4)
    assert judge(signals, BANDS, FACTS) == []
    assert [(f.name, f.since, f.found) for f in history(signals, BANDS, FACTS)] == [("critic lags", 20, 50)]


def test_signals_without_a_band_are_not_judged():
    assert judge(rows(unfit__critic=[0.99] * 9, share__student__other=[1.0] * 9), {}, FACTS) == []
    assert judge([], BANDS, FACTS) == []


def test_every_method_has_bands_of_its_own_runs_and_a_new_one_all_of_theirs():
    hull = bands_of("of no table")
    for method in METHODS:
        for signal, (low, high) in bands_of(method).items():
            assert low <= high and hull[signal][0] <= low and high <= hull[signal][1], (method, signal)
        assert {"diversity/student", "spread/student", "following/student", "moved/student",
                "detail/student"} <= bands_of(method).keys(), method


def test_an_edge_is_the_rules_own_or_the_bands():
    rule = Rule("x", "moved/", "high", "", lambda facts, role: "")
    assert rule.edge(BANDS, "moved/student") == 0.05 and rule.edge(BANDS, "moved/critic") is None
