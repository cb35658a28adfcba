"""The largest batch whose training step fits a budget of bytes."""

from collections.abc import Callable

from torch import fx

from s2a_fx.analysis.peak import peak, timeline
from s2a_fx.analysis.simulation import simulate
from s2a_fx.errors import InputError

LIMIT = 65536


def largest_batch(gm: fx.GraphModule, budget: int, limit: int = LIMIT, **options: object) -> int:
    """The largest batch size whose step peaks at no more than `budget` bytes, `limit` at most; 0 if not even one image fits.

    Args:
        gm: a traced graph.
        options: `device`, `optimizer` and `loss`, as in `simulate`.

    Raises:
        InputError: two images do not fit and the model cannot take one alone (batch normalization over a single value).
    """

    def peak_at(batch: int) -> int:
        return peak(timeline(gm, simulate(gm, batch_size=batch, **options))).bytes  # type: ignore[arg-type]

    return _largest(peak_at, budget, limit)


def _largest(peak_at: Callable[[int], int], budget: int, limit: int) -> int:
    """Close in on the budget along straight lines: a peak is the maximum of lines in the batch, so few steps are needed."""
    high, high_peak = 2, peak_at(2)
    if high_peak > budget:  # one image is tried only where it decides: batch normalization may refuse it
        try:
            return 1 if peak_at(1) <= budget else 0
        except ValueError as error:
            raise InputError(f"two images need {high_peak / 1e6:,.1f} MB, and the model refuses one alone: {error}.") from error
    low, low_peak, high = 2, high_peak, 4
    high_peak = peak_at(high)
    while high_peak <= budget and high < limit:
        slope = max(high_peak - low_peak, 1) / (high - low)
        low, low_peak = high, high_peak
        high = min(max(int(low + (budget - low_peak) / slope) + 1, low + 1), limit)
        high_peak = peak_at(high)
    if high_peak <= budget:
        return high
    while high - low > 1:
        guess = low + int((budget - low_peak) * (high - low) / (high_peak - low_peak))
        middle = min(max(guess, low + 1), high - 1)
        middle_peak = peak_at(middle)
        if middle_peak <= budget:
            low, low_peak = middle, middle_peak
        else:
            high, high_peak = middle, middle_peak
    return low
