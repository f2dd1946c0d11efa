"""Optimizer, learning rate schedule and random numbers, to and from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class State(_Base):
    """What a resumed run goes on from, besides the weights; part of SftTrainer."""
