"""Denoisers: each has `prepare()`, run once per image, and a pure `forward()`, run once per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def layout(denoiser: nn.Module) -> None:
    """Lay out a denoiser's weights, in place, as its device computes with them; call it once they are loaded.

    A UNet's convolutions become channels last, and with them its feature maps (a step of SD 1.5 on a CPU takes 0.93 of
    the time, compiled 0.85). On CUDA the queries, keys and values of every self-attention and joint attention become
    one matrix product (`layers.Packing`).

    Not for weights that another model holds too: each would have its own afterwards.
    """
    import torch

    from fastsd.denoisers.layers import Packing
    from fastsd.denoisers.unet import UNet

    on_cuda = next(denoiser.parameters()).is_cuda
    for module in denoiser.modules():
        if isinstance(module, Packing) and on_cuda:
            module.pack()
        elif isinstance(module, torch.nn.Conv2d) and isinstance(denoiser, UNet):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
