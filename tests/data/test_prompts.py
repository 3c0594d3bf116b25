from __future__ import annotations

import pytest

from vrlt_fast.config import PromptConfig
from vrlt_fast.data.prompts import answer_text
from vrlt_fast.data.sample import Sample


@pytest.mark.parametrize(
    ("span", "text"),
    [((1.0, 4.5), "1.0 to 4.5"), ((1.01, 1.04), "1.01 to 1.04"), ((2.0, 2.0001), "2.0000 to 2.0001")],
)
def test_short_spans_do_not_become_empty(span: tuple[float, float], text: str):
    sample = Sample("a", "a.mp4", 9.0, "grounding", "When?", spans=(span,))
    assert answer_text(sample, PromptConfig(think=False)) == f"<answer>{text}</answer>"
