"""The interface between a distillation loss and its trainer."""

import torch

from sward.losses import DistillationOutput


def test_weighted_terms_add_up_to_the_loss_even_if_the_method_does_not_split_it() -> None:
    loss = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    terms = {"a": torch.tensor(1.0), "b": torch.tensor(5.0)}
    whole = DistillationOutput(loss, terms).weighted_terms()
    assert sum(whole.values()).item() == 3.0
    assert all(term.dtype == torch.float32 and not term.requires_grad for term in whole.values())
    split = {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}
    assert DistillationOutput(loss, terms, split).weighted_terms() == split
