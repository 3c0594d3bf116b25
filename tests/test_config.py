"""Loading the configuration: precedence, every kind of mistake, round trips."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrlt_fast.config import Config
from vrlt_fast.config_load import dump_toml, keys, load_config, read_value, suggest
from vrlt_fast.errors import ConfigError, Problem


def toml(folder: Path, text: str, name: str = "c.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(*args: object, **kwargs: object) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_later_wins(tmp_path: Path) -> None:
    one = toml(tmp_path, "[grpo]\nlr = 1e-3\nbeta = 0.5\nsteps = 7\n", "one.toml")
    two = toml(tmp_path, "[grpo]\nlr = 2e-3\nbeta = 0.25\n", "two.toml")
    config = load_config([one, two], {"grpo.lr": "3e-3"})
    assert (config.grpo.lr, config.grpo.beta, config.grpo.steps) == (3e-3, 0.25, 7)
    assert config.sft == Config().sft


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.seed", "3", 3),
        ("train.seed", "1e3", 1000),
        ("grpo.lr", "1e-6", 1e-6),
        ("grpo.lr", ".5", 0.5),
        ("grpo.beta", "0", 0.0),
        ("train.out", "2024", "2024"),
        ("model.name", "true", "true"),
        ("train.deterministic", "true", True),
        ("train.stages", "grpo", ("grpo",)),
        ("train.stages", "sft, grpo", ("sft", "grpo")),
        ("train.stages", '["grpo", "sft"]', ("grpo", "sft")),
        ("optim.betas", "0.8,0.9", (0.8, 0.9)),
        ("log.to", "", ()),
        ("prompt.system", "", ""),
        ("prompt.system", "two\nlines = 1", "two\nlines = 1"),
    ],
)
def test_override_texts(key: str, text: str, value: object) -> None:
    config = load_config(overrides={key: text})
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value


def test_overrides_may_be_values_and_pairs() -> None:
    config = load_config((), [("train.seed", 5), ("train.stages", ["grpo"])])
    assert (config.train.seed, config.train.stages) == (5, ("grpo",))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("grpo.learning_rate", ""),
        ("grpo.bta", "grpo.beta"),
        ("rolout.group_size", "[rollout]"),
        ("train.lr", "sft.lr or grpo.lr"),
        ("optim.lr", "sft.lr or grpo.lr"),
        ("model.frezze_vision", "model.freeze_vision"),
        ("grpo.group_size", "rollout.group_size"),
        ("algo.clip_low", "[grpo]"),
    ],
)
def test_unknown_key_is_suggested(key: str, hint: str) -> None:
    (problem,) = problems((), {key: "1"})
    assert problem.code == "VRLT-C01"
    assert problem.where == f"--{key}"
    assert hint in problem.why


def test_a_dropped_letter_of_any_key_is_understood(seed: int) -> None:
    rng = random.Random(seed)
    for key in rng.sample(sorted(keys()), 12):
        section, name = key.split(".")
        if len(name) < 4:
            continue
        cut = rng.randrange(len(name))
        typo = f"{section}.{name[:cut]}{name[cut + 1 :]}"
        if typo not in keys():
            assert key in suggest(typo), typo


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("grpo.lr", -1.0, "greater than 0"),
        ("grpo.lr", "fast", "number"),
        ("grpo.lr", float("nan"), "greater than 0"),
        ("grpo.lr", float("inf"), ""),
        ("grpo.steps", 1.5, "whole number"),
        ("grpo.steps", True, "whole number"),
        ("train.seed", "x", "whole number"),
        ("train.deterministic", "maybe", "true or false"),
        ("train.deterministic", 1, "true or false"),
        ("model.dtype", "half", "float32"),
        ("train.stages", "sft,dpo", "'grpo'"),
        ("train.out", 3, "text"),
        ("optim.betas", "0.9", "more"),
        ("optim.betas", "0.9,0.9,0.9", "a list of 2"),
        ("optim.betas", "0.9,1.5", ""),
        ("train.stages", "[]", ""),
        ("video.max_frames", 10**30, ""),
    ],
)
def test_bad_value(key: str, value: object, needs: str) -> None:
    (problem,) = problems((), {key: value})
    assert problem.code == "VRLT-C02"
    assert key in problem.what
    assert f"--{key}" in problem.where
    assert needs in problem.what


def test_files_are_strict(tmp_path: Path) -> None:
    found = problems([toml(tmp_path, '[grpo]\nsteps = "100"\nlr = "1e-6"\n[train]\ndeterministic = "true"\n')])
    assert [p.code for p in found] == ["VRLT-C02"] * 3


def test_all_problems_at_once_with_lines(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        "[model]\nnmae = 'x'\n\n[grpo]\nlr = -1\n# comment\nbeta = 'x'\n"
        "[vidoe]\nfps = 2\n[video]\nmin_frames = 9\nmax_frames = 8\n",
    )
    found = problems([path], {"train.sead": "1"})
    places = {(p.code, p.where.replace(str(path), "c")) for p in found}
    assert places == {
        ("VRLT-C01", "c:2"),
        ("VRLT-C02", "c:5"),
        ("VRLT-C02", "c:7"),
        ("VRLT-C01", "c:8"),
        ("VRLT-C04", "c:11, c:12"),
        ("VRLT-C01", "--train.sead"),
    }


def test_line_of_the_file_that_won(tmp_path: Path) -> None:
    one = toml(tmp_path, "[grpo]\nlr = 1.0\n", "one.toml")
    two = toml(tmp_path, "\n\n[grpo]\nlr = 'x'\n", "two.toml")
    (problem,) = problems([one, two])
    assert problem.where == f"{two}:4"


def test_section_that_is_no_table(tmp_path: Path) -> None:
    (problem,) = problems([toml(tmp_path, "grpo = 3\n")])
    assert problem.code == "VRLT-C02"
    assert "[grpo]" in problem.fix


def test_key_without_section(tmp_path: Path) -> None:
    (problem,) = problems([toml(tmp_path, "lr = 3\n")])
    assert problem.code == "VRLT-C01"
    assert "grpo.lr" in problem.why


def test_bad_files(tmp_path: Path) -> None:
    broken = toml(tmp_path, "[grpo]\nlr = 1e-6\nbeta = = 2\n", "broken.toml")
    latin = tmp_path / "latin.toml"
    latin.write_bytes('[model]\nname = "é"\n'.encode("latin-1"))
    found = problems([broken, tmp_path / "none.toml", tmp_path, latin])
    assert [p.code for p in found] == ["VRLT-C03"] * 4
    assert found[0].where == f"{broken}:3"
    assert [p.where for p in found[1:]] == [str(tmp_path / "none.toml"), str(tmp_path), str(latin)]


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_bytes(b"\xef\xbb\xbf[grpo]\r\nlr = 0.5\r\n")
    assert load_config([path]).grpo.lr == 0.5


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        ({"train.stages": "sft,sft"}, "VRLT-C04"),
        ({"rollout.group_size": 1}, "VRLT-C04"),
        ({"video.min_pixels": 200_000}, "VRLT-C04"),
        ({"prompt.system": "<|video_pad|>"}, "VRLT-C02"),
        ({"train.seed": 2**63}, "VRLT-C02"),
    ],
)
def test_contradictions(overrides: dict[str, object], code: str) -> None:
    (problem,) = problems((), overrides)
    assert problem.code == code
    assert problem.where


def test_one_response_is_enough_without_grpo() -> None:
    config = load_config((), {"rollout.group_size": 1, "train.stages": "sft"})
    assert config.rollout.group_size == 1


def test_what_a_command_needs() -> None:
    assert [p.what.split()[0] for p in problems(verb="train")] == ["model.name", "data.train"]
    assert [p.what.split()[0] for p in problems(verb="eval")] == ["model.name", "data.eval"]
    assert {p.code for p in problems(verb="train")} == {"VRLT-C04"}
    load_config((), {"model.name": "m", "data.train": "t"}, verb="train")


def test_dump_round_trips(tmp_path: Path) -> None:
    config = load_config(
        (), {"train.stages": ["grpo"], "prompt.system": 'a "b"\n\\ é', "grpo.lr": 1e-7, "log.to": "wandb"}
    )
    assert load_config([toml(tmp_path, dump_toml(config))]) == config
    assert load_config([toml(tmp_path, dump_toml(Config()))]) == Config()


def test_every_default_survives_its_own_text() -> None:
    for key, field in keys().items():
        value = field.default
        text = (
            ",".join(map(str, value))
            if isinstance(value, tuple)
            else str(value).lower()
            if value in (True, False)
            else str(value)
        )
        assert read_value(key, text) == value, key


def outcome(files: list[Path], overrides: dict[str, object]) -> Config | set[str]:
    """The configuration, or the codes of what is wrong. Any other exception fails the test."""
    try:
        return load_config(files, overrides)
    except ConfigError as error:
        return {problem.code for problem in error.problems}


@given(st.text(max_size=200))
def test_any_text_is_a_config_or_a_coded_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = outcome([path], {})
    assert found == Config() or found <= {"VRLT-C01", "VRLT-C02", "VRLT-C03", "VRLT-C04"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(sorted(keys())) | st.text(max_size=8), VALUES, max_size=4))
def test_any_override_is_a_config_or_a_coded_error(overrides: dict[str, object]) -> None:
    found = outcome([], overrides)
    assert isinstance(found, Config) or (found and found <= {"VRLT-C01", "VRLT-C02", "VRLT-C04"})
