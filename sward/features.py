"""Capture the outputs of named layers of any `nn.Module` while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FeatureTaps:
    """Forward hooks on named layers; leaving the context removes them.

        with FeatureTaps(student, ["encoder.3", "encoder.4"]) as taps:
            logits = student(images)
            features = taps.collect()          # {"encoder.3": [B, C, H, W], ...}

    The hooks stay between forward passes, so a training loop opens the taps once and collects once per step.

    Args:
        module: the network to tap.
        layers: module paths as in `module.named_modules()`.
        detach: return detached tensors (for a frozen teacher).

    Raises:
        ValueError: if a layer does not exist; the message lists near matches.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], *, detach: bool = False) -> None:
        modules = dict(module.named_modules())
        for layer in layers:
            if layer not in modules or layer == "":
                raise ValueError(_unknown_layer(layer, module, list(modules)))
        self.layers = tuple(dict.fromkeys(layers))
        self._modules = [modules[layer] for layer in self.layers]
        self._detach = detach
        self._caught: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def open(self) -> FeatureTaps:
        """Install the hooks, unless they are installed already."""
        if not self._handles:
            for layer, module in zip(self.layers, self._modules):
                self._handles.append(module.register_forward_hook(self._hook(layer)))
        return self

    def close(self) -> None:
        """Remove the hooks and drop the captured maps."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._caught.clear()

    def collect(self) -> dict[str, Tensor]:
        """Return the maps of the latest forward pass in the order of `layers`, and drop them.

        Raises:
            RuntimeError: if a layer has not run since the last call.
        """
        missing = [layer for layer in self.layers if layer not in self._caught]
        if missing:
            raise RuntimeError(
                f"layer {missing[0]!r} has produced no output since the last collect(); run the network first"
            )
        caught, self._caught = {layer: self._caught[layer] for layer in self.layers}, {}
        return caught

    def __enter__(self) -> FeatureTaps:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hook(self, layer: str):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, arguments: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"layer {layer!r} must return a [B, C, H, W] tensor to be tapped, got {found}")
            self._caught[layer] = output.detach() if self._detach else output

        return keep


def _unknown_layer(layer: str, module: nn.Module, known: list[str]) -> str:
    near = difflib.get_close_matches(layer, known, n=3, cutoff=0.4)
    if not near:
        near = [name for name, _ in module.named_children()][:6]
    return f"layer {layer!r} does not exist in {type(module).__name__}; did you mean one of {near}?"
