"""Load weights from files: of whole networks, and of trunks alone from SAM 2.1, MedSAM2, timm and DINOv2 checkpoints.

A trunk may come in the official SAM 2 layout (`{"model": {"image_encoder.trunk.*": ...}}`, used by MedSAM2 too) or with
timm's names (`mlp.fc1` for `mlp.layers.0`, with or without a prefix such as `model.`), as `torch.save` or safetensors
files. For `timm:` networks the names are those of `timm.create_model`. The file must contain every tensor of the trunk
with the right shape, and no other trunk tensors. The trunk then gets images with the statistics that its weights
expect: those that timm states for the name of a `timm:` network, or those of the `sward` run that the file belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sward.models.inputs import IMAGENET, RENORMALISATION, Renormalising
from sward.models.segmenter import Segmenter
from sward.models.sources import TimmTrunk
from sward.models.teachers import HIERA_SPECS, Teacher

_TRUNK_PREFIXES = ("image_encoder.trunk.", "trunk.", "backbone.", "encoder.", "")
_WRAPPERS = ("module.", "_orig_mod.")
# Unless the trunk has them, these belong to the classifier or to pretraining.
_NOT_TRUNK = ("head.", "head_dist.", "fc.", "classifier.", "mask_token")


def load_trunk_checkpoint(model: nn.Module, path: str | Path) -> str:
    """Load pretrained weights into `model.trunk`, the head keeps its own; return one sentence about what matched.

    Args:
        model: a teacher from `sward.models.build`.
        path: a checkpoint; read with `weights_only=True`, which runs no code from the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the model has no trunk, or the file is not a checkpoint, has the layout of the `transformers`
            library, lacks trunk tensors, has unexpected or non-finite ones, or fits a trunk of another size. The model
            is unchanged.
    """
    trunk = getattr(model, "trunk", None)
    if not isinstance(trunk, nn.Module):
        raise ValueError(f"model must be a teacher with a trunk, got {type(model).__name__}")
    path = Path(path)
    targets = {_canonical(key): (key, value) for key, value in trunk.state_dict().items()}
    state = read_state(path)
    tensors, prefix = _trunk_tensors(state, path, targets.keys())

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
            raise ValueError(
                f"{path} holds {len(unexpected)} tensors that the trunk lacks, among them {unexpected[0]!r}"
            )
        key = min(misshapen)
        raise ValueError(
            f"{path} holds {key!r} with shape {list(tensors[key].shape)}, "
            f"but the model's trunk has {list(targets[key][1].shape)}"
        )
    check_finite(tensors, path)
    trunk.load_state_dict({key: tensors[canonical] for canonical, (key, _) in targets.items()}, strict=True)
    matched = f"{len(targets)} tensors from {path}" + (f", prefix {prefix!r} stripped" if prefix else "")
    if not isinstance(model, Renormalising):
        return matched
    if prefix in ("trunk.", *(f"{wrapper}trunk." for wrapper in _WRAPPERS)):
        # A run of sward: without a statement, its trunk saw ImageNet's statistics.
        model.renormalisation = state.get(prefix.removesuffix("trunk.") + RENORMALISATION)
    elif isinstance(trunk, TimmTrunk):
        model.expect(trunk.stated_statistics())
    return matched + ("" if model.expected() == IMAGENET else f"; its images have {model.expected()}")


def load_weights(network: nn.Module, path: Path) -> str:
    """Load the weights of a whole network strictly and return one sentence about what matched.

    Accepts a state dict at the top level or under `model`, `state_dict` or `model_state_dict`, with prefixes such as
    `module.` that all of its names share; a checkpoint of `sward train` or `train-teacher` too. The weights expect the
    statistics of the file, ImageNet's if it states none.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if names or shapes do not match, or a tensor is not finite.
    """
    state: dict[str, Tensor] = {key: value for key, value in read_state(path).items() if isinstance(value, Tensor)}
    inner = network.network if isinstance(network, Segmenter) else network
    own: dict[str, Tensor] = {}
    if isinstance(network, Renormalising):
        for key in [each for each in state if each.rpartition(".")[2] == RENORMALISATION]:
            own[RENORMALISATION] = state.pop(key)
    wanted = {key: value for key, value in inner.state_dict().items() if key != RENORMALISATION}
    stripped = ""
    held = state
    for prefix in _shared_prefixes(held):
        names = {key.removeprefix(prefix): value for key, value in held.items()}
        if len(names.keys() & wanted.keys()) > len(state.keys() & wanted.keys()):
            state, stripped = names, prefix
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing:
        trunk = (
            "; --trunk-checkpoint of 'sward train-teacher' takes a trunk alone" if isinstance(network, Teacher) else ""
        )
        raise ValueError(
            f"{path} must hold all {len(wanted)} tensors of the network, lacks {len(missing)}: {missing[0]}{trunk}"
        )
    if unexpected:
        raise ValueError(f"{path} must hold the tensors of the network alone, got {unexpected[0]} too")
    shapes = {**{key: tuple(value.shape) for key, value in wanted.items()}, RENORMALISATION: (2, 3, 1, 1)}
    for key, value in {**state, **own}.items():
        if value.shape != shapes[key]:
            raise ValueError(f"{key} in {path} must have shape {shapes[key]}, got {tuple(value.shape)}")
    check_finite({**state, **own}, path)
    matched = f"{len(state)} tensors from {path}" + (f", prefix {stripped!r} stripped" if stripped else "")
    if not isinstance(network, Renormalising):
        network.load_state_dict(state)
        return matched
    before = network.expected()
    outer = "network." if isinstance(network, Segmenter) else ""
    network.load_state_dict({**{outer + key: value for key, value in state.items()}, **own})
    if own or before != network.expected():
        matched += f"; its images have {network.expected()}"
    return matched


def _shared_prefixes(names: Collection[str]) -> list[str]:
    """Return what all dotted names begin with, such as `module.` and `module.network.`, shortest first."""
    parts = min(names, default="").split(".")
    prefixes = [f"{'.'.join(parts[:count])}." for count in range(1, len(parts))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def read_state(path: Path) -> Mapping[str, Any]:
    """Read the state dict of a checkpoint file with `weights_only=True`, at the top level or one level below.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        content: Any = load(path)
    except Exception as error:
        # Both readers raise various errors, from EOFError to safetensors' own class.
        reader = "safetensors" if path.suffix == ".safetensors" else "torch.load(weights_only=True)"
        raise ValueError(f"{path} is not a checkpoint that {reader} can read") from error
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; it must map names to tensors, at the top level or under 'model'")
    return content


def check_finite(state: Mapping[str, Any], path: Path) -> None:
    """Raise a ValueError that names the first tensor of a file with nan or infinity in it."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} in {path} must be finite, got nan or infinity")


def _trunk_tensors(state: Mapping[str, Any], path: Path, wanted: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Return the trunk tensors of a file under canonical names, and the prefix that they have in the file."""
    if any(key.startswith("vision_encoder.") for key in state):
        raise ValueError(
            f"{path} is in the layout of the transformers library, which is not supported; "
            "use the original checkpoint (sam2.1_hiera_*.pt, MedSAM2_*.pt) or timm's"
        )
    wrapper = next((each for each in _WRAPPERS if all(key.startswith(each) for key in state)), "")
    best: dict[str, Tensor] = {}
    found = ""
    for prefix in _TRUNK_PREFIXES:
        whole = wrapper + prefix
        inside = {_canonical(key.removeprefix(whole)): value for key, value in state.items() if key.startswith(whole)}
        if len(inside.keys() & wanted) > len(best.keys() & wanted):
            best, found = inside, whole
    if not best:
        name = "pos_embed" if "pos_embed" in wanted else min(wanted)
        raise ValueError(
            f"{path} holds no trunk; expected 'image_encoder.trunk.{name}' (SAM 2, MedSAM2) or {name!r} (timm) "
            f"among its {len(state)} names"
        )
    return {key: value for key, value in best.items() if key in wanted or not key.startswith(_NOT_TRUNK)}, found


def _canonical(key: str) -> str:
    """Return timm's name of a trunk tensor, without the prefix of timm's features or of our trunks."""
    key = key.removeprefix("model.").removeprefix("vit.").removeprefix("network.")
    return key.replace(".mlp.layers.0.", ".mlp.fc1.").replace(".mlp.layers.1.", ".mlp.fc2.")


def _hiera_size(tensors: Mapping[str, Tensor]) -> str | None:
    """Identify the SAM 2.1 Hiera trunk of these tensors by width and depth; None if there is no match."""
    table = tensors.get("pos_embed")
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    for size, spec in HIERA_SPECS.items():
        if table is not None and table.ndim == 4 and (table.shape[1], depth) == (spec.embed_dim, sum(spec.stages)):
            return size
    return None
