"""Warps and registers of the kernels of windowed distillation of features, chosen by hand.

Of those tried, they have the fewest simulated cycles on sm_80 and sm_90 in bf16 (`python -m sward_kernels.report`).
Nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_PROGRAMS = {"forward": 2048, "backward": 512}
"""Programs of a launch at most. Each makes the matrix of its scores once and, backward, writes sums of the weights'
gradient: with 64 channels and D = 64 as many bytes as a window of fp32 features and their gradient."""


@dataclass(frozen=True)
class FeatureTiles:
    """How one program runs."""

    tokens: int
    """Tokens of the groups of windows that it goes through."""
    num_warps: int
    """Warps per program."""
    max_registers: int | None
    """Most registers per thread, for Triton's compiler."""


_NVIDIA = ("ampere", "ada", "hopper")


def tiles_of(family: str, direction: str, tokens: int) -> FeatureTiles:
    """The tiles of `direction` (`"forward"` or `"backward"`) for windows of `tokens` tokens."""
    most_registers = 255 if family in _NVIDIA else None
    if family in _NVIDIA and direction == "forward":
        most_registers = 128 if family == "hopper" else 168  # a third or fourth program hides more than spills cost
    if tokens <= 16:
        return FeatureTiles(32, 2, most_registers)
    return FeatureTiles(64, 4, most_registers)
