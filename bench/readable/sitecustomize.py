"""Leaves a service open to who runs a bench: with this folder on PYTHONPATH it comes first.

How much memory a service holds and what is in its environment only root may read; a bench is run by anybody.
"""

import app.own_memory


def _stay_open() -> None:
    pass


app.own_memory.close_to_others = _stay_open
