"""Work out on paper what distilling on streamed images costs; print every assumption.

    python benchmarks/stream_cost.py --images 1e8

Nothing is timed. FLOPs and bytes of the networks are counted; what a GPU sustains, the size of a file, and what
decoding and reading take are assumptions, and options.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from harness import require_positive
from sward import models, presets
from sward.models.flops import gemm_flops
from sward.models.teachers import Teacher

GPUS = (1, 8, 64)
PRESETS = ("clinicdb-small", "clinicdb-unext", "cityscapes-mbv3")


@dataclass(frozen=True)
class Pair:
    """Counted costs of a student and its teacher, per image."""

    preset: str
    """The preset that they belong to."""
    teacher_flops: int
    """One forward pass of the teacher."""
    student_flops: int
    """Forward and backward pass of the student, as three forward passes."""
    kept_bytes: int
    """The maps of the frozen trunk in float32, as the cache keeps them."""


def count(name: str) -> Pair:
    """Count one preset on the meta device."""
    preset = presets.get(name)
    size, teacher_size = preset.student.dataset.image_size, preset.student.teacher_image_size
    options = preset.teacher.model_options
    student = gemm_flops(models.build(preset.student.model, 2).eval(), size)
    teacher = gemm_flops(models.build(preset.teacher.model, 2, **options).eval(), teacher_size)
    network = models.build(preset.teacher.model, 2, **options).eval().to("meta")
    assert isinstance(network, Teacher)
    with torch.no_grad():
        maps = network.trunk(torch.zeros(1, 3, *teacher_size, device="meta"))
    return Pair(name, teacher, 3 * student, 4 * sum(each.numel() for each in maps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=1e8)
    parser.add_argument("--teraflops", type=float, default=300.0, help="sustained per GPU in bf16")
    parser.add_argument("--kilobytes", type=float, default=100.0, help="per image file")
    parser.add_argument("--decode-ms", type=float, default=5.0, help="decoding and augmenting an image on one core")
    parser.add_argument("--cores", type=int, default=16, help="processor cores per GPU")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="read from storage per second and GPU")
    chosen = parser.parse_args()
    require_positive(parser, chosen, "images", "teraflops", "kilobytes", "decode_ms", "cores", "gigabytes")
    images = chosen.images
    print(f"Assumed: {images:.3g} images, one pass; {chosen.teraflops:g} TFLOP/s sustained per GPU in bf16;")
    print(
        f"{chosen.kilobytes:g} kB per image file; {chosen.decode_ms:g} ms of one core to decode and augment an image;"
    )
    print(f"{chosen.cores} cores per GPU; {chosen.gigabytes:g} GB/s read from storage per GPU, growing with the GPUs.")
    print("Counted: matrix products of the networks, backward twice the forward; maps of the trunk in float32.\n")
    print(f"files: {images * chosen.kilobytes * 1e3 / 1e12:.3g} TB")
    print(f"decoding: {images * chosen.decode_ms / 1e3 / 3600:.3g} core hours\n")
    print(
        "| preset | teacher, GFLOPs | student, GFLOPs | hours of computing | of decoding | of reading files |", end=""
    )
    print(" of reading kept maps | kept maps, TB per view |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for pair in (count(name) for name in PRESETS):
        for gpus in GPUS:
            computing = images * (pair.teacher_flops + pair.student_flops) / (chosen.teraflops * 1e12 * gpus)
            decoding = images * chosen.decode_ms / 1e3 / (chosen.cores * gpus)
            reading, maps = (
                images * each / (chosen.gigabytes * 1e9 * gpus) for each in (chosen.kilobytes * 1e3, pair.kept_bytes)
            )
            hours = " | ".join(f"{seconds / 3600:.3g}" for seconds in (computing, decoding, reading, maps))
            flops = f"{pair.teacher_flops / 1e9:.4g} | {pair.student_flops / 1e9:.4g}"
            print(f"| `{pair.preset}`, {gpus} GPUs | {flops} | {hours} | {images * pair.kept_bytes / 1e12:.4g} |")


if __name__ == "__main__":
    main()
