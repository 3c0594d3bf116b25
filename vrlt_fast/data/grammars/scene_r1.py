"""Scene-R1 (arXiv 2506.17545): spans first, then boxes, and options.

Nothing of it is released; the paper has think and answer tags. What the answer tag holds is our choice: as in
:mod:`vrlt_fast.data.grammars.plain`.
"""

from __future__ import annotations

from vrlt_fast.data.grammars.plain import Plain

_ASKS = {task: Plain.asks[task] for task in ("videoqa", "grounding", "boxes")}


class SceneR1(Plain):
    """Spans, boxes and options."""

    name = "scene_r1"
    asks = _ASKS
