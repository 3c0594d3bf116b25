"""Rewards of the user's own: what they get, what they may return, what becomes of the rest."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from vrlt_fast.data.sample import Box, Instance, Moment, Sample
from vrlt_fast.errors import ConfigError
from vrlt_fast.rewards.base import Response, total
from vrlt_fast.rewards.user import UserRewards, number

FULL = Sample(
    "a", "v.mp4", 9.5, "open", "Why? \u00e4", ("x", "y"), "A", ((0.0, 1.5), (2.0, 3.0)), ("i.png",),
    (Box(0.0, 0.1, 0.2, 0.3, 0.4),), 3, 0.25, (Instance(3, (Box(1.0, 0.0, 0.0, 1.0, 1.0),)),), 0.5, "set", "because",
    (Moment(0.0, 1.0, "opens"),), "train.jsonl:7",
)  # fmt: skip
EMPTY = Sample("b", "w.mp4", 1.0, "grounding", "When?", spans=((0.0, 1.0),))
MODULE = """
import os, time

def length(response, sample):
    return len(response.text)

def moody(response, sample):
    match response.text:
        case "hang": time.sleep(60)
        case "exit": os._exit(3)
        case "raise": raise KeyError("gone")
        case "nan": return float("nan")
        case "huge": return 10 ** 400
        case "text": return "1"
        case "none": return None
    return response.n_tokens

class Scorer:
    def __call__(self, response, sample):
        return True

    @staticmethod
    def inner(response, sample, more=2):
        return more

scorer = Scorer()
three = lambda response, sample, more: 0
number = 7

async def later(response, sample):
    return 1
"""
SAME = """
WANTED = {wanted}

def same(response, sample):
    hash(sample)
    return repr((response, sample)) == WANTED[int(response.text)]
"""


def said(*texts):
    return [Response(text, i + 1, "stop") for i, text in enumerate(texts)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_rewards.py").write_text("import nowhere_at_all\n", encoding="utf-8")
    (tmp_path / "torn_rewards.py").write_text("def f(:\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
class TestInProcesses:
    def test_they_get_the_response_and_the_whole_sample(self):
        responses = [Response("0", 5, "length"), Response("1", 6, "stop"), Response("1", 6, "length")]
        wanted = [repr((responses[i], sample)) for i, sample in enumerate([FULL, EMPTY])]
        Path("same_rewards.py").write_text(SAME.format(wanted=wanted), encoding="utf-8")
        with UserRewards(["same_rewards:same"]) as rewards:
            found = rewards.score(responses, [FULL, EMPTY, EMPTY])
        assert [parts["user:same_rewards:same"] for parts in found] == [1.0, 1.0, 0.0]

    def test_failures_are_defined_and_counted(self):
        warnings = []
        rewards = UserRewards(["own_rewards:moody", "own_rewards:length"], [2.0, 0.5], 0.2, warnings.append, workers=1)
        responses = said("a", "hang", "exit", "raise", "nan", "huge", "text", "none", "raise", "bc")
        with rewards:
            rewards.check()
            found = rewards.score(responses, [EMPTY] * len(responses))
        values = [parts["user:own_rewards:moody"] for parts in found]
        assert values == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10.0]
        assert [parts["user:own_rewards:length"] for parts in found] == [1, 4, 4, 5, 3, 4, 4, 4, 5, 2]
        assert rewards.counts == {"timeout": 1, "crash": 1, "exception": 2, "type": 2, "nan": 2}
        assert total(found[9], rewards.weights) == 2.0 * 10 + 0.5 * 2
        assert sorted(text.split(": ")[1] for text in warnings) == ["crash", "exception", "nan", "timeout", "type"]
        (raised,) = [text for text in warnings if ": exception: " in text]
        assert "KeyError: 'gone' (" in raised
        assert "own_rewards.py:11)" in raised

    def test_methods_and_objects_are_functions_too(self):
        with UserRewards(["own_rewards:scorer", "own_rewards:Scorer.inner"]) as rewards:
            rewards.check()
            assert rewards.score(said("x"), [FULL]) == [
                {"user:own_rewards:scorer": 1.0, "user:own_rewards:Scorer.inner": 2.0}
            ]

    @pytest.mark.parametrize(
        ("names", "whys"),
        [
            (["own_rewards:length", "own_rewards:lenght"], ["has no attribute 'lenght'"]),
            (["own_reward:length"], ["No module named 'own_reward'"]),
            (["own_rewards:three", "own_rewards:later"], ["can't be called with a response and a sample", "async"]),
            (["own_rewards:number"], ["is a int, not a function"]),
            (["broken_rewards:f"], ["No module named 'nowhere_at_all' ("]),
            (["torn_rewards:f"], ["SyntaxError"]),
        ],
    )
    def test_check_says_what_cannot_be_loaded(self, names, whys):
        with UserRewards(names) as rewards, pytest.raises(ConfigError) as caught:
            rewards.check()
        assert [p.code for p in caught.value.problems] == ["VRLT-W01"] * len(whys)
        for problem, why in zip(caught.value.problems, whys, strict=True):
            assert problem.where == "reward.user"
            assert why in problem.why
            assert "def function(response, sample)" in problem.fix

    def test_a_module_that_breaks_later_earns_0(self):
        with UserRewards(["own_rewards:lenght"], warn=lambda text: None) as rewards:
            found = rewards.score(said("a", "b", "c"), [FULL] * 3)
        assert [list(parts.values()) for parts in found] == [[0.0]] * 3
        assert rewards.counts["crash"] == 3


@pytest.mark.parametrize("name", ["length", "a:b:c", ":f", "m:", "m:f()", "../m:f", "m f:g", "m:f\n"])
def test_names_that_are_none(name):
    with pytest.raises(ConfigError) as caught:
        UserRewards([name])
    assert caught.value.code == "VRLT-W01"
    assert caught.value.exit_code == 2


def test_a_name_twice():
    with pytest.raises(ConfigError, match="twice"):
        UserRewards(["m:f", "m:g", "m:f"])


def test_without_functions_there_are_no_parts():
    assert UserRewards([]).score(said("a"), [FULL]) == [{}]
    assert UserRewards(["m:f"]).score([], []) == []


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1, 1.0), (True, 1.0), (-0.5, -0.5), (Fraction(1, 4), 0.25), (np.float32(0.5), 0.5), (np.int64(3), 3.0),
        (np.bool_(True), 1.0), (np.array(0.25), 0.25), (torch.tensor(0.75), 0.75),
        (math.nan, "nan"), (math.inf, "nan"), (-math.inf, "nan"), (10**400, "nan"), (np.float32("inf"), "nan"),
        ("1", "type"), (None, "type"), ([1.0], "type"), (np.ones(1), "type"), (torch.ones(1), "type"), (1j, "type"),
        ({"score": 1.0}, "type"),
    ],
)  # fmt: skip
def test_what_counts_as_a_number(value, wanted):
    found = number(value)
    assert (found["kind"] or found["value"]) == wanted
