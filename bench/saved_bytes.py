"""How many bytes a forward keeps for its backward, on any device.

    with SavedBytes(model) as kept:
        loss = f(model(x))
    print(kept.bytes)

Counted by saved-tensor hooks around everything, ``brn.recompute_activations()`` included, which hands on what it keeps:
distinct storages, without parameters and buffers, of which each counts once and as a whole.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class SavedBytes:
    def __init__(self, model=None):
        states = [] if model is None else [*model.parameters(), *model.buffers()]
        self._not_counted = {t.untyped_storage()._cdata for t in states}
        self._storages = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._not_counted:
            # weakly, so that an address cannot come again and what the graph has dropped is not counted
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), tuple(tensor.shape)
        return tensor.detach()

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self._hooks.__exit__(*exception)

    @property
    def shapes(self):
        """Of the tensors that are held now."""
        return [shape for storage, _, shape in self._storages.values() if not storage.expired()]

    @property
    def bytes(self):
        """Of the storages that are held now."""
        return sum(size for storage, size, _ in self._storages.values() if not storage.expired())
