"""Small tensors made on the CPU, copied to the device without waiting for it."""

import torch
from torch import Tensor


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on `device`.

    From pageable memory, torch would first wait until a CUDA device has done all work before.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
