"""Checkpoints: one folder of safetensors and JSON that ``from_pretrained`` opens and that training resumes from.

``<folder>/`` is an ordinary HF model folder (config, weights and their index, tokenizer files) plus ``trainer/``
(optimizer moments and random states, safetensors), ``trainer_state.json`` and ``COMMIT.json`` (manifest, written last).

Tensors are written by torch's HuggingFaceStorageWriter without a process group, which names the files
``model-00001-of-0000N.safetensors`` with ``model.safetensors.index.json`` beside them, also in ``trainer/`` and also
for one file. Where processes share the weights each writes what it has of ``trainer/``, into files
``shard-0000R-model-00001-of-00001.safetensors``, and the first one the whole weights: ``from_pretrained`` opens every
checkpoint. Any number of processes reads both. Consolidation isn't used: torch 2.13 turns 0-dim tensors into zeros.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.model.lora import has_lora, merged
from vrlt_fast.parallel.replicas import Replicas
from vrlt_fast.parallel.weights import like, local
from vrlt_fast.train.manifest import checkpoint_name, latest_checkpoint, prune, publish, verify
from vrlt_fast.train.tensor_files import read_into, read_tensors, stored_tensors, write_shards, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vrlt_fast.train.optim import MasterAdamW

__all__ = [
    "LoadedState",
    "checkpoint_name",
    "latest_checkpoint",
    "load_checkpoint",
    "load_optimizer_tensors",
    "load_rng_tensors",
    "load_shards",
    "load_weights_into",
    "optimizer_tensors",
    "prune",
    "rng_tensors",
    "save_checkpoint",
]

TRAINER = "trainer"
STATE = "trainer_state.json"

_SLACK_BYTES = 1_000_000  # headers, indices and JSON
_SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_SIDE_EXCLUDED = {"config.json", "generation_config.json", STATE, "COMMIT.json"}


@dataclass(frozen=True)
class LoadedState:
    """What :func:`save_checkpoint` was given: ``tensors`` on the CPU, and ``state``."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer_files: Path,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    writers: Replicas | None = None,
) -> None:
    """Write a checkpoint, complete or not at all; an existing ``folder`` is replaced.

    Args:
        folder: ``checkpoints/<stage>-<step>``, see :func:`checkpoint_name`.
        model: weights keep their dtypes; tied ones are stored once.
        tokenizer_files: folder of the source model; tokenizer, preprocessor and chat template files are copied.
        tensors: by flat name, any dtype and shape, any device.
        state: JSON values only (no NaN).
        writers: all processes of the run, where they have shards of ``tensors``; all of them call it together. The
            first one's model, files, state and whole tensors are what is written.

    Raises:
        SetupError: VRLT-R03 no space, VRLT-R02 not writable; nothing is left behind and other checkpoints are intact.
        TypeError, ValueError: ``state`` isn't JSON; nothing was written.
    """
    if writers is not None and not writers.first:
        place = writers.gather("")[0]
        write_shards({name: t for name, t in tensors.items() if isinstance(t, DTensor)}, Path(place) / TRAINER)
        return
    text = json.dumps(dict(state), indent=1, allow_nan=False) + "\n"
    weights = _stored_weights(model)
    side_files = list(_side_files(tokenizer_files))
    needed = sum(tensor.nbytes for group in (weights, tensors) for tensor in group.values())
    needed += sum(path.stat().st_size for path in side_files) + len(text) + _SLACK_BYTES
    with publish(folder, needed) as tmp:
        for path in side_files:
            target = tmp / path.relative_to(tokenizer_files)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        _write_configs(model, tmp)
        write_tensors(weights, tmp)
        (tmp / TRAINER).mkdir()
        if writers is None:
            write_tensors(tensors, tmp / TRAINER)
        else:
            writers.gather(str(tmp))
            write_shards(tensors, tmp / TRAINER)
        (tmp / STATE).write_text(text, encoding="utf-8")


def load_checkpoint(
    folder: Path, *, verified: bool = False, wanted: Callable[[str], bool] = lambda name: True
) -> LoadedState:
    """Verify all files of a checkpoint and read its trainer state.

    Args:
        verified: another process has compared the files.
        wanted: which tensors to read, by name.

    Raises:
        SetupError: VRLT-K01 naming each file that is missing, short or changed, and the checkpoint to go on from.
    """
    if not verified:
        verify(folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return LoadedState(read_tensors(folder / TRAINER, wanted), state)


def load_shards(folder: Path, optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    """What of a checkpoint's optimizer state and fp32 copies belongs to this process's shards, by name."""
    stored, tensors = stored_tensors(folder / TRAINER), {}
    for name, parameter in optimizer.parameters.items():
        keys = [f"optimizer/{name}/exp_avg", f"optimizer/{name}/exp_avg_sq"]
        keys += [f"master/{name}"] if name in optimizer.copied else []
        for key in keys:
            if key in stored:
                tensors[key] = like(torch.empty_like(optimizer.masters[name], dtype=stored[key][1]), parameter)
        step = f"optimizer/{name}/step"
        if step in stored:
            tensors[step] = torch.empty(stored[step][0], dtype=stored[step][1])
    read_into(tensors, folder / TRAINER)
    return {name: local(tensor) for name, tensor in tensors.items()}


def load_weights_into(folder: Path, model: PreTrainedModel, *, verified: bool = False) -> None:
    """Copy a checkpoint's weights into ``model`` in place, on whatever device it is. Bitwise: dtypes must agree.

    ``verified=True`` skips the manifest where :func:`load_checkpoint` has just compared it.

    Raises:
        SetupError: VRLT-K01 as :func:`load_checkpoint`; VRLT-M04 names, shapes or dtypes are not the model's.
    """
    if not verified:
        verify(folder)
    weights = _fillable_weights(model)
    stored = stored_tensors(folder)
    wrong = [f"{name} is not in the checkpoint" for name in weights.keys() - stored.keys()]
    left = stored.keys() - weights.keys()
    wrong += [f"{name} is not in the model" for name in (left - _stored_weights(model).keys() if left else ())]
    for name in weights.keys() & stored.keys():
        (shape, dtype), weight = stored[name], weights[name]
        if (shape, dtype) != (tuple(weight.shape), weight.dtype):
            wrong.append(f"{name} is {shape} {dtype}, the model has {tuple(weight.shape)} {weight.dtype}")
    if wrong:
        why = _first_of(wrong)
        fix = "resume with the model.name and model.dtype of the checkpoint's run"
        raise SetupError(Problem("VRLT-M04", "weights do not fit the model", str(folder), why, fix))
    read_into(weights, folder)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    shards: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """State of an AdamW optimizer under names that don't depend on the parameters' order.

    Args:
        parameters: name to parameter, as ``dict(model.named_parameters())``; more than the optimizer's is fine.
        shards: the model's parameters by the same names, where the optimizer has shards of them: the state is sharded
            in the same way.

    Returns:
        ``optimizer/<name>/{step,exp_avg,exp_avg_sq}``; a parameter that was never updated has ``step`` 0 only.
    """
    tensors = {}
    for name, parameter in _optimized(optimizer, parameters).items():
        state = optimizer.state.get(parameter) or {"step": torch.zeros(())}
        for key, value in state.items():
            tensor = torch.as_tensor(value).detach()
            tensors[f"optimizer/{name}/{key}"] = like(tensor, shards[name]) if shards and tensor.ndim else tensor
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Inverse of :func:`optimizer_tensors`, bitwise. Other entries of ``tensors`` are ignored; hyper-parameters stay.

    Raises:
        SetupError: VRLT-K01 a parameter is missing, unknown, or of another shape; the optimizer is then unchanged.
    """
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            name, _, entry = key.removeprefix("optimizer/").rpartition("/")
            stored.setdefault(name, {})[entry] = tensor
    optimized = _optimized(optimizer, parameters)
    wrong = [f"{name} is missing" for name in optimized.keys() - stored.keys()]
    wrong += [f"{name} isn't optimized in this run" for name in stored.keys() - optimized.keys()]
    for name in optimized.keys() & stored.keys():
        wrong += _misfit(name, stored[name], optimized[name])
    if wrong:
        why = _first_of(wrong)
        fix = "resume with the configuration of the checkpoint's run (model and stage sections)"
        raise SetupError(Problem("VRLT-K01", "optimizer state doesn't fit the model", "trainer/", why, fix))
    on_device = {id(p) for g in optimizer.param_groups if g.get("capturable") or g.get("fused") for p in g["params"]}
    for name, parameter in optimized.items():
        entries = stored[name]
        if "exp_avg" not in entries:
            optimizer.state.pop(parameter, None)
            continue
        state = {key: value.to(parameter.device, copy=True) for key, value in entries.items()}
        if id(parameter) not in on_device:
            state["step"] = entries["step"].to("cpu", copy=True)
        optimizer.state[parameter] = state


def rng_tensors() -> dict[str, torch.Tensor]:
    """States of Python's ``random``, torch's CPU generator and each CUDA device's, as uint8 under ``rng/``."""
    python = json.dumps(random.getstate()).encode()
    tensors = {"rng/python": torch.frombuffer(bytearray(python), dtype=torch.uint8), "rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def load_rng_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Inverse of :func:`rng_tensors`. States of CUDA devices that this machine lacks are left out.

    Raises:
        SetupError: VRLT-K01 the Python or the torch state is missing.
    """
    missing = [name for name in ("rng/python", "rng/torch") if name not in tensors]
    if missing:
        fix = "remove this checkpoint and resume from the previous one"
        raise SetupError(Problem("VRLT-K01", f"random state {' and '.join(missing)} missing", "trainer/", fix=fix))
    version, internal, gauss = json.loads(bytes(tensors["rng/python"].cpu().numpy()))
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(tensors["rng/torch"].cpu())
    for i in range(torch.cuda.device_count()):
        if f"rng/cuda/{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda/{i}"].cpu(), i)


def _first_of(faults: list[str], shown: int = 5) -> str:
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(sorted(faults)[:shown]) + more


def _stored_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors by their name on disk: the names of the released checkpoints, tied weights once, adapters
    merged.
    """
    from transformers.core_model_loading import revert_weight_conversion

    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        unique.setdefault(tensor.data_ptr() or -len(unique) - 1, (name, tensor))
    plain = merged(dict(unique.values()), model)
    weights: dict[str, torch.Tensor] = revert_weight_conversion(model, plain)
    return weights


def _fillable_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Those of the stored weights that a checkpoint sets: none under adapters, which are as they were loaded."""
    weights = _stored_weights(model)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    if has_lora(model):
        return {name: weight for name, weight in weights.items() if weight.data_ptr() in own}
    if any(weight.data_ptr() not in own for weight in weights.values()):
        what = f"weights of {type(model).__name__} are stored in another layout than they are used"
        raise SetupError(Problem("VRLT-M02", what, fix="open the checkpoint with from_pretrained"))
    return weights


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _side_files(source: Path) -> Iterable[Path]:
    """Files of a model folder that are neither weights nor the model's configuration."""
    folders = [source, *(p for p in source.glob("*chat_templates") if p.is_dir())]
    for path in (p for folder in folders for p in sorted(folder.iterdir())):
        legal = path.name.upper().startswith(("LICENSE", "NOTICE"))
        wanted = legal or (path.suffix in _SIDE_SUFFIXES and not path.name.endswith(".index.json"))
        if wanted and path.name not in _SIDE_EXCLUDED and path.is_file():
            yield path


def _optimized(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _misfit(name: str, entries: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> list[str]:
    if entries.keys() not in ({"step"}, {"step", "exp_avg", "exp_avg_sq"}):
        return [f"{name} has {', '.join(sorted(entries))} instead of step, exp_avg and exp_avg_sq"]
    return [
        f"{name}: {key} is {tuple(value.shape)} instead of {tuple(parameter.shape)}"
        for key, value in entries.items()
        if key != "step" and value.shape != parameter.shape
    ]
