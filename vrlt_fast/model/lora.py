"""LoRA on the language model's linear layers, by peft's layers in place: the model keeps its class and its other names.

The reference of GRPO is the same module with its adapters off, or, where a stage trained them before, with those of
that time in their place: no second model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vrlt_fast.config import LoraConfig
from vrlt_fast.errors import Problem, SetupError
from vrlt_fast.model.load import VideoLM

TRAINED = "default"


def check_lora(lora: LoraConfig, engine: str) -> None:
    """Raises SetupError E01 without peft, and C04 for an engine that has no adapters."""
    if not lora.rank:
        return
    if find_spec("peft") is None:
        fix = "pip install peft, or set lora.rank = 0"
        raise SetupError(Problem("VRLT-E01", "the package peft is not installed", "lora.rank", fix=fix))
    if engine == "vllm":
        what, fix = "rollout.engine = vllm takes whole weights, not adapters", 'set rollout.engine = "group"'
        raise SetupError(Problem("VRLT-C04", what, "lora.rank", fix=fix))


def add_lora(lm: VideoLM, lora: LoraConfig) -> None:
    """Put adapters beside the language model's linear layers named in ``lora.targets``, and freeze its other weights.

    A vision tower stays as it is, frozen or trained. At first an adapter adds nothing (B is zero).

    Raises:
        SetupError: C04 no layer has any of these names.
    """
    from peft import inject_adapter_in_model

    text = lm.module.model.language_model
    text.requires_grad_(False)
    lm.module.lm_head.requires_grad_(False)
    try:
        inject_adapter_in_model(_peft(lora), lm.module, adapter_name=TRAINED)
    except ValueError as error:
        fix = "name linear layers of the language model, such as q_proj"
        problem = Problem("VRLT-C04", "no layer has any of these names", "lora.targets", str(error)[:200], fix)
        raise SetupError(problem) from None


def _peft(lora: LoraConfig, base: str | None = None) -> Any:
    from peft import LoraConfig as PeftConfig

    names = "|".join(map(re.escape, lora.targets))
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,  # type: ignore[arg-type]  # it divides, and takes what divides
        target_modules=rf"model\.language_model\..*\.({names})",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def write_adapter(folder: Path, weights: Mapping[str, torch.Tensor], lora: LoraConfig, base: str) -> None:
    """Write adapters, by name as :func:`adapter_weights`, as peft's ``PeftModel.from_pretrained`` opens them."""
    folder.mkdir()
    _peft(lora, base).save_pretrained(folder)
    named = {f"base_model.model.{name.replace(f'.{TRAINED}.', '.')}": w.contiguous() for name, w in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def has_lora(module: Any) -> bool:
    """Whether a module has adapters."""
    return next(_layers(module), None) is not None


def adapter_weights(module: Any) -> dict[str, torch.nn.Parameter]:
    """The trained adapters' matrices by name."""
    return {name: p for name, p in module.named_parameters() if f".{TRAINED}." in name}


def adapter_tensors(module: Any) -> dict[str, torch.Tensor]:
    """The trained adapters' matrices for the checkpoint."""
    return {f"adapter/{name}": p.detach() for name, p in adapter_weights(module).items()}


def saved_adapters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of :func:`adapter_tensors` among a checkpoint's tensors, by the matrices' names."""
    return {key.removeprefix("adapter/"): t for key, t in tensors.items() if key.startswith("adapter/")}


def load_adapters(module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Inverse of :func:`adapter_tensors`, bitwise.

    Raises:
        SetupError: K01 the checkpoint has other adapters.
    """
    saved, own = saved_adapters(tensors), adapter_weights(module)
    wrong = sorted(saved.keys() ^ own.keys()) + [n for n in saved.keys() & own.keys() if saved[n].shape != own[n].shape]
    if wrong:
        fix = "resume with the configuration of the checkpoint's run (lora section)"
        raise SetupError(Problem("VRLT-K01", "adapters don't fit the model", "trainer/", f"{wrong[0]} differs", fix))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def merged(weights: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    """``weights``, by their names in ``module``, with the adapters' share added and under the names of the plain model;
    what changes is on the CPU.
    """
    layers = {name: m for name, m in module.named_modules() if _is_layer(m)}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        owner, _, rest = name.partition(".base_layer.")
        if not rest:
            if not any(f".{part}." in name for part in ("lora_A", "lora_B")):
                out[name] = tensor
        elif rest == "weight":
            wide = torch.promote_types(tensor.dtype, torch.float32)
            total = tensor.to(wide) + layers[owner].get_delta_weight(TRAINED).to(wide)
            out[f"{owner}.weight"] = total.to(tensor.dtype).cpu()
        else:
            out[f"{owner}.{rest}"] = tensor
    return out


class AdapterReference(VideoLM):
    """A model as it is with other adapters, to be opened while it is needed.

    Args:
        weights: of the adapters, by name as :func:`adapter_weights`; None: none, they are switched off.
    """

    def __init__(self, lm: VideoLM, weights: Mapping[str, torch.Tensor] | None):
        super().__init__(lm.info, lm.module)
        own = adapter_weights(lm.module)
        self._kept = {name: weights[name].to(p.device, p.dtype) for name, p in own.items()} if weights else {}

    @contextmanager
    def opened(self) -> Iterator[VideoLM]:
        """Inside the block the module is the reference. No graph of the policy may wait for its backward pass."""
        self._turn(on=True)
        try:
            yield self
        finally:
            self._turn(on=False)

    def _turn(self, *, on: bool) -> None:
        if self._kept:
            for name, p in adapter_weights(self.module).items():
                p.data, self._kept[name] = self._kept[name], p.data
            return
        for layer in _layers(self.module):
            layer.enable_adapters(not on)
            for part in (layer.lora_A, layer.lora_B):
                part.requires_grad_(True)  # switching them off freezes them


def _is_layer(module: Any) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _layers(module: Any) -> Iterator[Any]:
    return (m for m in module.modules() if _is_layer(m))
