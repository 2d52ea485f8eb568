"""Lightning: the distiller is an attribute of the module; checkpoints hold the student and leave out the teacher."""

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sward import Distiller


class Distillation(lightning.LightningModule):
    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = self.distiller(*batch)
        self.log_dict(out.terms)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.distiller.parameters(), lr=1e-3)


def train(distiller: Distiller, batches: DataLoader[tuple[Tensor, Tensor]], steps: int) -> None:
    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_progress_bar=False)
    trainer.fit(Distillation(distiller), batches)
