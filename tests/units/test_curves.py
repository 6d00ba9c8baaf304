"""What is drawn of a run."""

import torch

from intermodal.evaluate.curves import PANELS
from intermodal.losses_tokens import ScoreStatistics
from intermodal.parallel.setup import World


def test_every_statistic_of_the_scores_has_a_panel():
    statistics = ScoreStatistics(torch.device("cpu"))
    statistics.sums += 1
    named = statistics.values(World())
    assert "highest_score" in named
    assert set(named) <= set(PANELS)
