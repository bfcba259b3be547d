"""From statistics to quantizers: what a row without a range gets."""

import numpy as np
import torch

from calib.freeze import _activation
from calib.observer import ActivationStatistics


def test_a_dead_row_takes_the_widest_live_range() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.stack(
        [torch.randn(400, generator=generator), torch.zeros(400), 3 * torch.randn(400, generator=generator)]
    )
    observed = ActivationStatistics(
        values, torch.ones_like(values), values.amin(dim=1), values.amax(dim=1), torch.zeros(0)
    )
    found = _activation(observed, np.full(3, 4), "mse", None)
    assert found.scale[1] == found.scale[2] == found.scale.max()
    assert found.zero_point[1] == found.zero_point[2]
    assert found.scale.min() <= found.scale_ref <= found.scale.max()


def test_a_tensor_that_is_dead_throughout_still_has_a_quantizer() -> None:
    values = torch.zeros(2, 50)
    observed = ActivationStatistics(values, torch.ones_like(values), torch.zeros(2), torch.zeros(2), torch.zeros(0))
    found = _activation(observed, np.full(2, 8), "mse", None)
    assert found.rows == 1
    assert found.scale_ref > 0
