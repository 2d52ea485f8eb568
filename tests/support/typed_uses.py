"""What an editor must know about the library's types: `make lint` checks it, nothing runs it."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

from sward import Distiller, DistillerOutput


def output_of_a_call(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    out = distiller(images, labels)
    assert_type(out, DistillerOutput)
    assert_type(out.terms, dict[str, Tensor])
    assert_type(distiller(images, teacher_images=images).logits, Tensor)
