"""Parameters and FLOPs of every teacher and student, next to the paper's columns.

The paper does not say how it counted. One rule reproduces all its rows except that of the Cityscapes student: FLOPs
are twice the multiply-adds that ptflops (backend "pytorch") counts on one 3x512x512 image, which excludes the products
inside attention. For a teacher, parameters are those of the whole SAM 2.1 model, including memory and mask decoder, and
FLOPs those of its image encoder (trunk and neck), without the segmentation head.
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
    "Paper's rule: 2 x ptflops multiply-adds, which exclude attention products; for a SAM 2.1 teacher, parameters of "
    "the whole SAM 2.1 model and FLOPs of its image encoder, without the head. The rule reproduces every row of the "
    "paper except the 22.60 GFLOPs of its Cityscapes student, which are close to half of what the rule gives."
)
"""One paragraph to print under the table."""

_SAM2_CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


@dataclass(frozen=True)
class Complexity:
    """Parameters and FLOPs of one network by two counting rules, and the paper's values."""

    name: str
    role: str
    num_classes: int
    params: int
    """Parameters of the network as built here, head included."""
    gemm_flops: int
    """FLOPs of the forward pass of one image: 2 x multiply-adds of all matrix products, attention included."""
    paper_rule_params: int | None
    """Parameters by the paper's rule; None if not requested."""
    paper_rule_flops: int | None
    """FLOPs by the paper's rule; None if not requested or ptflops is not installed."""
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
    """Count parameters and FLOPs of one registered network.

    Args:
        name: one of `sward.models.names`.
        num_classes: channels of the logits; None for the data set on which the paper uses the network (19 or 2).
        image_size: height and width of the image, multiples of 32. The paper's columns are for 512x512.
        paper_rule: also count by the paper's rule; builds and runs whole SAM 2.1 models (seconds to a minute).
        options: options of `sward.models.build`.

    Raises:
        ValueError: for an unknown name or an image size that is not a multiple of 32.
    """
    if ":" in name:
        raise ValueError(f"name must be a registered network ('sward list models'), got {name!r}")
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
    """Count several networks, by default all registered ones in the registry's order; see `complexity`."""
    return [
        complexity(name, num_classes=num_classes, image_size=image_size, paper_rule=paper_rule)
        for name in (names() if model_names is None else model_names)
    ]


def render(rows: Sequence[Complexity]) -> Table:
    """Render the rows as a rich table with the counting rule as its caption."""
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
    """Count the FLOPs of the matrix products in the forward pass of one image with torch's `FlopCounterMode`.

    Moves the model to the meta device, which computes nothing: its weights are lost.

    Args:
        model: in eval mode.
        image_size: height and width.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = model.to("meta")
    counter = FlopCounterMode(display=False)
    # The counter has no formula for the fused CPU attention; the math backend uses matrix products that it can count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 3, *image_size, device="meta"))
    return counter.get_total_flops()


def ptflops_flops(model: nn.Module, image_size: tuple[int, int]) -> int | None:
    """Return twice the multiply-adds that ptflops counts for one image; None if ptflops is not installed.

    Args:
        model: in eval mode, on the CPU (ptflops counts some operations twice on the meta device).
        image_size: height and width.
    """
    if importlib.util.find_spec("ptflops") is None:
        return None
    from ptflops import get_model_complexity_info

    # ptflops prints a warning for every pooling layer that Hiera uses twice.
    with contextlib.redirect_stdout(io.StringIO()):
        multiply_adds, _ = get_model_complexity_info(
            model, (3, *image_size), backend="pytorch", as_strings=False, print_per_layer_stat=False
        )
    return 2 * int(multiply_adds)


@lru_cache
def _whole_sam2(size: str, image_size: tuple[int, int]) -> tuple[int, int | None]:
    """Count the parameters of SAM 2.1, including memory and mask decoder, and the FLOPs of its image encoder."""
    from sam2.build_sam import build_sam2

    config = f"configs/sam2.1/sam2.1_hiera_{_SAM2_CONFIGS[size]}.yaml"
    model: Any = build_sam2(config, ckpt_path=None, device="cpu", mode="eval")
    return _count_parameters(model), ptflops_flops(model.image_encoder, image_size)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _scaled(number: float | None, unit: float) -> str:
    return "-" if number is None else f"{number / unit:,.2f}"
