"""Capture the outputs of named layers of any `nn.Module` while it runs, as maps `[B, C, h, w]`."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sward.tensor_layouts import Format, Layout, check_choice, describe, layouts, resolve, select, without_doubt

_asking: FeatureTaps | None = None
"""The taps that run their network once more on a blank image, of which no others may take maps."""


class FeatureTaps:
    """Forward hooks on named layers; leaving the context removes them.

    Examples:
        >>> import torch
        >>> from sward import models
        >>> from sward.features import FeatureTaps
        >>> student = models.build("unext", 2).eval()
        >>> with FeatureTaps(student, ["encoder.3", "encoder.4"]) as taps:
        ...     logits = student(torch.randn(1, 3, 64, 64))
        ...     maps = taps.collect()
        >>> {layer: tuple(found.shape) for layer, found in maps.items()}
        {'encoder.3': (1, 160, 4, 4), 'encoder.4': (1, 256, 2, 2)}

    The hooks stay between forward passes, so a training loop opens the taps once and collects once per step. Each
    forward pass of the network drops the maps of the one before: `collect` returns those of the latest pass, or raises.
    Layers that run outside of a forward pass of the network (recomputed by activation checkpointing, or called
    directly) are not captured. A layer that runs several times in one pass gives its last output. An output that the
    network overwrites afterwards, as an in-place activation does, is refused (except in compiled code).

    A deep copy of the network never feeds the taps of the original: the copy carries no taps, and neither does a
    pickled network. A copied or pickled `FeatureTaps` belongs to the network that was copied or pickled with it.
    Opening taps after a network was compiled discards compiled code (`torch.compiler.reset()`), which would not run
    the hooks.

    Args:
        module: the network to tap. Wrappers of `torch.compile` and `DistributedDataParallel` are looked through.
        layers: module paths as in `module.named_modules()`.
        detach: return detached tensors (for a frozen teacher).
        format: how the layers arrange their output. `"auto"` compares it with the shape of the images, and runs the
            network once more on images of another size if that leaves a doubt.
        prefix_tokens: class and register tokens in front of the tokens of the grid, which are dropped. `"auto"` takes
            the network's own number (`num_prefix_tokens` in timm, `config.num_register_tokens` in transformers) or
            finds it from the shapes.
        select: which item of a tuple (index) or dictionary (key) holds the map.

    Raises:
        ValueError: if a layer does not exist; the message lists near matches. When the network runs or `collect` is
            called: if a layer's output cannot be read as a map; the message names the cure.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        *,
        detach: bool = False,
        format: Format = "auto",
        prefix_tokens: int | Literal["auto"] = "auto",
        select: int | str = -1,
    ) -> None:
        check_choice(format, prefix_tokens)
        module = unwrapped(module)
        modules = dict(module.named_modules())
        for layer in layers:
            if layer not in modules or layer == "":
                raise ValueError(unknown_layer(layer, module))
        self.layers = tuple(dict.fromkeys(layers))
        self._network = [module]  # In a list, so that a module that holds taps does not register the network.
        self._modules = [modules[layer] for layer in self.layers]
        self._detach = detach
        self._format: Format = format
        self._prefix_tokens = prefix_tokens
        self._select = select
        self._running = False
        self._with_gradient = False
        self._images: Tensor | None = None
        self._image_keyword: str | None = None
        self._caught: dict[str, Tensor] = {}
        self._versions: dict[str, int | None] = {}
        self._known: dict[str, Layout] = {}
        self._handles: list[RemovableHandle] = []

    def open(self) -> FeatureTaps:
        """Install the hooks, unless they are installed already."""
        if self._handles:
            return self
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and not torch.compiler.is_compiling():
            torch.compiler.reset()
        (network,) = self._network
        self._handles = [
            network.register_forward_pre_hook(_Start(self), with_kwargs=True, prepend=True),
            *(module.register_forward_hook(_Catch(self, index)) for index, module in enumerate(self._modules)),
            network.register_forward_hook(_End(self)),
        ]
        return self

    def close(self) -> None:
        """Remove the hooks and drop the captured maps."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def collect(self) -> dict[str, Tensor]:
        """Return the maps of the latest forward pass in the order of `layers`, and drop them.

        Raises:
            RuntimeError: if a layer has not run since the last call.
            ValueError: if the layout of an output cannot be told from its shape, or the network has overwritten it.
        """
        missing = [layer for layer in self.layers if layer not in self._caught]
        if missing:
            raise RuntimeError(
                f"layer {missing[0]!r} has produced no output since the last collect(); run the network first, as "
                "network(images) and not through one of its parts; a network that was compiled and run before the "
                "taps were opened needs torch.compiler.reset()"
            )
        caught, images = self._caught, self._images
        for layer, output in caught.items():
            if self._versions[layer] not in (None, version_of(output)):
                raise ValueError(_overwritten(layer, self._network[0]))
        if images is not None:
            doubtful = [layer for layer in self.layers if not self._settle(layer, caught[layer], tuple(images.shape))]
            if doubtful:
                # Not as a decorator: that would import the compiler with this module.
                torch.compiler.disable(self._settle_by_second_size)(doubtful, caught, images)
        maps = {layer: self._as_map(layer, caught[layer], images) for layer in self.layers}
        self._forget()
        return maps

    def __enter__(self) -> FeatureTaps:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        (network,) = self._network
        options = {
            "detach": self._detach,
            "format": self._format,
            "prefix_tokens": self._prefix_tokens,
            "select": self._select,
        }
        return _rebuilt, (network, self.layers, options, bool(self._handles))

    def _forget(self) -> None:
        self._caught = {}
        self._images = None

    def _as_map(self, layer: str, output: Tensor, images: Tensor | None) -> Tensor:
        """Return the output of a layer as a map, by the layout that `collect` has settled."""
        if images is None:
            if self._format == "nchw" and output.dim() == 4:
                return output
            if self._format == "nhwc" and output.dim() == 4:
                return output.permute(0, 3, 1, 2)
            raise ValueError(
                f"format must be 'nchw' or 'nhwc' where the network is not called with images [B, C, H, W], got "
                f"{self._format!r} for layer {layer!r}"
            )
        return self._known[layer].to_map(output)

    def _settle(self, layer: str, output: Tensor, images: tuple[int, ...]) -> bool:
        """Decide how to read a layer's output if its shape allows only one way."""
        known = self._known.get(layer)
        if known is not None:
            # The layout does not change from batch to batch, only the grid.
            if output.dim() == 4:
                return known.format != "tokens"
            now = layouts(output, images, known.format, known.prefix_tokens)
            if now:
                self._known[layer] = now[0]
                return True
        only = without_doubt(self._candidates(layer, output, images), images)
        if only is not None:
            self._known[layer] = only
        return only is not None

    def _candidates(self, layer: str, output: Tensor, images: tuple[int, ...]) -> list[Layout]:
        prefix_tokens = self._prefix_tokens
        if prefix_tokens == "auto" and output.dim() == 3:
            own = own_prefix_tokens(self._network[0], layer)
            if own is not None:
                found = layouts(output, images, self._format, own)
                if found:
                    return found
        found = layouts(output, images, self._format, prefix_tokens)
        if not found and output.dim() == 4 and self._format in ("nchw", "nhwc") and output.shape[0] == images[0]:
            if layouts(output, images, "auto"):
                raise ValueError(
                    f"format must be {'nhwc' if self._format == 'nchw' else 'nchw'!r} or 'auto' for layer {layer!r}, "
                    f"got {self._format!r}; its output {tuple(output.shape)} holds the grid of images "
                    f"{tuple(images)} the other way round"
                )
            # A grid of its own, such as that of a pooling pyramid: the user's word counts.
            grid = output.shape[2:] if self._format == "nchw" else output.shape[1:3]
            return [Layout(self._format, (grid[0], grid[1]))]
        return found

    def _settle_by_second_size(self, doubtful: list[str], caught: dict[str, Tensor], images: Tensor) -> None:
        """Run the network on images of twice the size and keep the reading of each output that holds for both."""
        first = tuple(images.shape)
        second = (1, first[1], 2 * first[2], 2 * first[3])
        outputs = self._outputs_at(second, images)
        for layer in doubtful:
            larger = None if outputs is None else (outputs[layer], second)
            own = own_prefix_tokens(self._network[0], layer) if self._prefix_tokens == "auto" else None
            prefix_tokens = self._prefix_tokens if own is None else own
            found = resolve(caught[layer], first, larger, self._format, prefix_tokens)
            if len(found) != 1:
                raise ValueError(_unreadable(layer, caught[layer], first, found))
            self._known[layer] = found[0]

    def _outputs_at(self, shape: tuple[int, ...], images: Tensor) -> dict[str, Tensor] | None:
        """Return the raw outputs for blank images of another size; None if the network does not accept it."""
        (network,) = self._network
        blank = images.new_zeros(shape)
        devices = [images.device] if images.device.type == "cuda" else []
        eagerly = torch.compiler.set_stance("force_eager")
        global _asking
        _asking = self
        try:
            with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices), eagerly:
                if self._image_keyword is None:
                    network(blank)
                else:
                    network(**{self._image_keyword: blank})
            return dict(self._caught) if all(layer in self._caught for layer in self.layers) else None
        except Exception:
            # Networks of a fixed image size raise errors of every kind.
            return None
        finally:
            _asking = None
            self._running = False

    def _start(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._caught = {}
        self._images, self._image_keyword = None, None
        for name, value in [*((None, argument) for argument in arguments), *keywords.items()]:
            if isinstance(value, Tensor) and value.dim() == 4:
                self._images, self._image_keyword = value, name
                break
        self._with_gradient = torch.is_grad_enabled()
        self._running = True

    def _catch(self, index: int, module: nn.Module, output: Any) -> None:
        if not self._running or module is not self._modules[index]:
            return
        layer = self.layers[index]
        lost = self._with_gradient and not torch.is_grad_enabled() and not self._detach
        if lost and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"layer {layer!r} must run with gradients to be tapped; activation checkpointing needs "
                "use_reentrant=False"
            )
        tensor = select(output, self._select, f"layer {layer!r}")
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"layer {layer!r} must return maps [B, C, h, w] or [B, h, w, C], or tokens [B, N, C], to be tapped, "
                f"got {describe(tensor)}"
            )
        self._caught[layer] = tensor.detach() if self._detach else tensor
        self._versions[layer] = version_of(tensor)


def map_channels(
    network: nn.Module,
    layers: Sequence[str],
    image_size: tuple[int, int],
    *,
    format: Format = "auto",
    prefix_tokens: int | Literal["auto"] = "auto",
    select: int | str = -1,
) -> list[int]:
    """Return the number of channels of each layer's map, found by running one blank image.

    Raises:
        ValueError: if a layer does not exist or its output cannot be read as a map.
    """
    parameter = next(network.parameters())
    taps = FeatureTaps(network, layers, format=format, prefix_tokens=prefix_tokens, select=select)
    with taps, torch.no_grad(), evaluating(network), torch.compiler.set_stance("force_eager"):
        network(parameter.new_zeros(1, 3, *image_size))
        maps = taps.collect()
    return [maps[layer].shape[1] for layer in layers]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put every module of a network into eval mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of `torch.compile` and `DistributedDataParallel`."""
    while True:
        inner = module._modules.get("_orig_mod")
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def unknown_layer(layer: str, module: nn.Module) -> str:
    """Return the error message for a layer that a network does not have, with near matches."""
    known = [name for name, _ in module.named_modules()]
    near = difflib.get_close_matches(layer, known, n=3, cutoff=0.4)
    if not near:
        near = [name for name, _ in module.named_children()][:6]
    return f"layer {layer!r} does not exist in {type(module).__name__}; did you mean one of {near}?"


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where nothing counts that."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _overwritten(layer: str, network: nn.Module) -> str:
    modules = list(network.named_modules())
    behind = modules[1 + [name for name, _ in modules].index(layer) :]
    next_layer = next((name for name, module in behind if getattr(module, "inplace", False)), None)
    cure = "tap the layer that overwrites it" + ("" if next_layer is None else f", probably {next_layer!r}")
    return f"layer {layer!r} must return a map that stays as it is, got one that is overwritten in place; {cure}"


class _Hook:
    """A hook that a copy or a pickle of its module does not keep: there it is a function that does nothing."""

    def __init__(self, taps: FeatureTaps) -> None:
        self.taps = taps

    def __reduce__(self) -> tuple[Any, ...]:
        # From the standard library, so that a pickled network loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Start(_Hook):
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if _asking not in (None, self.taps) or torch.compiler.is_exporting():
            return
        if module is self.taps._network[0]:
            self.taps._start(arguments, keywords)


class _Catch(_Hook):
    def __init__(self, taps: FeatureTaps, index: int) -> None:
        super().__init__(taps)
        self.index = index

    def __call__(self, module: nn.Module, arguments: object, output: object) -> None:
        self.taps._catch(self.index, module, output)


class _End(_Hook):
    def __call__(self, module: nn.Module, arguments: object, output: object) -> None:
        if module is self.taps._network[0]:
            self.taps._running = False


def _rebuilt(network: nn.Module, layers: tuple[str, ...], options: dict[str, Any], opened: bool) -> FeatureTaps:
    taps = FeatureTaps(network, layers, **options)
    return taps.open() if opened else taps


def own_prefix_tokens(network: nn.Module, layer: str) -> int | None:
    """Return the number of class and register tokens that the network around a layer states; None if it does not."""
    parts = layer.split(".")
    for depth in range(len(parts), -1, -1):
        holder = network.get_submodule(".".join(parts[:depth]))
        own = getattr(holder, "num_prefix_tokens", None)
        if isinstance(own, int):
            return own
        registers = getattr(getattr(holder, "config", None), "num_register_tokens", None)
        if isinstance(registers, int):
            return 1 + registers
    return None


def _unreadable(layer: str, output: Tensor, images: tuple[int, ...], found: list[Layout]) -> str:
    shapes = f"{tuple(output.shape)} for images {tuple(images)}"
    if output.shape[0] != images[0]:
        return f"layer {layer!r} must return one map per image, got {shapes}; name the layer around it"
    cure = "pass prefix_tokens=" if output.dim() == 3 else "pass format='nchw' or format='nhwc'"
    if not found:
        return f"layer {layer!r} must return a grid with the aspect ratio of the images, got {shapes}; {cure}"
    ways = " or ".join(
        f"{each.grid[0]}x{each.grid[1]} {each.format}" + (f" behind {each.prefix_tokens}" if each.prefix_tokens else "")
        for each in found
    )
    return f"layer {layer!r} must return an output that reads one way only, got {shapes}: {ways}; {cure}"
