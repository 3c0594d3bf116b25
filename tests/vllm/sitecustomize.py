"""PyPI's torchvision is built for CUDA: beside a CPU torch its compiled operators don't load, and its import fails
where it describes two of them. Declaring these first lets it pass; nothing calls them.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _signature in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",):
    _LIBRARY.define(_signature)
    _LIBRARY.define(f"q{_signature}")
