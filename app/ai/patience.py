"""Whether it is worth waiting for others, learnt from whether they came.

A wait that nobody joins spares the next one; if that happens again and again, the next 3, 7 and at most 63,
and each wait that somebody joins halves that. Whoever is always alone hardly ever waits, and who has
company waits each time. Knows nothing of what is waited for: `micro_batching` and `telemetry_writer` do.
"""

_MOST_SPARED = 63


class Patience:
    """For waits of one kind."""

    def __init__(self) -> None:
        self._in_vain = 0
        self._spared = 0

    def take(self) -> bool:
        """Tells whether to wait this time."""
        if self._spared:
            self._spared -= 1
            return False
        return True

    def note(self, together: int) -> None:
        """Learns how many there were at the end of a wait, whoever began it among them."""
        self._in_vain = self._in_vain // 2 if together > 1 else min(2 * self._in_vain + 1, _MOST_SPARED)
        self._spared = self._in_vain
