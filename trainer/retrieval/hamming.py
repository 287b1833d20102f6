"""Search over binary codes by the number of bits that differ, with faiss."""

from types import ModuleType

import numpy as np

from pipeline import UserError


def require_faiss(what: str) -> ModuleType:
    """The package faiss. Raises UserError where `what` lacks it."""
    try:
        import faiss  # here, because only this needs it, and it takes a while to import
    except ImportError as error:
        raise UserError(f"{what} needs the package faiss: pip install 'penstock-imagenet[retrieval]'") from error
    module: ModuleType = faiss
    return module


class Hamming:
    """Codes (n, bytes) uint8 in memory, to be searched. Raises UserError where the package faiss is missing."""

    def __init__(self, codes: np.ndarray) -> None:
        self._index = require_faiss("a search by codes").IndexBinaryFlat(8 * codes.shape[1])
        self._index.use_heap = False  # by counting: of codes that are equally far, the first are found
        self._index.add(np.ascontiguousarray(codes))

    def nearest(self, codes: np.ndarray, k: int) -> np.ndarray:
        """(q, bytes) uint8 → the ids of the nearest codes (q, min(k, n)) int64; of equal ones the first."""
        found: np.ndarray = self._index.search(np.ascontiguousarray(codes), min(k, self._index.ntotal))[1]
        return found
