"""What the progress server is made of: its queue, its token, its configuration."""

from __future__ import annotations

import json
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vrlt_fast.cli_serve import read_token, serve_config
from vrlt_fast.config_load import dump_toml, load_config
from vrlt_fast.errors import ConfigError
from vrlt_fast.serve import check_address
from vrlt_fast.serve_model import Answer, Batches, question_of


def test_late_answers_and_full_queues():
    gate, sizes = threading.Event(), []

    def answer(prompts):
        sizes.append(len(prompts))
        gate.wait(20)
        return [Answer(0.5, str(p)) for p in prompts]

    batches = Batches(answer)
    with pytest.raises(TimeoutError):
        batches.ask("first", 0.02)
    with ThreadPoolExecutor(40) as threads:
        waiting = [threads.submit(batches.ask, i, 20) for i in range(32)]
        until = time.monotonic() + 10
        while not batches._waiting.full() and time.monotonic() < until:
            time.sleep(0.002)
        refused = threads.submit(batches.ask, "more", 20)
        assert type(refused.exception()) is queue.Full
        gate.set()
        assert [one.result() for one in waiting] == [Answer(0.5, str(i)) for i in range(32)]
    assert sizes == [1, 8, 8, 8, 8]
    batches.close()
    with pytest.raises(queue.Full):
        batches.ask("after", 20)


def test_those_that_wait_when_it_ends_are_told():
    gate, begun = threading.Event(), threading.Event()

    def answer(prompts):
        begun.set()
        gate.wait(20)
        return [Answer(0.5, "") for _ in prompts]

    batches = Batches(answer)
    with ThreadPoolExecutor(12) as threads:
        first = threads.submit(batches.ask, "first", 20)
        assert begun.wait(10)
        waiting = [threads.submit(batches.ask, i, 20) for i in range(10)]
        until = time.monotonic() + 10
        while batches._waiting.qsize() < 10 and time.monotonic() < until:
            time.sleep(0.002)
        closing = threads.submit(batches.close)
        while not batches._closed and time.monotonic() < until:
            time.sleep(0.002)
        gate.set()
        closing.result()
        assert first.result() == Answer(0.5, "")
        assert {type(one.exception()) for one in waiting} == {queue.Full}


def test_others_machines_need_a_token():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, "")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="token"):
            check_address(host, "")
        check_address(host, "t")


def test_tokens(monkeypatch):
    monkeypatch.delenv("VRLT_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("VRLT_TOKEN", " abc\n")
    assert read_token(None) == "abc"
    monkeypatch.delenv("OTHER_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="OTHER_TOKEN has no token"):
        read_token("OTHER_TOKEN")
    monkeypatch.setenv("OTHER_TOKEN", "a b")
    with pytest.raises(ConfigError) as caught:
        read_token("OTHER_TOKEN")
    assert "a b" not in str(caught.value)


def test_the_configuration_is_the_runs_or_sole_r1s(tmp_path):
    assert serve_config("model", [], {}).prompt.grammar == "sole_r1"
    assert serve_config("model", [], {"prompt.grammar": "primo_r1"}).prompt.grammar == "primo_r1"
    folder = tmp_path / "run" / "checkpoints" / "grpo-000010"
    folder.mkdir(parents=True)
    trained = load_config([], {"prompt.grammar": "primo_r1", "rollout.max_new_tokens": "99"})
    (tmp_path / "run" / "config.resolved.toml").write_text(dump_toml(trained), encoding="utf-8")
    found = serve_config(str(folder), [], {"prompt.think": "false"})
    assert (found.prompt.grammar, found.rollout.max_new_tokens, found.prompt.think) == ("primo_r1", 99, False)
    assert found.model.name == str(folder)


def test_base64_of_other_lengths():
    assert question_of(json.dumps({"task": "a", "images": ["AAAA", "AA=="]}).encode()).images == (b"\0\0\0", b"\0")
