"""Steps take what fills an update, and nothing else."""

import pytest
import torch
from torch import nn

from s2a_fx.finetune import training_steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_stood_before_and_batches_that_are_left_over_change_nothing(accumulation):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(5)]
    trained = []
    for stale, given in ((False, batches[: 5 // accumulation * accumulation]), (True, batches)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        if stale:
            model(batches[0][0]).sum().backward()
            model[0].reset_running_stats()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert (
            len(list(training_steps(model, given, optimizer, nn.CrossEntropyLoss(), accumulation=accumulation)))
            == 5 // accumulation
        )
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
