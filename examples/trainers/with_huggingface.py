"""Hugging Face Trainer: the keys of a sample are the arguments of the distiller; the loss is its first output."""

from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from sward import Distiller


def train(distiller: Distiller, dataset: Dataset[dict[str, Tensor]], steps: int, output: str) -> None:
    """Train on samples `{"images": [3, H, W], "labels": [H, W]}`."""
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=distiller, args=arguments, train_dataset=dataset).train()
