"""Parameters and FLOPs of every teacher and student, next to the paper's columns.

The paper does not say how it counted. One rule reproduces its rows (all but the Cityscapes student's): FLOPs are twice
the multiply-adds that ptflops counts (backend "pytorch") on one 3x512x512 image, which leaves attention products out; a
teacher row is the WHOLE SAM 2.1 model in parameters and its image encoder (trunk and neck) in FLOPs, without the head.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sward.models.registry import build, describe, names

if TYPE_CHECKING:
    from rich.table import Table

COUNTING_RULE = (
    "Params and GEMM FLOPs: the network as built here; 2 x multiply-adds of convolutions, linear layers and attention. "
    "Paper's rule: 2 x ptflops multiply-adds, which miss attention products; for a SAM 2.1 teacher the whole SAM 2.1 "
    "model in parameters and its image encoder in FLOPs, without the head. The rule reproduces every row of the paper "
    "but the 22.60 GFLOPs of its Cityscapes student, which come close to half of what the rule gives."
)
"""One paragraph to print under the table."""

_SAM2_CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


@dataclass(frozen=True)
class Complexity:
    """One row: what a network costs, by two rules, and what the paper says."""

    name: str
    role: str
    num_classes: int
    params: int
    """Parameters of the network as built here, head included."""
    gemm_flops: int
    """FLOPs of one forward pass of one image: 2 x multiply-adds of all matrix products, attention included."""
    paper_rule_params: int | None
    """Parameters counted as the paper's columns are; None if that was not asked for."""
    paper_rule_flops: int | None
    """FLOPs counted as the paper's columns are; None if that was not asked for or ptflops is not installed."""
    paper_params_millions: float | None
    paper_gflops: float | None


def complexity(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] = (512, 512),
    paper_rule: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Complexity:
    """Count one network of the registry.

    Args:
        name: one of `sward.models.names`.
        num_classes: channels of the logits; None for the paper's data set of that network (19 or 2).
        image_size: height and width of the one image, multiples of 32. The paper's columns hold at 512x512.
        paper_rule: count by the paper's rule too; builds whole SAM 2.1 models and runs them (seconds to a minute).
        options: of `sward.models.build`.

    Raises:
        ValueError: for an unknown name or an image size that is not a multiple of 32.
    """
    description = describe(name)
    num_classes = description.num_classes if num_classes is None else num_classes
    model = build(name, num_classes, **(options or {})).eval()
    params = _count_parameters(model)
    paper_params = paper_flops = None
    if paper_rule:
        sam2 = re.match(r"(?:med)?sam2_hiera_(tiny|small|base_plus|large)_", name)
        if sam2:
            paper_params, paper_flops = _whole_sam2(sam2[1], image_size)
        else:
            paper_params, paper_flops = params, ptflops_flops(model, image_size)
    return Complexity(
        name=name,
        role=description.role,
        num_classes=num_classes,
        params=params,
        gemm_flops=gemm_flops(model, image_size),
        paper_rule_params=paper_params,
        paper_rule_flops=paper_flops,
        paper_params_millions=description.paper_params_millions,
        paper_gflops=description.paper_gflops,
    )


def complexity_table(
    model_names: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] = (512, 512),
    paper_rule: bool = True,
) -> list[Complexity]:
    """`complexity` of several networks, by default of all registered ones, in the registry's order."""
    return [
        complexity(name, num_classes=num_classes, image_size=image_size, paper_rule=paper_rule)
        for name in (names() if model_names is None else model_names)
    ]


def render(rows: Sequence[Complexity]) -> Table:
    """The rows as a rich table with the counting rule below; ``rich.print`` it."""
    from rich.table import Table

    table = Table(caption=COUNTING_RULE)
    table.add_column("network", no_wrap=True)
    for header in (
        "classes",
        "params M",
        "GEMM GFLOPs",
        "paper's rule: params M",
        "paper's rule: GFLOPs",
        "paper: params M",
        "paper: GFLOPs",
    ):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.num_classes),
            _scaled(row.params, 1e6),
            _scaled(row.gemm_flops, 1e9),
            _scaled(row.paper_rule_params, 1e6),
            _scaled(row.paper_rule_flops, 1e9),
            _scaled(row.paper_params_millions, 1),
            _scaled(row.paper_gflops, 1),
        )
    return table


def gemm_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """FLOPs of the matrix products in one forward pass of one image, by torch's ``FlopCounterMode``.

    Counted on the meta device, which computes nothing. The model is moved there: its weights are gone afterwards.

    Args:
        model: in eval mode.
        image_size: height and width.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = model.to("meta")
    counter = FlopCounterMode(display=False)
    # The counter knows no formula for the fused CPU attention; the plain one is made of products it does know.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 3, *image_size, device="meta"))
    return counter.get_total_flops()


def ptflops_flops(model: nn.Module, image_size: tuple[int, int]) -> int | None:
    """Twice the multiply-adds ptflops counts in one forward pass of one image; None if ptflops is not installed.

    Args:
        model: in eval mode, on the CPU (ptflops counts some operations twice on the meta device).
        image_size: height and width.
    """
    if importlib.util.find_spec("ptflops") is None:
        return None
    from ptflops import get_model_complexity_info

    # ptflops prints a warning for every pooling layer that Hiera uses in two places.
    with contextlib.redirect_stdout(io.StringIO()):
        multiply_adds, _ = get_model_complexity_info(
            model, (3, *image_size), backend="pytorch", as_strings=False, print_per_layer_stat=False
        )
    return 2 * int(multiply_adds)


@lru_cache
def _whole_sam2(size: str, image_size: tuple[int, int]) -> tuple[int, int | None]:
    """Parameters of SAM 2.1 with memory and mask decoder, and the FLOPs of its image encoder by ptflops."""
    from sam2.build_sam import build_sam2

    config = f"configs/sam2.1/sam2.1_hiera_{_SAM2_CONFIGS[size]}.yaml"
    model: Any = build_sam2(config, ckpt_path=None, device="cpu", mode="eval")
    return _count_parameters(model), ptflops_flops(model.image_encoder, image_size)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _scaled(number: float | None, unit: float) -> str:
    return "-" if number is None else f"{number / unit:,.2f}"
