"""A preset at its full size with seeded random weights: no download, so latency and memory can be measured anywhere.

The images are noise. But the numbers that flow are of the size of a trained model's: variances are kept through every
layer and the full depth, attention is neither flat nor one-hot, the gates of AdaLN are open, and the prediction
depends on latents, timestep and prompt.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastsd import checkpoint, tokenizer
from fastsd.errors import InputError
from fastsd.presets import PRESETS, Preset
from fastsd.sampling.noise import check_seed

if TYPE_CHECKING:
    import torch

# Gaussians drawn for a component; its parameters are pieces of this ring. It is prime, so that no row of a matrix that
# goes round several times equals another, and small enough to stay in a cache: drawing every number would take four
# times as long as filling memory does.
RING = 2**22 - 3

# The last layer of a residual branch. At a quarter of the variance, 24 to 64 of them raise the variance of the stream
# that they are added to by 2 to 8 times, so that what goes into it is still seen at its end.
_BRANCH_END = re.compile(r"\.(out_proj|fc2|SelfAttention\.o|wo|conv2|to_out\.0|to_add_out|net\.2|proj_out)\.weight")
_POSITIONS = "pos_embed.pos_embed"  # SD3's table, which its checkpoints hold although it can be computed


def source(preset: Preset | str, seed: int = 0) -> checkpoint.Source:
    """A preset's index, configurations and a stand-in tokenizer, with random weights in place of the published ones.

    `load` fills a module parameter by parameter, straight on the device and in the target dtype: nothing is held twice.
    The numbers depend on the seed, the component and the parameter's name alone. They are the same on every device and
    in every dtype up to its rounding, so a float32 run on the CPU is the reference of a bfloat16 run on a GPU.

    Raises:
        InputError: there is no such preset, or the seed is not one.
    """
    seed = check_seed(seed)
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"there are no random weights for {preset!r}: name a preset ({', '.join(PRESETS)})")
        preset = PRESETS[preset]
    one = preset

    def config(component: str) -> dict[str, Any]:
        return copy.deepcopy(dict(one.configs[component]))

    def load(module: torch.nn.Module, component: str, dtype: torch.dtype, device: torch.device) -> None:
        _fill(module, one.configs[component], f"{seed}/{component}", seed, dtype, device)

    def hashing(component: str) -> tokenizer.Tokenizer:
        facts = one.tokenizers[component]
        return tokenizer.hashing(facts.vocab_size, bos=facts.bos, eos=facts.eos, pad=facts.pad, length=facts.length)

    return checkpoint.Source(copy.deepcopy(dict(one.index)), config, load, hashing)


def _fill(
    module: torch.nn.Module,
    config: Mapping[str, Any],
    key: str,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    import torch

    # Drawn on the CPU in float32 for all devices and dtypes.
    ring = torch.randn(RING, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    checkpoint.assign(module, _tensors(module, config, key, ring), None, device)


def _tensors(
    module: torch.nn.Module, config: Mapping[str, Any], key: str, ring: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and numbers of each parameter, one at a time; of tied ones, the first alone."""
    import torch

    done: set[str] = set()
    ties = checkpoint.ties(module)
    for name, meta in module.state_dict().items():
        if name in done:
            continue
        done.update(ties.get(name, [name]))
        if name == _POSITIONS:
            from fastsd.denoisers.sd3 import position_table

            side, base = math.isqrt(meta.shape[1]), config["sample_size"] // config["patch_size"]
            yield name, position_table(meta.shape[2], side, base, ring.dtype, ring.device).view(meta.shape)
            continue
        tensor = torch.empty(meta.shape, dtype=ring.dtype, device=ring.device)
        mean, std = _law(module, name, meta.shape)
        # Versions of transformers differ in this prefix.
        digest = hashlib.blake2b(f"{key}/{name.removeprefix('text_model.')}".encode(), digest_size=8).digest()
        _wind(ring, int.from_bytes(digest) % RING, std, tensor.view(-1))
        if mean:
            tensor += mean
        yield name, tensor


def _wind(ring: torch.Tensor, start: int, std: float, out: torch.Tensor) -> None:
    """`out[i] = std * ring[(start + i) % RING]`."""
    import torch

    done = 0
    while done < len(out):
        piece = min(RING - start, len(out) - done)
        torch.mul(ring[start : start + piece], std, out=out[done : done + piece])
        done, start = done + piece, 0


def _law(module: torch.nn.Module, name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter.

    Norms are near 1 and biases near 0. A matrix or kernel keeps the variance of its input (one over its fan-in, LeCun
    et al. 1998), the end of a residual branch a quarter of it. T5 does not divide its scores by the square root of
    the width of a head, so its queries do (Raffel et al. 2020, `T5PreTrainedModel._init_weights` of transformers).
    """
    import torch

    path, _, last = name.rpartition(".")
    if len(shape) < 2:
        return (1.0, 0.05) if last == "weight" else (0.0, 0.02)
    owner = module.get_submodule(path)
    if isinstance(owner, torch.nn.Embedding):
        # Tokens are told apart by their vectors, then by their positions.
        return 0.0, 0.3 if "position" in path or "relative" in path else 1.0
    variance = 1 / shape[1:].numel()
    if _BRANCH_END.search(name):
        variance /= 4
    if path.endswith("SelfAttention.q"):
        attention: Any = module.get_submodule(path.removesuffix(".q"))
        variance /= attention.key_value_proj_dim
    return 0.0, variance**0.5
