"""The training view of those who write their own loop: Pillow, random window, flip, minus the mean colour."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.peers.loadjob import VIEW, window


def view(image: Image.Image, mean: Any) -> torch.Tensor:
    """(3, 224, 224) float32 of a whole picture; `mean` (3, 1, 1) float32, a tensor, in grey levels."""
    left, top, flip = window(image.width)
    image = image.crop((left, top, left + VIEW, top + VIEW))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().sub_(mean)
