"""Videos that fail in training: reported, counted, left out, never replaced; too many stop the run."""

from __future__ import annotations

import shutil
from collections import Counter, deque

import pytest

from vrlt_fast.data.readers import read_jsonl
from vrlt_fast.errors import DataError
from vrlt_fast.model.load import inspect_model
from vrlt_fast.train.feed import Feed
from vrlt_fast.video.cache import ClipLoader


@pytest.fixture
def make_feed(demo, tmp_path, make_config):
    """A feed over a copy of the demo data, the lines it warns with, and its bad videos: those with most questions."""

    def make(broken=0, **changes):
        root = shutil.copytree(demo, tmp_path / "data")
        changes["data"] = {"train": str(root / "train.jsonl"), **changes.get("data", {})}
        config = make_config(**changes)
        samples = read_jsonl(root / "train.jsonl")
        bad = [video for video, _ in Counter(s.video for s in samples).most_common(broken)]
        for name in bad:
            (root / name).write_bytes(b"not a video")
        info, lines = inspect_model(config.model.name), []
        loader = ClipLoader(config.video, info.geometry)
        return Feed(info, samples, loader, config, root=root, warn=lines.append), lines, set(bad)

    return make


def test_a_step_is_what_the_stream_says(make_feed, seed):
    feed, lines, _ = make_feed()
    expected = feed.questions(5, seed)
    stream = feed.questions(5, seed)
    for _ in range(4):
        assert [p.sample for p in feed.next(stream)] == [feed.samples[i] for i in expected.next()]
    assert not lines
    assert feed.failed == 0


def test_videos_come_with_all_their_questions(make_feed, seed):
    feed, _, _ = make_feed()
    stream = feed.videos(2, seed)
    every = {s.video for s in feed.samples}
    seen = []
    for _ in range(len(every) // 2):
        prompts = feed.next_videos(stream)
        videos = {p.sample.video for p in prompts}
        assert len(videos) == 2
        assert sorted(p.sample.id for p in prompts) == sorted(s.id for s in feed.samples if s.video in videos)
        seen += [p.sample.id for p in prompts]
    assert len(seen) == len(set(seen))
    assert len({s.video for s in feed.samples if s.id in seen}) == len(every) // 2 * 2


def test_a_bad_video_is_left_out_counted_and_named(make_feed, seed):
    feed, lines, bad = make_feed(1, data={"max_failed_share": 1.0})
    order, stream = feed.questions(4, seed), feed.questions(4, seed)
    failures = 0
    for _ in range(len(feed.samples) // 4):
        asked = [feed.samples[i] for i in order.next()]
        assert [p.sample for p in feed.next(stream)] == [s for s in asked if s.video not in bad]
        failures += bool([s for s in asked if s.video in bad])
    assert 0 < failures == feed.failed == len(lines)
    assert all("VRLT-V02" in line and next(iter(bad)) in line for line in lines)


def test_images_are_shown_and_a_bad_one_costs_its_sample_only(make_feed, seed):
    feed, lines, _ = make_feed(data={"max_failed_share": 1.0}, video={"image_max_pixels": 3136})
    shown = [i for i, s in enumerate(feed.samples) if s.images]
    bad = feed.samples[shown[0]]
    (feed._root / bad.images[0]).write_bytes(b"no picture")
    prompts = feed.next_videos(feed.videos(len({s.video for s in feed.samples}), seed))
    assert sorted(p.sample.id for p in prompts) == sorted(s.id for s in feed.samples if s != bad)
    for prompt in prompts:
        assert [m.kind for m in prompt.media] == ["image"] * len(prompt.sample.images) + ["video"]
        assert len(prompt.visual) == sum(m.n_tokens for m in prompt.media)
    assert len(lines) == feed.failed == 1
    assert "VRLT-V04" in lines[0]


def test_images_can_be_left_out(make_feed, seed):
    feed, _, _ = make_feed(prompt={"images": False})
    assert all(len(p.media) == 1 for p in feed.next_videos(feed.videos(4, seed)))


def test_a_video_counts_once_however_many_questions_it_has(make_feed):
    """Three questions about one bad video are one failed video, not the three that may stop a run."""
    feed, lines, bad = make_feed(1, data={"max_failed_share": 0.0})
    assert sum(s.video in bad for s in feed.samples) >= 3
    videos = len({s.video for s in feed.samples})
    stream = feed.videos(videos, 0)
    for step in (1, 2):
        assert not bad & {p.sample.video for p in feed.next_videos(stream)}
        assert feed.failed == len(lines) == step
    assert str(feed.state()["outcomes"]).count("1") == 2 * (videos - 1)
    with pytest.raises(DataError):
        feed.next_videos(stream)


@pytest.mark.parametrize("share", [0.05, 0.25])
def test_too_many_stop_the_run_with_exit_3(make_feed, seed, share):
    feed, lines, _ = make_feed(5, data={"max_failed_share": share})
    stream = feed.videos(2, seed)
    with pytest.raises(DataError) as caught:
        deque((feed.next_videos(stream) for _ in range(6)), maxlen=0)
    assert (caught.value.code, caught.value.exit_code) == ("VRLT-D12", 3)
    outcomes = str(feed.state()["outcomes"])
    assert len(lines) == feed.failed == outcomes.count("0") >= 3
    assert outcomes.count("0") / len(outcomes) > share
    before = outcomes[:-1]
    assert before.count("0") < 3 or before.count("0") / len(before) <= share


def test_a_prompt_that_is_too_long_is_left_out_not_cut(make_feed):
    feed, lines, _ = make_feed(data={"max_failed_share": 1.0}, rollout={"max_new_tokens": 4090})
    assert feed.next(feed.questions(2, 0)) == []
    assert len(lines) == 2
    assert all("VRLT-D10" in line for line in lines)


def test_state_round_trip(make_feed, seed):
    feed, _, _ = make_feed(2, data={"max_failed_share": 1.0})
    stream = feed.videos(7, seed)
    feed.next_videos(stream)
    feed.next_videos(stream)
    state = feed.state()
    assert 0 < feed.failed < 14
    feed.load({"failed": 0, "outcomes": ""})
    assert feed.failed == 0
    feed.load(state)
    assert feed.state() == state


def test_thinking_is_asked_where_it_is_wanted(make_feed, seed):
    feed, _, _ = make_feed()
    prompts = feed.next_videos(feed.videos(2, seed), lambda sample: sample.wants_spans)
    assert {p.asked.think for p in prompts} <= {True, False}
    for prompt in prompts:
        assert prompt.asked.think == prompt.sample.wants_spans
        assert ("<think>" in prompt.text) == prompt.sample.wants_spans


def test_one_prompt_out_of_order_counts_nothing(make_feed, seed):
    feed, lines, bad = make_feed(1)
    stream = feed.questions(3, seed)
    before = feed.state()
    for index, sample in enumerate(feed.samples[:6]):
        prompt = feed.prompt(index)
        assert (prompt is None) == (sample.video in bad)
        assert prompt is None or prompt.sample is sample
    broken = next(i for i, s in enumerate(feed.samples) if s.video in bad)
    told = len(lines)
    assert feed.prompt(broken) is None
    assert "VRLT-V02" in lines[told]
    assert feed.state() == before
    assert stream.state() == feed.questions(3, seed).state()
