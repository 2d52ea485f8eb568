"""A folder of the transformers library with a small network and its image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def write_segformer(folder: Path, **processor: Any) -> None:
    """Write a SegFormer for three classes, with an image processor if something is said about it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16, num_labels=3
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    if processor:
        transformers.SegformerImageProcessor(do_resize=False, **processor).save_pretrained(folder)
