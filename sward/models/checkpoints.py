"""Pretrained trunks: SAM 2.1 and MedSAM2 checkpoints, timm's files and DINOv2's, into a teacher's trunk.

Accepted: the official SAM 2 layout (``{"model": {"image_encoder.trunk.*": ...}}``, MedSAM2's as well) and timm's names
(``mlp.fc1`` for ``mlp.layers.0``, with or without ``model.`` in front), as ``torch.save`` or safetensors files. Every
tensor of the trunk must be in the file, with its shape, and the trunk's part of the file holds nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sward.models.teachers import HIERA_SPECS

_TRUNK_PREFIXES = ("image_encoder.trunk.", "model.", "")
# In a file without a prefix these belong to the classifier or to pretraining, not to the trunk.
_NOT_TRUNK = ("head.", "mask_token")


def load_trunk_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load pretrained weights into ``model.trunk``; the head keeps its own.

    Args:
        model: a teacher from `sward.models.build`.
        path: a checkpoint; read with ``weights_only=True``, so that no code in it runs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the model has no trunk, or the file is no checkpoint, is in the layout of the ``transformers``
            library, lacks trunk tensors, holds others, or belongs to a trunk of another size. The model stays as it is.
    """
    trunk = getattr(model, "trunk", None)
    if not isinstance(trunk, nn.Module):
        raise ValueError(f"{type(model).__name__} has no trunk; trunk checkpoints are for teachers")
    path = Path(path)
    tensors = _trunk_tensors(_read(path), path)
    targets = {_canonical(key): (key, value) for key, value in trunk.state_dict().items()}

    missing = sorted(targets.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - targets.keys())
    misshapen = [key for key in targets.keys() & tensors.keys() if tensors[key].shape != targets[key][1].shape]
    if missing or unexpected or misshapen:
        found, wanted = _hiera_size(tensors), _hiera_size({key: value for key, (_, value) in targets.items()})
        if found and wanted and found != wanted:
            raise ValueError(f"{path} holds a trunk of size {found!r}, but the model's trunk is {wanted!r}")
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} of {len(targets)} trunk tensors, among them {missing[0]!r}")
        if unexpected:
            raise ValueError(f"{path} holds {len(unexpected)} tensors the trunk has not, among them {unexpected[0]!r}")
        key = min(misshapen)
        raise ValueError(
            f"{path} holds {key!r} with shape {list(tensors[key].shape)}, "
            f"but the model's trunk has {list(targets[key][1].shape)}"
        )
    trunk.load_state_dict({key: tensors[canonical] for canonical, (key, _) in targets.items()}, strict=True)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        content: Any = load(path)
    except Exception as error:
        # Both readers raise whatever their parser stumbles on, from EOFError to a class of safetensors' own.
        reader = "safetensors" if path.suffix == ".safetensors" else "torch.load(weights_only=True)"
        raise ValueError(f"{path} is not a checkpoint that {reader} can read") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected names mapped to tensors, or those under 'model'")
    return content


def _trunk_tensors(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The trunk's tensors of a file, under canonical names."""
    if any(key.startswith("vision_encoder.") for key in state):
        raise ValueError(
            f"{path} is in the layout of the transformers library, which is not supported: "
            "use the original checkpoint (sam2.1_hiera_*.pt, MedSAM2_*.pt) or timm's"
        )
    for prefix in _TRUNK_PREFIXES:
        if f"{prefix}pos_embed" in state:
            inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return {_canonical(key): value for key, value in inside.items() if not key.startswith(_NOT_TRUNK)}
    raise ValueError(
        f"{path} holds no trunk: expected 'image_encoder.trunk.pos_embed' (SAM 2, MedSAM2) or 'pos_embed' (timm) "
        f"among its {len(state)} names"
    )


def _canonical(key: str) -> str:
    """timm's name of a trunk tensor, free of what wraps a trunk: timm's ``model.`` or `DINOv2Trunk`'s ``vit.``."""
    key = key.removeprefix("model.").removeprefix("vit.")
    return key.replace(".mlp.layers.0.", ".mlp.fc1.").replace(".mlp.layers.1.", ".mlp.fc2.")


def _hiera_size(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of SAM 2.1's Hiera trunks these tensors are, by width and depth; None if it is none of them."""
    table = tensors.get("pos_embed")
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    for size, spec in HIERA_SPECS.items():
        if table is not None and table.ndim == 4 and (table.shape[1], depth) == (spec.embed_dim, sum(spec.stages)):
            return size
    return None
