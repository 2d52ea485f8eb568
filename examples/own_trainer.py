"""Distil one network into another in a training loop of your own; see docs/own_trainer.md for other trainers."""

import torch
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large

from sward import Distiller

student = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
teacher = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
batches = [(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))) for _ in range(4)]

distiller = Distiller(student, teacher, num_classes=3, image_size=(64, 64), window_size=(4,))
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
for images, labels in batches:
    out = distiller(images, labels)
    out.backward()
    optimizer.step()
    optimizer.zero_grad()
    print({name: round(term.item(), 4) for name, term in out.terms.items()})
