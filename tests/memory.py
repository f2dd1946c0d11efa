"""Bytes of tensors that are alive, on any device: what a forward pass leaves for backward, and the peak."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside the context made and that still exist.

    Below autograd, so it sees what checkpointing keeps too, which hooks on saved tensors do not.
    Parameters, and whatever else existed before, are not counted.
    """

    def __init__(self, before=()):
        super().__init__()
        self.alive = self.peak = 0
        self.known = {}
        for tensor in before:
            self._remember(tensor.untyped_storage(), counted=False)

    def _remember(self, storage, counted=True):
        key, size = storage._cdata, storage.nbytes() if counted else 0

        def gone(_):
            del self.known[key]
            self.alive -= size

        self.known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._remember(tensor.untyped_storage())
        return made
