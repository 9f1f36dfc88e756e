"""Prompts to token ids: the tokenizers of CLIP (byte-level BPE) and T5 (SentencePiece unigram).

Built on the `tokenizers` library alone, so that an engine bundle needs neither torch nor transformers. The ids are
those of `transformers.CLIPTokenizer` and `T5Tokenizer` (version 5) for the same folder, in every form in which
checkpoints hold a tokenizer: `vocab.json` + `merges.txt`, `tokenizer.json`, `spiece.model`.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastsd import protobuf
from fastsd.errors import InputError
from fastsd.files import one_line, read_json


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; safe to use from several threads.

    CLIP reads `[bos, *encode(text), eos, pad, ...]`, T5 `[*encode(text), eos, pad, ...]`.

    Attributes:
        encode: the ids of a text without `bos`, `eos` and padding. Special tokens that stand in the text literally
            (`<|endoftext|>`, `</s>`) become their ids, as in transformers. The text is valid Unicode: no surrogates.
        decode: readable text of some ids; no exact inverse, since `encode` normalises the text.
        bos: the id that opens a text; None where none does (T5).
        eos: the id that ends a text.
        pad: the id that fills a window after `eos`.
        length: the most ids of one text, marks and padding included (`model_max_length`).
        origin: what makes it again: the folder that `load` read, or the arguments of `hashing`; None: neither.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int | None
    eos: int
    pad: int
    length: int
    origin: Path | Mapping[str, Any] | None = None


def load(folder: str | os.PathLike[str]) -> Tokenizer:
    """The CLIP or T5 tokenizer in a folder of a checkpoint.

    The class named in `tokenizer_config.json` decides which of the two it is; where none is named, the files do.
    `tokenizer.json` comes before the older files, as in transformers.

    Raises:
        InputError: the folder or its tokenizer files are missing or broken, belong to another kind of tokenizer, or
            lack a special token.
    """
    folder = Path(folder)
    try:
        held = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise InputError(
            f"cannot read the folder {str(folder)!r} ({error.strerror}): pass the tokenizer folder of a checkpoint"
        ) from error
    config, serialized = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "tokenizer.json")
    kind = _kind(folder, held, config, serialized)
    length = _length(config.get("model_max_length", config.get("max_len")), kind.length, str(folder))
    try:
        unknown = _token(config.get("unk_token") or kind.marks["unk_token"]).content
        backend, special = kind.build(folder, config, serialized, unknown)
        marks = _add_special_tokens(backend, kind, special, folder, config, serialized)
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"{str(folder)!r} is no {kind.name} tokenizer ({reason}): download the checkpoint again"
        ) from error
    encode, decode = partial(_encode, backend), partial(_decode, backend)
    return Tokenizer(encode, decode, marks.get("bos_token"), marks["eos_token"], marks["pad_token"], length, folder)


def from_transformers(tokenizer: Any) -> Tokenizer:
    """Adopt a tokenizer of `transformers`: what a fast one is made of is shared, a slow one is called.

    Raises:
        InputError: it frames a text in another way than CLIP and T5 do, or has no token to pad with.
    """
    name = type(tokenizer).__name__
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    source = getattr(tokenizer, "backend_tokenizer", None)
    if source is None:
        frame = list(tokenizer("").input_ids)
        encode, decode = partial(_encode_slow, tokenizer), partial(_decode_slow, tokenizer)
    else:
        # A backend of our own, because calls of the other one change its truncation and padding.
        backend = Backend(source.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if getattr(source, part) is not None:
                setattr(backend, part, getattr(source, part))
        added = source.get_added_tokens_decoder()
        backend.add_tokens([added[i] for i in sorted(added)])
        backend.encode_special_tokens = tokenizer.split_special_tokens
        frame = backend.encode("").ids
        encode, decode = partial(_encode, backend), partial(_decode, backend)
    if eos is None or frame not in ([bos, eos], [eos]):
        raise InputError(f"the {name} encodes an empty text as {frame}: pass one of CLIP (bos, eos) or T5 (eos)")
    if pad is None:
        raise InputError(f"the {name} has no padding token: set its pad_token")
    kind = _CLIP if len(frame) == 2 else _T5
    length = _length(tokenizer.model_max_length, kind.length, f"the {name}")
    return Tokenizer(encode, decode, bos if kind is _CLIP else None, eos, pad, length)


def hashing(vocab_size: int, *, bos: int | None, eos: int, pad: int, length: int, first: int = 0) -> Tokenizer:
    """A stand-in without a vocabulary, for random weights: each word and each punctuation mark is one id.

    Args:
        vocab_size: all ids of words are below it.
        bos: as `eos`, `pad` and `length` in `Tokenizer`; no word gets one of these ids.
        eos: see `bos`.
        pad: see `bos`.
        length: see `bos`.
        first: the ids of words start here.

    Raises:
        InputError: no id is left for words.
    """
    ids = [i for i in range(first, vocab_size) if i not in (bos, eos, pad)]
    if not ids:
        raise InputError(f"a vocabulary of {vocab_size} has no id for words from {first} on: make it larger")
    origin = {"vocab_size": vocab_size, "bos": bos, "eos": eos, "pad": pad, "length": length, "first": first}
    return Tokenizer(partial(_hash_words, ids), _name_ids, bos, eos, pad, length, origin)


def _encode(backend: Backend, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _decode(backend: Backend, ids: Sequence[int]) -> str:
    text = backend.decode(list(ids), skip_special_tokens=False)
    return text.replace("</w>", " ").strip() if isinstance(backend.model, models.BPE) else text


def _encode_slow(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _decode_slow(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _hash_words(ids: Sequence[int], text: str) -> list[int]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [ids[zlib.crc32(word.encode()) % len(ids)] for word in words]


def _name_ids(ids: Sequence[int]) -> str:
    return " ".join(f"#{i}" for i in ids)


# ------------------------------------------------------------------------------------------------------------
# The two kinds


_Built = tuple[Backend, list[str | AddedToken]]


class _Kind(NamedTuple):
    name: str
    model: str  # its type in tokenizer.json
    files: tuple[str, ...]  # where there is no tokenizer.json
    # (folder, tokenizer_config.json, tokenizer.json, unknown token) -> the backend and what its files call special
    build: Callable[[Path, Mapping[str, Any], Mapping[str, Any], str], _Built]
    marks: Mapping[str, str]  # the special tokens it needs, as they are called where no file says otherwise
    length: int


def _clip(folder: Path, config: Mapping[str, Any], serialized: Mapping[str, Any], unknown: str) -> _Built:
    """`transformers.CLIPTokenizer` (Radford et al. 2021): lower case, words that end in `</w>`, byte-level BPE."""
    options: dict[str, Any] = {"unk_token": unknown, "end_of_word_suffix": "</w>", "continuing_subword_prefix": ""}
    if serialized:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in serialized["model"]["merges"])
        model = models.BPE(serialized["model"]["vocab"], [tuple(merge) for merge in merges], **options)
    else:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), **options)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, []


def _t5(folder: Path, config: Mapping[str, Any], serialized: Mapping[str, Any], unknown: str) -> _Built:
    """`transformers.T5Tokenizer` (Raffel et al. 2020): SentencePiece's normalisation, then the likeliest pieces."""
    count = config.get("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise InputError(f"extra_ids of {str(folder)!r} is {count!r}: T5 has 100")
    sentinels = [f"<extra_id_{i}>" for i in range(count)]
    special: list[AddedToken] = []
    if serialized:
        pieces = [(text, score) for text, score in serialized["model"]["vocab"]]
        charsmap, unknown_id = _serialized_charsmap(serialized), serialized["model"]["unk_id"]
    else:
        file = _read_sentencepiece(folder / "spiece.model")
        pieces = [(text, score) for text, score, _ in file.pieces] + [(token, 0.0) for token in reversed(sentinels)]
        special = [AddedToken(text, normalized=False) for text, _, kind in file.pieces if kind in _ALWAYS_WHOLE]
        charsmap, unknown_id = file.charsmap, file.unknown_id
    if unknown_id != 2:
        raise InputError(f"{str(folder)!r} has its unknown token at {unknown_id}, T5 at 2: use the tokenizer of a T5")
    backend = Backend(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    metaspace: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    backend.decoder = decoders.Metaspace(**metaspace)
    return backend, [*special, *sentinels]


_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLIP = _Kind(
    name="CLIP",
    model="BPE",
    files=("vocab.json", "merges.txt"),
    build=_clip,
    marks={"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END},
    length=77,
)
_T5 = _Kind(
    name="T5",
    model="Unigram",
    files=("spiece.model",),
    build=_t5,
    marks={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    length=512,
)
_KINDS = {"CLIPTokenizer": _CLIP, "T5Tokenizer": _T5}
_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")


def _kind(folder: Path, held: set[str], config: Mapping[str, Any], serialized: Mapping[str, Any]) -> _Kind:
    """Which of the two lies in the folder; raises `InputError` unless it is one of them with all its files."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    model = serialized["model"].get("type") if isinstance(serialized.get("model"), dict) else None
    if name in _GENERIC:
        unigram = model == _T5.model if serialized else _T5.files[0] in held
        kind = _T5 if unigram else _CLIP
    elif name in _KINDS:
        kind = _KINDS[name]
    else:
        raise InputError(f"{str(folder)!r} holds a {name}: the tokenizers of CLIP and T5 are {' and '.join(_KINDS)}")
    if serialized and model not in (None, kind.model):  # the oldest files name no type
        raise InputError(
            f"{str(folder / 'tokenizer.json')!r} holds a {model} model: that of a {kind.name} tokenizer is {kind.model}"
        )
    if not serialized and not held.issuperset(kind.files):
        found = ", ".join(sorted(held)[:8]) or "nothing"
        raise InputError(
            f"{str(folder)!r} holds no {kind.name} tokenizer but {found}: it needs {' and '.join(kind.files)}, "
            "or tokenizer.json"
        )
    return kind


def _length(value: Any, usual: int, where: str) -> int:
    if value is None or (isinstance(value, int | float) and value > 1e20):  # transformers' "no limit" is 1e30
        return usual
    if not isinstance(value, int) or value < 2:
        raise InputError(f"model_max_length of {where} is {value!r}: it is a number of tokens, such as {usual}")
    return int(value)


# ------------------------------------------------------------------------------------------------------------
# Special tokens

# In the order in which transformers adds them: one that the vocabulary lacks gets the next free id.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _token(value: Any) -> AddedToken:
    """A token from the way in which the configuration files write it: its text, or an object with text and flags."""
    if isinstance(value, dict):
        return AddedToken(**{name: field for name, field in value.items() if name not in ("__type", "id")})
    return value if isinstance(value, AddedToken) else AddedToken(value, special=True)


def _add_special_tokens(
    backend: Backend,
    kind: _Kind,
    special: list[str | AddedToken],
    folder: Path,
    config: Mapping[str, Any],
    serialized: Mapping[str, Any],
) -> dict[str, int]:
    """Let the backend find the special tokens in a text, as transformers' `_from_pretrained` does.

    A checkpoint lists them in `tokenizer_config.json`; older ones in `special_tokens_map.json`, `added_tokens.json`
    and `tokenizer.json`, which count only where the first lists none.

    Returns:
        The ids of the tokens in `kind.marks`.
    """
    settings = dict(config)
    if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" in settings:
        added = {int(i): _token(fields) for i, fields in settings["added_tokens_decoder"].items()}
    else:
        settings |= _read_json(folder / "special_tokens_map.json")
        values = (*map(settings.get, _NAMED), *(settings.get("extra_special_tokens") or ()))
        known = {_token(value).content for value in values if value}
        added = {
            i: AddedToken(text, normalized=text not in known, special=text in known)
            for text, i in _read_json(folder / "added_tokens.json").items()
        }
        for fields in serialized.get("added_tokens", ()):
            added[fields["id"]] = _token(fields)
    extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens", special)) or ()
    listed = {token.content: token for token in added.values()}
    settings = {**kind.marks, **{name: value for name, value in settings.items() if value}}
    named = {name: _token(settings[name]) for name in _NAMED if name in settings}
    for name in kind.marks:
        if named[name].content not in listed and backend.token_to_id(named[name].content) is None:
            raise InputError(
                f"the vocabulary in {str(folder)!r} lacks {named[name].content!r}, its {name}: take all files of the "
                "tokenizer from one checkpoint"
            )
    others = (*named.values(), *map(_token, extra))
    tokens = [*(added[i] for i in sorted(added)), *(token for token in others if token.content not in listed)]
    texts = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in texts
    backend.add_tokens(tokens)
    return {name: i for name in kind.marks if (i := backend.token_to_id(named[name].content)) is not None}


# ------------------------------------------------------------------------------------------------------------
# SentencePiece

# Numbers from sentencepiece_model.proto.
_ALWAYS_WHOLE = (3, 4)  # types of pieces: control, user-defined
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


class _SentencePiece(NamedTuple):
    """What T5 needs of a `ModelProto`."""

    pieces: list[tuple[str, float, int]]  # text, score (log probability), type
    charsmap: bytes  # the compiled normalisation rules; empty where there are none
    unknown_id: int


def _read_sentencepiece(path: Path) -> _SentencePiece:
    try:
        pieces, trainer, normalizer = [], None, None
        for number, value in protobuf.values(path.read_bytes()):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                trainer = dict(protobuf.values(value))
            elif number == 3:
                normalizer = dict(protobuf.values(value))
        if trainer is None or normalizer is None:
            raise ValueError("it ends too early")
        charsmap = _checked_charsmap(normalizer.get(2, b""))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    except (ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise InputError(
            f"{str(path)!r} is truncated or no SentencePiece model ({one_line(error)}): download it again"
        ) from None
    if trainer.get(3, 1) != 1:
        kind = _MODEL_TYPES.get(trainer[3], trainer[3])
        raise InputError(f"{str(path)!r} is a {kind} model: T5's is a unigram model")
    return _SentencePiece(pieces, charsmap, trainer.get(40, 0))


def _piece(message: Any) -> tuple[str, float, int]:
    fields = dict(protobuf.values(message))
    return fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, 1)


def _serialized_charsmap(serialized: Mapping[str, Any]) -> bytes:
    """The compiled normalisation rules in a tokenizer.json; empty where there are none."""
    normalizer = serialized.get("normalizer") or {}
    parts = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    compiled = (part["precompiled_charsmap"] for part in parts if part.get("type") == "Precompiled")
    return _checked_charsmap(base64.b64decode(next(compiled, b"")))


def _checked_charsmap(charsmap: bytes) -> bytes:
    """The map itself, if no text can lead `tokenizers` out of it, where it would panic.

    It is the size of a double-array trie in bytes, the trie (Darts), and the strings that the trie's leaves point to.
    """
    if not charsmap:
        return charsmap
    size = int.from_bytes(charsmap[:4], "little")
    if size % 4 or 4 + size > len(charsmap):
        raise ValueError("its normalisation rules are cut")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    children = np.arange(len(units)) ^ offsets  # of each unit one in its block of 256, the others being in that, too
    followed = units < 1 << 31
    followed[:1] = True
    starts = np.frombuffer(charsmap, np.uint8, offset=4 + size) & 0xC0 != 0x80  # of characters in the strings
    inside = (children[followed] | 255).max(initial=255) < len(units)
    if inside:
        leaves = units[children[followed & (units & 0x100 != 0)]] & 0x7FFFFFFF
        inside = leaves.max(initial=0) < len(starts) and starts[leaves].all()
    if not inside:
        raise ValueError("its normalisation rules point nowhere")
    return charsmap


# ------------------------------------------------------------------------------------------------------------
# Files


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    return read_json(path) if path.exists() else {}
