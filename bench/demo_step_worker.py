"""Times steps of the demo recipe in the checkout that PYTHONPATH names: demo_step_worker.py STAGE STEPS DATA MODEL.

Prints one JSON line a step: wall and CPU seconds. Run by ``bench/cases/demo_steps.py``, also on older checkouts.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

WARM = 3


def main(stage: str, steps: int, data: Path, model: Path) -> None:
    """Steps of one stage, the first few left out."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from vrlt_fast.config_load import load_config
    from vrlt_fast.model.load import load_model
    from vrlt_fast.recipe import recipe_path
    from vrlt_fast.report.console import Console
    from vrlt_fast.train import trainer as module
    from vrlt_fast.train.setup import read_inputs, with_absolute_paths

    with tempfile.TemporaryDirectory() as folder:
        overrides: dict[str, Any] = {
            "model.name": str(model),
            "data.train": str(data / "train.jsonl"),
            "data.eval": "",
            "train.out": folder,
            "train.stages": [stage],
            "checkpoint.every": 0,
        }
        config = with_absolute_paths(load_config([recipe_path("demo")], list(overrides.items())))
        torch.set_num_threads(config.train.threads)
        inputs = read_inputs(config)
        torch.manual_seed(0)
        run = module.Trainer(config, inputs, load_model(config.model, inputs.info), Path(folder), Console())
        run.start_log()
        made = run._make_stage(stage)
        with getattr(run, "clips", nullcontext()):
            for step in range(1, WARM + steps + 1):
                found = made.step(step)
                record: dict[str, Any] = found if isinstance(found, dict) else found[0]
                if step > WARM:
                    line = {"wall": record["seconds"], "cpu": record["cpu_seconds"]}
                    sys.stdout.write(json.dumps(line) + "\n")
        run.log.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
