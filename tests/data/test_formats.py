"""Every format on a small file made by hand: the samples, and what is skipped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vrlt_fast.data.formats.base import Context, Output
from vrlt_fast.data.formats.convert import FORMATS, read_format
from vrlt_fast.data.formats.media import Media, read_durations
from vrlt_fast.data.readers import read_jsonl, to_json, write_jsonl
from vrlt_fast.errors import Problem, VideoError

HERE = Path(__file__).parent / "formats"
WHEN = "When does this happen in the video: "


def seconds_of(path: str) -> float:
    """Every video lasts 20 s, but those that can't be read."""
    if "broken" in path:
        raise VideoError(Problem("VRLT-V02", "file can't be opened", path))
    return 20.0


def read(name: str, file: str, **more: object) -> Output:
    return read_format(name, HERE / file, Context(duration_of=seconds_of, **more))


def short(out: Output) -> list[dict]:
    """The samples as they are written, but without their source."""
    assert not out.problems, out.problems
    return [{key: value for key, value in to_json(sample).items() if key != "source"} for sample in out.samples]


def line(name: str, key: str, video: str, seconds: float, task: str, question: str, **more: object) -> dict:
    given = {"id": f"{name}-{key}", "video": video, "duration": seconds, "task": task, "question": question}
    return {**given, **more}


def test_charades_sta():
    out = read("charades_sta", "charades_sta.txt", durations=read_durations(HERE / "durations.csv"))
    assert short(out) == [
        line("charades_sta", "KITE1-1", "KITE1.mp4", 12.0, "grounding", WHEN + "a girl lets the kite go.",
             spans=[[2.0, 6.5]]),
        line("charades_sta", "KITE1-2", "KITE1.mp4", 12.0, "grounding", WHEN + "the kite lands in a tree.",
             spans=[[7.25, 12.0]]),
        line("charades_sta", "OVEN2-1", "OVEN2.mp4", 20.0, "grounding", WHEN + "someone bakes bread.",
             spans=[[0.0, 20.0]]),
        line("charades_sta", "OVEN2-2", "OVEN2.mp4", 20.0, "grounding", "is the oven opened?", spans=[[11.0, 14.0]]),
    ]  # fmt: skip
    assert [sample.line for sample in out.samples] == [f"charades_sta.txt:{n}" for n in (1, 2, 3, 5)]
    assert out.changed == Counter({"spans cut at the border of their video": 1})


def test_activitynet_captions():
    out = read("activitynet_captions", "activitynet_captions.json", split="val")
    name = "activitynet_captions-val"
    assert short(out) == [
        line(name, "v_boat-1", "v_boat.mp4", 30.0, "grounding", WHEN + "A boat leaves the pier.", spans=[[0.0, 4.5]]),
        line(name, "v_boat-2", "v_boat.mp4", 30.0, "grounding", WHEN + "It sails around a buoy.", spans=[[5.0, 29.5]]),
        line(name, "v_clay-1", "v_clay.mp4", 18.25, "grounding", WHEN + "Two hands shape a bowl.",
             spans=[[3.0, 18.25]]),
        line(name, "v_snow-1", "v_snow.mp4", 9.0, "grounding", WHEN + "A dog eats snow.", spans=[[1.0, 2.0]]),
    ]  # fmt: skip
    assert {sample.source for sample in out.samples} == {"activitynet_captions"}
    assert [sample.line for sample in out.samples] == [f"activitynet_captions.json:{n}" for n in (2, 2, 3, 4)]


def test_time_r1():
    out = read("time_r1", "time_r1.json", media=Media(strip="./sets/"))
    assert short(out) == [
        line("time_r1", "my|boat|1", "clips/boat.mp4", 30.5, "grounding", WHEN + "a boat turns around",
             spans=[[4.0, 9.5]], difficulty=0.75),
        line("time_r1", "my|clay|2", "clips/clay_00:00:05:000.mp4", 18.0, "grounding", WHEN + "hands shape a bowl",
             spans=[[0.0, 18.0]]),
        line("time_r1", "my|snow|3", "clips/snow.mp4", 9.0, "grounding", "When does the dog bark?",
             spans=[[1.0, 2.0]], difficulty=0.0),
    ]  # fmt: skip


def test_rextime():
    out = read("rextime", "rextime.jsonl")
    assert short(out) == [
        line("rextime", "anet_7", "v_girl.mp4", 40.0, "grounding",
             WHEN + "The girl ties a knot before ___ the boat leaves.", spans=[[10.0, 40.0]]),
        line("rextime", "qvh_8", "man_60.0_120.0.mp4", 60.0, "grounded_qa", "Why does the man wave?",
             options=["to stop a bus", "to greet", "to dance", "to swim"], answer="A", spans=[[1.0, 9.5]]),
        line("rextime", "qvh_9", "rain_1.mp4", 12.0, "grounding", "Why does it rain inside?", spans=[[0.0, 3.0]]),
    ]  # fmt: skip
    assert out.changed == Counter({"spans cut at the border of their video": 1, "overlapping spans joined": 1})


def test_stvg_r1():
    ask = "Which numbered object is this about, and when does it happen: "
    assert short(read("stvg_r1", "stvg_r1.json")) == [
        line("stvg_r1", "yard_12-1", "yard_12.mp4", 20.0, "instance", ask + "The man in the hat sits down.",
             spans=[[2.0, 5.0]], object_id=3),
        line("stvg_r1", "yard_13-1", "yard_13.mp4", 10.0, "instance", ask + "A child runs.", spans=[[0.0, 4.0]],
             object_id=0),
        line("stvg_r1", "yard_13-2", "yard_13.mp4", 10.0, "instance", ask + "The other child falls.",
             spans=[[6.0, 10.0]], object_id=7),
        line("stvg_r1", "yard_14-1", "yard_14.mp4", 8.0, "instance", ask + "A cat jumps.", spans=[[1.0, 2.0]],
             object_id=1),
    ]  # fmt: skip


def test_temporal_r1():
    out = read("temporal_r1", "temporal_r1.json")
    assert short(out) == [
        line("temporal_r1", "temporal_r1-1", "KITE1.mp4", 12.0, "grounding", WHEN + "a girl lets the kite go",
             spans=[[3.0, 6.0]]),
        line("temporal_r1", "temporal_r1-2", "KITE2.mp4", 10.0, "grounding", WHEN + "the kite lands",
             spans=[[5.0, 10.0]]),
        line("temporal_r1", "temporal_r1-3", "OVEN2.mp4", 40.0, "grounding", "When is it hot?", spans=[[0.0, 5.0]]),
    ]  # fmt: skip
    assert [sample.source for sample in out.samples] == ["kites", "kites", "ovens"]


def test_a_list_of_temporal_r1_files():
    out = read("temporal_r1", "temporal_r1.yaml")
    assert not out.problems
    assert [(s.id, s.video, s.line) for s in out.samples] == [
        ("temporal_r1-temporal_r1-1", "footage/kites/KITE1.mp4", "temporal_r1.json:2"),
        ("temporal_r1-temporal_r1-2", "footage/kites/KITE2.mp4", "temporal_r1.json:3"),
        ("temporal_r1-temporal_r1_more-3", "footage/boats/boat3.mp4", "temporal_r1_more.json:4"),
        ("temporal_r1-temporal_r1_more-4", "footage/boats/boat4.mp4", "temporal_r1_more.json:5"),
        ("temporal_r1-temporal_r1_more-5", "footage/boats/boat5.mp4", "temporal_r1_more.json:6"),
    ]


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [("first:2", [1, 2]), ("end:1", [5]), ("40%", [1, 2]), ("first:9", [1, 2, 3, 4, 5]), ("end:50%", [3, 4, 5]),
     ("first:0", []), ("100%", [1, 2, 3, 4, 5]), ("1%", [1])],
)  # fmt: skip
def test_strategies(strategy: str, taken: list[int], tmp_path: Path):
    text = f"datasets:\n- json_path: {HERE}/temporal_r1_more.json\n  sampling_strategy: {strategy}\n"
    (tmp_path / "list.yml").write_text(text)
    out = read_format("temporal_r1", tmp_path / "list.yml")
    assert [sample.id[-1] for sample in out.samples] == [str(number) for number in taken]
    assert [problem.code for problem in out.problems] == ([] if taken else ["VRLT-D15"])


def test_random_strategy_is_the_seeds(tmp_path: Path):
    text = f"datasets:\n- json_path: {HERE}/temporal_r1_more.json\n  sampling_strategy: random:3\n"
    (tmp_path / "list.yml").write_text(text)
    drawn = [
        tuple(s.id for s in read_format("temporal_r1", tmp_path / "list.yml", Context(seed=seed)).samples)
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert len(set(drawn)) > 1


def test_video_r1():
    out = read("video_r1", "video_r1.json")
    assert short(out) == [
        line("video_r1", "1", "pond/p1.mp4", 20.0, "videoqa", "What falls into the pond?",
             options=["a stone", "a shoe", "a leaf"], answer="C", reasoning="Something green drifts down."),
        line("video_r1", "2", "pond/p2.mp4", 20.0, "number", "How many geese are there?", answer="1,204"),
        line("video_r1", "4", "pond/p4.webm", 20.0, "ocr", "What does the sign say?", answer="No swimming"),
        line("video_r1", "5", "pond/p5.mp4", 20.0, "open", "Describe the weather.", answer="It rains,\nthen stops."),
        line("video_r1", "6", "pond/p6.mp4", 20.0, "regression", "How far do they walk, in metres?", answer="12.5"),
    ]  # fmt: skip
    assert out.skipped == Counter({"about an image": 1})
    assert [sample.source for sample in out.samples] == ["ponds", "ponds", "video_r1", "video_r1", "video_r1"]


def test_tw_grpo():
    assert short(read("tw_grpo", "tw_grpo.json")) == [
        line("tw_grpo", "1", "farm/hen.mp4", 20.0, "videoqa", "what didn't the hen do",
             options=["peck", "sleep", "fly"], answer="B,C"),
        line("tw_grpo", "2", "farm/hay.mp4", 20.0, "videoqa", "Where is the hay?", options=["loft", "barn"],
             answer="A"),
        line("tw_grpo", "3", "farm/song.mp4", 20.0, "videoqa", "Who sings?", options=["the cook", "the smith"],
             answer="B"),
    ]  # fmt: skip


def test_primo_r1():
    out = read("primo_r1", "primo_r1.json")
    thought = "<planning>stack</planning><observation>two</observation><reasoning>half</reasoning>"
    assert short(out) == [
        line("primo_r1", "r1", "arm/run1.mp4", 20.0, "progress", "How much of stacking the cups is done?",
             images=["arm/run1_a.png", "arm/run1_b.png"], progress=0.45, reasoning=thought),
        line("primo_r1", "r2", "arm/run2.mp4", 20.0, "videoqa", "Is the drawer open?", options=["Yes", "No"],
             answer="B", images=["arm/run2_a.png", "arm/run2_b.png"]),
        line("primo_r1", "r3", "arm/run3.mp4", 20.0, "videoqa", "What comes next?", options=["lift", "turn"],
             answer="B"),
    ]  # fmt: skip
    assert out.skipped == Counter({"not selected": 1})


def test_seed_bench_r1():
    out = read("seed_bench_r1", "seed_bench_r1.jsonl")
    drawn, fixed = short(out)
    assert fixed == line(
        "seed_bench_r1", "s2", "videos/Galley/g2.mp4", 20.0, "videoqa", "What is next?",
        options=["cut bread", "sweep", "pour tea", "open tin"], answer="A", images=["images/Galley/g2.png"],
    )  # fmt: skip
    assert sorted(drawn["options"]) == ["boil water", "fry eggs", "peel onions", "wash the pot"]
    assert drawn["options"]["ABCD".index(drawn["answer"])] == "wash the pot"
    assert out.skipped == Counter({"about an image": 1})
    letters = {read("seed_bench_r1", "seed_bench_r1.jsonl", seed=seed).samples[0].answer for seed in range(20)}
    assert len(letters) > 1


def test_videochat_r1():
    out = read("videochat_r1", "videochat_r1.json")
    glue, track, quality, last = short(out)
    assert glue == line(
        "videochat_r1", "11_4", "11/99.mp4", 34.0, "grounded_qa", "why did the hen run",
        options=["fear", "hunger", "play"], answer="B", spans=[[1.5, 9.0], [30.0, 34.0]],
    )  # fmt: skip
    assert (track["video"], track["task"], track["question"]) == (
        "sets/track_1.mp4", "boxes", "Where is this object: red bucket",
    )  # fmt: skip
    assert [box["time"] for box in track["boxes"]] == [0.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5]
    assert track["boxes"][7] == {"time": 17.5, "x0": 0.5, "y0": 0.5, "x1": 1.0, "y1": 1.0}
    assert quality == line("videochat_r1", "3", "q/low.mp4", 20.0, "open", "How sharp is the picture?", answer="poor")
    assert (last["answer"], last["spans"]) == ("A", [[0.0, 3.0]])
    captions = short(read("videochat_r1", "videochat_charades.json"))
    assert [sample["spans"] for sample in captions] == [[[2.0, 6.5]], [[0.0, 4.0]], [[5.0, 9.0]], [[1.0, 2.0]]]


def test_nextgqa():
    out = read("nextgqa", "nextgqa_val.csv")
    assert short(out) == [
        line("nextgqa", "991-1", "991.mp4", 34.0, "grounded_qa", "why did the hen run",
             options=["fear", "hunger", "play", "rain", "noise"], answer="B", spans=[[1.2, 7.5], [30.0, 34.0]]),
        line("nextgqa", "992-3", "992.mp4", 20.0, "grounded_qa", "how did the boy, laughing, stop",
             options=["fell", "slept", "sat down", "sang", "ran"], answer="C", spans=[[0.0, 4.0]]),
        line("nextgqa", "992-5", "992.mp4", 20.0, "grounded_qa", "what was red",
             options=["hat", "shoe", "ball", "door", "cup"], answer="E", spans=[[10.0, 12.5]]),
    ]  # fmt: skip
    assert out.skipped == Counter({"no location": 1})


def test_videomme():
    name = "videomme"
    assert short(read(name, "videomme.json")) == [
        line(name, "001-1", "hEn_1.mp4", 20.0, "videoqa", "How many eggs are there?",
             options=["One.", "Two.", "Three.", "Four."], answer="C"),
        line(name, "002-1", "boAt_2.mp4", 20.0, "videoqa", "What is first?",
             options=["The sail.", "The oar.", "The rope.", "The tar."], answer="A"),
        line(name, "003-1", "piE_3.mp4", 20.0, "videoqa", "Which pie?", options=["Plum.", "Pear."], answer="B"),
        line(name, "003-2", "piE_3.mp4", 20.0, "videoqa", "Whose pie?", options=["His.", "Hers."], answer="A"),
    ]  # fmt: skip


def test_mvbench():
    out = read("mvbench", "mvbench.json")
    assert short(out) == [
        line("mvbench", "mvbench-1", "shelf/a1.mp4", 20.0, "videoqa", "Which cup is moved?",
             options=["The red one.", "The blue one."], answer="B"),
        line("mvbench", "mvbench-2", "shelf/a2.mp4", 20.0, "videoqa", "What happens?",
             options=["A fall.", "Nothing.", "A jump."], answer="A"),
    ]  # fmt: skip
    assert out.skipped == Counter({"about a part of a video": 1})


def test_mmvu():
    out = read("mmvu", "mmvu.json")
    assert short(out) == [
        line("mmvu", "validation_1", "videos/Kites/1.mp4", 20.0, "videoqa", "Which force is shown?",
             options=["lift", "drag", "weight", "thrust", "none"], answer="D"),
        line("mmvu", "validation_2", "videos/Ovens/0.mp4", 20.0, "videoqa", "Is it hot?", options=["yes", "no"],
             answer="A"),
    ]  # fmt: skip
    assert out.skipped == Counter({"open questions": 1})


def test_tempcompass():
    out, name = read("tempcompass", "tempcompass.json"), "tempcompass"
    assert short(out) == [
        line(name, "tempcompass-310-action-1", "310.mp4", 20.0, "videoqa", "What does the hen do?",
             options=["pecks", "sleeps", "flies"], answer="B"),
        line(name, "tempcompass-310-speed-1", "310.mp4", 20.0, "videoqa", "Is the video slow?",
             options=["Yes", "No"], answer="B"),
        line(name, "tempcompass-311-order-1", "311.mp4", 20.0, "videoqa", "Which caption matches the video better?",
             options=["First a hen, then a dog.", "First a dog, then a hen."], answer="A"),
        line(name, "tempcompass-311-order-2", "311.mp4", 20.0, "videoqa", "Pick one.",
             options=["It rains.", "It snows."], answer="B"),
    ]  # fmt: skip
    assert out.skipped == Counter({"captioning": 1})


def test_vst():
    out = read("vst", "vst.json")
    assert short(out) == [
        line("vst", "vst-1", "0.mp4", 20.0, "videoqa", "What did I drop?", options=["a fork", "a spoon", "a cup"],
             answer="B"),
        line("vst", "vst-2", "cut/x.mp4", 20.0, "videoqa", "Who is it?", options=["a friend", "a thief"], answer="A"),
        line("vst", "vst-3", "1.mp4", 20.0, "videoqa", "Can it be answered yet?", options=["Yes", "No"], answer="B"),
    ]  # fmt: skip
    assert out.skipped == Counter({"about a part of a video": 1, "several turns": 1, "open questions": 1})


FILES = [
    (name, file.name) for name in FORMATS for file in sorted(HERE.glob(f"{name}*"))
    if file.name not in ("temporal_r1_more.json",)
] + [("nextgqa", "nextgqa_val.csv"), ("videochat_r1", "videochat_charades.json")]  # fmt: skip


@pytest.mark.parametrize(("name", "file"), sorted(set(FILES)))
def test_what_is_written_can_be_read(name: str, file: str, tmp_path: Path):
    out = read(name, file)
    write_jsonl(out.samples, tmp_path / "out.jsonl")
    again = read_jsonl(tmp_path / "out.jsonl", check_files=False)
    assert [to_json(sample) for sample in again] == [to_json(sample) for sample in out.samples]
    assert len({sample.id for sample in again}) == len(again) >= 2
    assert all(sample.source and sample.line.startswith(file.split(".")[0]) for sample in out.samples)


def test_every_format_has_a_file():
    assert {name for name, _ in FILES} == set(FORMATS)


def test_without_durations_each_entry_says_so():
    out = read_format("charades_sta", HERE / "charades_sta.txt")
    assert not out.samples
    assert [(p.code, p.where) for p in out.problems] == [("VRLT-D15", f"charades_sta.txt:{n}") for n in (1, 2, 3, 5)]
    assert all("--durations" in problem.fix and "--videos" in problem.fix for problem in out.problems)


def test_a_video_that_cannot_be_measured_is_reported_with_the_line(tmp_path: Path):
    (tmp_path / "c.txt").write_text("broken 1 2##a.\nfine 1 2##b.\n")
    out = read_format("charades_sta", tmp_path / "c.txt", Context(duration_of=seconds_of))
    assert [(p.code, p.where) for p in out.problems] == [("VRLT-V02", "c.txt:1")]
    assert [sample.video for sample in out.samples] == ["fine.mp4"]
