"""Prompts to the text encoder's hidden states (CLIP, Radford et al. 2021), as Stable Diffusion uses it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastsd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LongPrompt = Literal["cut", "windows"]


def check_prompt(prompt: Any, name: str = "prompt") -> str:
    """The prompt, if it is text that a tokenizer can read.

    Raises:
        InputError: it is no string, or holds NUL or lone surrogates.
    """
    if not isinstance(prompt, str):
        raise InputError(f"{name} must be text, not {type(prompt).__name__}: pass a string or a list of strings")
    if "\0" in prompt:
        raise InputError(f"{name} holds a NUL character at position {prompt.index(chr(0))}: remove it")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds a lone surrogate at position {error.start}, which is no text: give valid Unicode"
        ) from None
    return prompt


def windows(tokenizer: Any, prompt: str, length: int, long_prompt: LongPrompt) -> list[list[int]]:
    """Token ids of a prompt, in windows of the encoder's `length` (77), each with its marks and padding.

    A prompt of up to `length` - 2 tokens is one window. A longer one is cut, with a warning that names the words
    lost, or (`"windows"`) goes on in further windows, whose hidden states the UNet then sees side by side.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    room = length - 2
    chunks = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
    if len(chunks) > 1 and long_prompt == "cut":
        lost = tokenizer.decode(ids[room:])
        warnings.warn(
            f"the prompt has {len(ids)} tokens and the text encoder reads {room}: {lost!r} was cut off "
            "(long_prompt='windows' keeps it)",
            stacklevel=2,
        )
        del chunks[1:]
    padding = tokenizer.pad_token_id
    framed = ([tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] for chunk in chunks)
    return [window + [padding] * (length - len(window)) for window in framed]


def encode(encoder: Any, ids: Sequence[Sequence[int]], clip_skip: int | None = None) -> Tensor:
    """Hidden states [1, windows × 77, dim] of one prompt's windows, in the encoder's dtype.

    One prompt at a time, so that no other prompt in the batch changes its bits.

    Args:
        encoder: a `transformers` CLIP text model.
        ids: from `windows`.
        clip_skip: layers to skip from the end, as `diffusers` counts them (None: none); the final norm still applies.
    """
    import torch

    tokens = torch.tensor(ids, device=encoder.device)
    with torch.inference_mode():
        if clip_skip is None:
            states = encoder(tokens).last_hidden_state
        else:
            hidden = encoder(tokens, output_hidden_states=True).hidden_states
            if not 0 <= clip_skip < len(hidden) - 1:
                raise InputError(f"clip_skip must be from 0 to {len(hidden) - 2} for this encoder, not {clip_skip}")
            transformer = getattr(encoder, "text_model", encoder)
            states = transformer.final_layer_norm(hidden[-1 - clip_skip])
    flat: Tensor = states.reshape(1, -1, states.shape[-1])
    return flat
