"""Shared fixtures: a printed seed, a small data set of real MP4 files, a tiny model."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton reads it when it is imported, which tests of any folder may cause
    os.environ["TRITON_INTERPRET"] = "1"


settings.register_profile("repeatable", derandomize=True, deadline=None)
if os.environ.get("VRLT_TEST_SEED") != "random":
    settings.load_profile("repeatable")


def seed_of(name: str) -> int:
    """The seed of what is named so, the same in every run, so that whether a commit passes isn't chance.
    VRLT_TEST_SEED=N is one for all, VRLT_TEST_SEED=random a fresh one each time (make test-full).
    """
    chosen = os.environ.get("VRLT_TEST_SEED")
    if chosen == "random":
        return random.SystemRandom().randrange(2**31)
    return int(chosen) if chosen else zlib.crc32(name.encode()) % 2**31


@pytest.fixture(scope="session")
def session_seed() -> int:
    """For inputs that many tests share; those print it."""
    return seed_of("session")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A test's own seed (:func:`seed_of`), printed so that a failure can be repeated."""
    value = seed_of(request.node.nodeid)
    print(f"VRLT_TEST_SEED={value}")
    return value


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads cost more than they give on models as small as the tests'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo data set of 12 + 6 clips."""
    from vrlt_fast.data.demo import build_demo

    out = tmp_path_factory.mktemp("demo") / "data"
    build_demo(out, seed=3, train_clips=12, heldout_clips=6, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tiny model as an HF folder."""
    from vrlt_fast.model.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("model") / "tiny", train_jsonl=demo / "train.jsonl", seed=1)
