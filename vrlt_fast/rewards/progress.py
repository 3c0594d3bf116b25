"""How far along an action is."""

from __future__ import annotations

import math


def progress(predicted: float | None, truth: float | None) -> float:
    """``max(0, 1 - |predicted - truth|)`` in 0..1, both as shares done (0..1); 0.0 for what isn't said or not finite.

    PRIMO-R1's reward, which has percent: 1 - |error| / 100.
    """
    if predicted is None or truth is None:
        return 0.0
    error = abs(predicted - truth)
    return max(0.0, 1 - error) if math.isfinite(error) else 0.0
