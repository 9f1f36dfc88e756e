"""Prompts to what a denoiser is told of them: the hidden states and pooled vectors of CLIP and T5.

An encoder reads one prompt at a time, so that no other prompt in the batch changes its bits, and what it says is
kept: the next image of the same prompt costs nothing here.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastsd import arrays
from fastsd.arrays import Array
from fastsd.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastsd.tokenizer import Tokenizer

LongPrompt = Literal["cut", "windows"]
Prompt = tuple[str, ...]  # a text for each encoder
CACHED = 64  # encodings that a pipeline keeps; the largest (512 tokens of T5-XXL) take 4 MB each in bfloat16


class Encoder(NamedTuple):
    """A text encoder of a family, and what of it is read."""

    tokenizer: str  # component names
    name: str
    kind: str  # class in transformers
    layer: int = -1  # of CLIP: -1 the last with its norm, -2 the one before it, without
    optional: bool = False  # the family works without it

    @property
    def is_clip(self) -> bool:
        """CLIP, with 77 tokens and a pooled vector; else T5."""
        return self.kind.startswith("CLIP")


class Encoding(NamedTuple):
    """What one encoder says of one prompt."""

    states: Array  # [1, tokens, dim]
    pooled: Array | None  # [1, dim], CLIP's


class Embedding(NamedTuple):
    """What a family's encoders together say of one prompt."""

    context: Array  # [1, tokens, dim]
    pooled: Array | None  # [1, dim]


class Conditioning(NamedTuple):
    """What a denoiser is told besides the latents and the time; B is the batch, or twice that with guidance."""

    context: Array  # [B, tokens, dim]
    pooled: Array | None  # [B, dim]
    guidance_scale: Array  # [B] in float64, for guidance-distilled models
    time_ids: Array | None = None  # [B, 6], SDXL: original size, crop and target size, each (height, width)


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


def windows(tokenizer: Tokenizer, prompt: str, length: int, long_prompt: LongPrompt) -> list[list[int]]:
    """Token ids of a prompt in windows of an encoder's `length`, each with its marks and padding.

    A prompt that fits between the marks is one window. A longer one is cut, with a warning that names the words lost,
    or (`"windows"`, for CLIP) goes on in further windows, whose hidden states the denoiser then sees side by side.
    """
    ids = tokenizer.encode(prompt)
    start = [] if tokenizer.bos is None else [tokenizer.bos]  # T5 has no first mark
    room = length - len(start) - 1
    chunks = [ids[at : at + room] for at in range(0, len(ids), room or 1)] or [[]]
    if len(chunks) > 1 and long_prompt == "cut":
        lost = _shortened(tokenizer, ids[room:])
        warnings.warn(
            f"the prompt has {len(ids)} tokens and the text encoder reads {room}: {lost} was cut off"
            + ("" if tokenizer.bos is None else " (long_prompt='windows' keeps it)"),
            stacklevel=2,
        )
        del chunks[1:]
    framed = ([*start, *chunk, tokenizer.eos] for chunk in chunks)
    return [window + [tokenizer.pad] * (length - len(window)) for window in framed]


def _shortened(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens for a sentence: its beginning and its end."""
    if len(ids) <= 60:
        return repr(tokenizer.decode(ids))
    return f"{tokenizer.decode(ids[:30])!r} ... {tokenizer.decode(ids[-30:])!r}"


def read(encoder: Encoder, module: Any, ids: Sequence[Sequence[int]], clip_skip: int | None = None) -> Encoding:
    """Run an encoder over the windows of one prompt, in the encoder's dtype.

    Args:
        encoder: what is read of it.
        module: a `transformers` CLIP text model, or T5 encoder.
        ids: from `windows`.
        clip_skip: layers of CLIP to skip, as `diffusers` counts them (None: none).

    Returns:
        The states of all windows side by side, [1, windows x length, dim], and CLIP's pooled vector of the first.
    """
    import torch

    return states(encoder, module, torch.tensor(ids, device=module.device), clip_skip)


def states(encoder: Encoder, module: Any, tokens: torch.Tensor, clip_skip: int | None = None) -> Encoding:
    """`read` of token ids [windows, length] on the encoder's device; no value of theirs is looked at."""
    import torch

    with torch.inference_mode():
        if not encoder.is_clip:
            return Encoding(module(tokens).last_hidden_state, None)
        deeper = encoder.layer < -1 or clip_skip is not None
        output = module(tokens, output_hidden_states=deeper)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        hidden = output.last_hidden_state
        if deeper:
            hidden = output.hidden_states[encoder.layer - (clip_skip or 0)]
            if encoder.layer == -1:  # Stable Diffusion 1 and 2 norm the layer that is read, as if it were the last
                hidden = getattr(module, "text_model", module).final_layer_norm(hidden)
    return Encoding(hidden.reshape(1, -1, hidden.shape[-1]), pooled[:1])


class Cache:
    """The last `CACHED` encodings, by tokens, layer and the weights that made them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Encoding] = OrderedDict()
        self._digests: dict[int, tuple[Any, str]] = {}
        self._lock = threading.Lock()

    def get(self, encoder: Any, key: tuple[Any, ...], make: Callable[[], Encoding]) -> tuple[Encoding, bool]:
        """The encoding under `key`, and whether it was there; `make` runs where it was not."""
        key = (self._digest(encoder), *key)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key], True
        encoding = make()
        with self._lock:
            self._kept[key] = encoding
            while len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        return encoding, False

    def _digest(self, encoder: Any) -> str:
        """The digest of an encoder's weights, taken anew when any of them was written to or replaced.

        Those of a bundle's engines never are.
        """
        if not hasattr(encoder, "parameters"):
            return ""
        state = tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in encoder.parameters())
        with self._lock:
            known = self._digests.get(id(encoder))
        if known is None or known[0] != state:
            known = state, digest(encoder)
            with self._lock:
                self._digests[id(encoder)] = known
        return known[1]


def digest(module: Any) -> str:
    """A digest of a module's weights: names, shapes, dtypes, and up to 256 evenly spaced values of each parameter.

    Reading all 9.5 GB of T5-XXL would take longer than its use; two checkpoints or LoRA sets do not differ in the rest
    alone.
    """
    import torch

    hashed = hashlib.blake2b(digest_size=16)
    with torch.inference_mode():
        samples = []
        for name, parameter in module.named_parameters():
            hashed.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // 256)].float())
        if samples:  # one copy from the device
            hashed.update(torch.cat(samples).cpu().numpy().tobytes())
    return hashed.hexdigest()


def encode(
    components: Any,
    encoders: Sequence[Encoder],
    combine: Callable[..., Embedding],
    prompts: Sequence[Prompt | Embedding],
    negative_prompts: Sequence[Prompt | Embedding | None],
    *,
    clip_skip: int | None,
    max_sequence_length: int,
    long_prompt: LongPrompt,
    read: Callable[[int, list[list[int]], int | None], Encoding],
    cache: Cache,
    adapters: Callable[[str], Hashable],
) -> tuple[list[Embedding], int]:
    """Encode the prompts of a batch.

    Args:
        components: with `tokenizers` and `text_encoders` (None where one is left out).
        encoders: the family's.
        combine: makes an embedding of what the family's encoders say.
        prompts: text, or an embedding in its place.
        negative_prompts: of the unconditional half, empty without guidance; None is zeros.
        clip_skip: see `read`; as in `diffusers`, for the prompts alone.
        max_sequence_length: tokens of T5.
        long_prompt: see `windows`.
        read: see `backends.Functions`.
        cache: of the pipeline.
        adapters: what is merged into the weights of an encoder, by its name.

    Returns:
        Embeddings of the negative prompts, then of the prompts, and how many encodings came out of the cache.

    Raises:
        InputError: clip_skip is beyond an encoder's layers.
    """
    given = [one for one in [*negative_prompts, *prompts] if one is not None and not isinstance(one, Embedding)]
    readers = list(zip(encoders, components.tokenizers, components.text_encoders, strict=True))
    framed: list[dict[str, list[list[int]]]] = []  # by encoder, then by text
    for place, (encoder, tokenizer, module) in enumerate(readers):
        texts = dict.fromkeys(one[place] for one in given)
        if module is None:
            framed.append({})
        elif encoder.is_clip:
            length = min(tokenizer.length, module.config.max_position_embeddings)
            framed.append({one: windows(tokenizer, one, length, long_prompt) for one in ["", *texts]})
        else:
            framed.append({one: windows(tokenizer, one, max_sequence_length, "cut") for one in texts})
    # All prompts of a batch have as many windows as the longest: an empty window says nothing.
    most = max(len(ids) for texts in framed for ids in texts.values()) if any(framed) else 1

    hits = 0

    @functools.cache
    def embed(prompt: Prompt, clip_skip: int | None) -> Embedding:
        nonlocal hits
        encodings: list[Encoding | None] = []
        for place, ((encoder, _, module), texts, one) in enumerate(zip(readers, framed, prompt, strict=True)):
            if module is None:
                encodings.append(None)
                continue
            ids, skip = texts[one], None
            if encoder.is_clip:
                ids, skip = ids + texts[""] * (most - len(ids)), clip_skip
                _check_clip_skip(encoder, module, clip_skip)
            key = (encoder.name, encoder.layer, skip, tuple(map(tuple, ids)), adapters(encoder.name))
            encoding, hit = cache.get(module, key, lambda: read(place, ids, skip))  # noqa: B023  # called at once
            encodings.append(encoding)
            hits += hit
        return combine(components, encodings, max_sequence_length)

    def resolve(one: Prompt | Embedding, clip_skip: int | None) -> Embedding:
        return one if isinstance(one, Embedding) else embed(one, clip_skip)

    positive = [resolve(one, clip_skip) for one in prompts]
    negative = [
        zeros(other) if one is None else resolve(one, None)
        for one, other in zip(negative_prompts, positive, strict=False)
    ]
    return [*negative, *positive], hits


def zeros(like: Embedding) -> Embedding:
    """The unconditional half of SDXL where there is no negative prompt."""
    context, pooled = like
    return Embedding(
        arrays.zeros(context.shape, context), None if pooled is None else arrays.zeros(pooled.shape, pooled)
    )


def _check_clip_skip(encoder: Encoder, module: Any, clip_skip: int | None) -> None:
    most = module.config.num_hidden_layers + encoder.layer
    if clip_skip is not None and not 0 <= clip_skip <= most:
        raise InputError(f"clip_skip must be from 0 to {most} for this encoder, not {clip_skip}")
