"""Tokenizers against their oracles: transformers' classes from the same folder, and the sentencepiece library."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import ByT5Tokenizer, CLIPTokenizer, T5Tokenizer

from fastsd.tokenizer import Tokenizer, from_transformers, hashing, load

README = (Path(__file__).parent.parent / "README.md").read_text()

TEXTS = {
    "empty": "",
    "spaces": "   ",
    "whitespace": " \t\n\r\x0b\x0c\x85\u2028\u2029\u1680 a\u00a0b\u202fc\u3000d ",
    "sentence": "A photo of a red circle on a blue background, 8k, 8K, highly detailed",
    "case": "ΑΣΊΑΣ İstanbul STRASSE straße ǅ",
    "contractions": "it's they'll I'd we've you're don't I'M IT'S 'S s' ''s",
    "control": "a\x01b\x07c\x1bd\x7fe\x9ff\x00g",
    "emoji": "😀👍🏽❤️ 🇩🇪",
    "joined emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈",
    "combining": "e\u0301 n\u0303 o\u0308\u0323 \u0301 a\u0315\u0300\u05ae\u0062",
    "composed": "é ñ ộ \u212b \uac00 \u1112\u1161\u11ab",
    "cjk": "一只猫坐在桌子上。 猫がテーブルの上に座っている 고양이",
    "rtl": "قطة حمراء \u200fחתול\u200e \u202eabc\u202c",
    "indic": "नमस्ते क्\u200dष ไทยไม่มีช่องว่าง",
    "full width": "ＡＢＣ　１２３！？",
    "ligatures": "ﬁne oﬃce ĳ ﷺ Ⅷ ½ ² ① ㎏ ™",
    "long word": "antidisestablishmentarianism" * 20,
    "one letter": "a" * 400,
    "url": "https://example.org/a_b-c?x=1&y=%20#z user@example.org",
    "html": "&lt;b&gt;cats &amp;amp; dogs&#39; &nbsp; &eacute;</b><br/>",
    "numbers": "1234567890 3.14159 1,000,000 1e-5 0x7f ٣٤٥ Ⅻ",
    "punctuation": "!!!...???---___***((([[[{{{~~~```^^^|||\\\\\\///",
    "quotes": "“curly” ‘single’ «guillemets» „low“ — – … ",
    "weights": "(masterpiece:1.2), [bad], a AND b, <lora:cat:0.8>",
    "metaspace": "▁ ▁a b▁c ▁▁",
    "end of word": "cat</w> </w> </w>dog",
    "zero width": "ze\u200bro \ufeffwidth\u2060 \u00adsoft\u00adhyphen \u180e",
    "clip marks": "a <|endoftext|> b<|startoftext|>c <|STARTOFTEXT|><|ENDOFTEXT|><|endoftext|",
    "t5 marks": "a </s> b</s>c <unk> <pad> <s> </S>< /s>",
    "sentinels": "the <extra_id_0> walks <extra_id_99>in<extra_id_1> <extra_id_100> <EXTRA_ID_2> <mask>",
    "added": "a <cat> b<cat>c <CAT>  <cat> ＜cat＞",
    "private": "\ue000 \U000f0000 \ufffd \ufffe \U0010ffff",
}


class Trained(NamedTuple):
    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    spiece: bytes
    spiece_identity: bytes  # without normalisation


@cache
def trained() -> Trained:
    """CLIP's and T5's models, trained on the texts above and the README: small, but with pieces of every script."""
    lines = [*README.splitlines(), *(text[:2000] for text in TEXTS.values())]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    bpe.train_from_iterator(
        [line.lower() for line in lines],
        BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    spieces = []
    for rule in ("nmt_nfkc", "identity"):
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.replace("\0", "") for line in lines),
            model_writer=file,
            vocab_size=600,
            character_coverage=0.99,
            normalization_rule_name=rule,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},  # as in T5
            user_defined_symbols=["<cat>"],
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
        spieces.append(file.getvalue())
    return Trained(vocabulary, merges, *spieces)


# ------------------------------------------------------------------------------------------------------------
# Every form that the hub has: file name -> text, bytes, or what json writes

Files = dict[str, Any]

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MARKS = {"bos_token": START, "eos_token": END, "unk_token": END}
T5_MARKS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]


def as_token(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def clip_two_files() -> Files:
    merges = "".join(f"{left} {right}\n" for left, right in trained().merges)
    return {"vocab.json": trained().vocabulary, "merges.txt": f"#version: 0.2\n{merges}"}


def clip_sd15() -> Files:
    """As stable-diffusion-v1-5/tokenizer: flags in both files, normalised marks."""
    marks = {name: as_token(text, normalized=True) for name, text in CLIP_MARKS.items()}
    config = {name: {"__type": "AddedToken", **fields} for name, fields in marks.items()} | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": END,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    return clip_two_files() | {"tokenizer_config.json": config, "special_tokens_map.json": {**marks, "pad_token": END}}


def clip_sd2() -> Files:
    """As stable-diffusion-2-1/tokenizer: the special tokens map pads with "!", the configuration says otherwise."""
    files = clip_sd15()
    files["special_tokens_map.json"]["pad_token"] = "!"
    return files


def clip_sdxl() -> Files:
    """As stable-diffusion-xl-base-1.0/tokenizer_2: pads with "!", which is then special in a text, too."""
    ids = trained().vocabulary
    added = {ids["!"]: as_token("!", special=True)}
    added |= {ids[text]: as_token(text, normalized=True, special=True) for text in (START, END)}
    config = {
        **CLIP_MARKS,
        "pad_token": "!",
        "mask_token": None,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "clean_up_tokenization_spaces": True,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    return clip_two_files() | {"tokenizer_config.json": config}


def clip_textual_inversion() -> Files:
    """With a learned token, as transformers 4 wrote it before `added_tokens_decoder`."""
    config = {**CLIP_MARKS, "pad_token": "!", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    added = {"<cat>": len(trained().vocabulary)}
    return clip_two_files() | {"tokenizer_config.json": config, "added_tokens.json": added}


def clip_special_word() -> Files:
    files = clip_textual_inversion()
    files["tokenizer_config.json"]["additional_special_tokens"] = ["<cat>", "8k"]
    return files


def clip_split_special_tokens() -> Files:
    """Special tokens in a text are no special tokens; "red", which is just a token, is one all the same."""
    files = clip_sd15()
    files["tokenizer_config.json"] |= {"split_special_tokens": True, "additional_special_tokens": ["<cat>"]}
    first = len(trained().vocabulary)
    return files | {"added_tokens.json": {"<cat>": first, "red": first + 1}}


def clip_bare_marks() -> Files:
    """Marks without flags, added tokens out of order, and no token for the byte 7, which is then unknown."""
    vocabulary = {text: i for text, i in trained().vocabulary.items() if text not in ("ć", "ć</w>")}
    first = len(trained().vocabulary)
    return {
        "vocab.json": vocabulary,
        "merges.txt": "".join(f"{left} {right}\n" for left, right in trained().merges if "ć" not in left + right),
        "special_tokens_map.json": {"bos_token": {"content": START}, "eos_token": END},
        "added_tokens.json": {"8k": first + 1, "<cat>": first},
    }


def clip_json() -> Files:
    """As FLUX.1/tokenizer, where tokenizer.json lies beside the older files; here those are of another model."""
    content = json.loads(CLIPTokenizer(trained().vocabulary, trained().merges).backend_tokenizer.to_str())
    other = {text: i for i, text in enumerate(reversed(trained().vocabulary))}
    config = clip_sdxl()["tokenizer_config.json"] | {"tokenizer_class": "CLIPTokenizerFast"}
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": config,
        "vocab.json": other,
        "merges.txt": "#version: 0.2\n",
    }


def clip_old_json() -> Files:
    """Alone, so that no class is named, and with merges as text, as tokenizers wrote them before 0.20."""
    content = clip_json()["tokenizer.json"]
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    return {"tokenizer.json": content}


def t5_v1_1() -> Files:
    """As google/t5-v1_1-xxl."""
    marks = {**T5_MARKS, "additional_special_tokens": SENTINELS}
    config = {**marks, "extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    return {
        "spiece.model": trained().spiece,
        "special_tokens_map.json": marks,
        "tokenizer_config.json": config,
    }


def t5_json() -> Files:
    """Alone, with the normaliser that transformers 4 wrote: no class, no length."""
    with TemporaryDirectory() as folder:
        write(Path(folder), {"spiece.model": trained().spiece})
        content = json.loads(T5Tokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], strip]}
    return {"tokenizer.json": content}


def t5_flux() -> Files:
    """As FLUX.1/tokenizer_2 and SD3/tokenizer_3: tokenizer.json beside spiece.model, sentinels that eat spaces."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained().spiece).get_piece_size()
    added = {i: as_token(text, special=True) for i, text in enumerate(["<pad>", "</s>", "<unk>"])}
    for i, text in enumerate(reversed(SENTINELS)):
        added[pieces + i] = as_token(text, special=True, lstrip=True, rstrip=True)
    config = t5_v1_1()["tokenizer_config.json"] | {
        "add_prefix_space": True,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "clean_up_tokenization_spaces": True,
        "legacy": True,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5TokenizerFast",
    }
    return t5_json() | {"spiece.model": b"not read", "tokenizer_config.json": config}


def t5_added() -> Files:
    """Fewer sentinels, and tokens that the vocabulary lacks."""
    config = {"extra_ids": 3, "mask_token": "<mask>", "model_max_length": 1e30, "tokenizer_class": "T5Tokenizer"}
    return {
        "spiece.model": trained().spiece,
        "tokenizer_config.json": config,
        "added_tokens.json": {"<dog>": 2000, "blue": 1999},
    }


FORMS: dict[str, Callable[[], Files]] = {
    "clip sd15": clip_sd15,
    "clip sd2": clip_sd2,
    "clip sdxl": clip_sdxl,
    "clip textual inversion": clip_textual_inversion,
    "clip special word": clip_special_word,
    "clip split special tokens": clip_split_special_tokens,
    "clip bare marks": clip_bare_marks,
    "clip two files": clip_two_files,
    "clip json": clip_json,
    "clip old json": clip_old_json,
    "t5 v1.1": t5_v1_1,
    "t5 flux": t5_flux,
    "t5 json": t5_json,
    "t5 spiece": lambda: {"spiece.model": trained().spiece},
    "t5 identity": lambda: {"spiece.model": trained().spiece_identity},
    "t5 added": t5_added,
}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


class Pair(NamedTuple):
    ours: Tokenizer
    oracle: Any
    folder: Path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def make(form: str) -> Pair:
        folder = write(tmp_path_factory.mktemp(form.replace(" ", "_")), FORMS[form]())
        oracle = (CLIPTokenizer if form.startswith("clip") else T5Tokenizer).from_pretrained(folder)
        return Pair(load(folder), oracle, folder)

    return make


def frame(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """The window that a text encoder reads: cut, with marks, padded."""
    opening = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = [*opening, *tokenizer.encode(text)[: length - len(opening) - 1], tokenizer.eos]
    return ids + [tokenizer.pad] * (length - len(ids))


def assert_same(ours: Tokenizer, oracle: Any, text: str) -> None:
    ids = oracle(text, add_special_tokens=False, verbose=False).input_ids
    assert ours.encode(text) == ids
    for length in (5, 77):
        window = oracle(text, padding="max_length", max_length=length, truncation=True).input_ids
        assert frame(ours, text, length) == window
    assert ours.decode(ids[:500]) == oracle.decode(ids[:500], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_transformers(form: str, text: str, pairs: Callable[[str], Pair]) -> None:
    assert_same(pairs(form).ours, pairs(form).oracle, text)


FRAGMENTS = [
    *"!' \t\n\u00a0\u0301▁",
    "'s",
    "cat",
    "</w>",
    "<cat>",
    "blue",
    "8k",
    START,
    END,
    "</s>",
    "<pad>",
    "<unk>",
    "<extra_id_1>",
]
PROMPTS = st.lists(st.text(max_size=8) | st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@pytest.mark.parametrize("text", ["A cat, and 2 dogs! " * 5_264, "a\u0301" * 50_000], ids=["words", "one word"])
@pytest.mark.parametrize("form", ["clip sd15", "t5 v1.1"])
def test_100k_characters(form: str, text: str, pairs: Callable[[str], Pair]) -> None:
    ids = pairs(form).ours.encode(text)
    assert ids == pairs(form).oracle(text, add_special_tokens=False, verbose=False).input_ids


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None)
@given(text=PROMPTS)
def test_ids_of_any_text_are_those_of_transformers(form: str, text: str, pairs: Callable[[str], Pair]) -> None:
    assert_same(pairs(form).ours, pairs(form).oracle, text)


# What transformers' T5 does otherwise than the sentencepiece library: it splits at every Unicode space, drops the
# space before user-defined symbols, finds special tokens in a text, and breaks ties between equally likely pieces.
OWN_WAY = {"whitespace", "added", "t5 marks", "sentinels", "punctuation"}


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in OWN_WAY])
def test_ids_are_those_of_sentencepiece(name: str, pairs: Callable[[str], Pair]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained().spiece)
    assert pairs("t5 spiece").ours.encode(TEXTS[name]) == oracle.encode(TEXTS[name])


@pytest.mark.parametrize(
    ("form", "length"),
    [("clip sd15", 77), ("clip two files", 77), ("t5 v1.1", 512), ("t5 json", 512), ("t5 added", 512)],
)
def test_length(form: str, length: int, pairs: Callable[[str], Pair]) -> None:
    assert pairs(form).ours.length == length


def test_a_length_of_its_own_is_kept(tmp_path: Path) -> None:
    files = t5_v1_1()
    files["tokenizer_config.json"]["model_max_length"] = 256
    assert load(write(tmp_path, files)).length == 256


def test_null_marks_are_the_usual_ones(tmp_path: Path) -> None:
    files = t5_v1_1() | {"special_tokens_map.json": {"bos_token": None, "eos_token": None}}
    files["tokenizer_config.json"] |= {"bos_token": None, "pad_token": None}
    ours = load(write(tmp_path, files))
    assert (ours.bos, ours.eos, ours.pad) == (None, 1, 0)


def test_needs_neither_torch_nor_transformers_nor_sentencepiece(pairs: Callable[[str], Pair]) -> None:
    code = """
import sys
for name in ("torch", "transformers", "sentencepiece", "google.protobuf"):
    sys.modules[name] = None
from fastsd.tokenizer import load
for folder in sys.argv[1:]:
    print(load(folder).encode("a red circle"))
"""
    both = [pairs("clip sd15"), pairs("t5 spiece")]
    command = [sys.executable, "-c", code, *(str(pair.folder) for pair in both)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.splitlines() == [str(pair.ours.encode("a red circle")) for pair in both]


@pytest.mark.parametrize("form", ["clip sdxl", "t5 flux"])
def test_threads_get_the_same_ids(form: str, pairs: Callable[[str], Pair]) -> None:
    ours, texts = pairs(form).ours, [text * 3 for text in TEXTS.values()] * 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ours.encode, texts)) == [ours.encode(text) for text in texts]


# ------------------------------------------------------------------------------------------------------------
# Adopted and stand-in tokenizers


@pytest.mark.parametrize("form", FORMS)
def test_adopted_tokenizer_gives_the_same_ids(form: str, pairs: Callable[[str], Pair]) -> None:
    ours, oracle, _ = pairs(form)
    adopted = from_transformers(oracle)
    assert (adopted.bos, adopted.eos, adopted.pad, adopted.length) == (ours.bos, ours.eos, ours.pad, ours.length)
    for text in TEXTS.values():
        assert_same(adopted, oracle, text)


def test_adopted_tokenizer_is_a_copy(pairs: Callable[[str], Pair]) -> None:
    oracle = CLIPTokenizer.from_pretrained(pairs("clip sd15").folder)
    oracle("a", padding="max_length", max_length=3, truncation=True)  # leaves its backend cutting and padding
    adopted = from_transformers(oracle)
    before = adopted.encode("a red circle on a blue cat")
    oracle.add_tokens(["red circle"])
    oracle("a", padding="max_length", max_length=4, truncation=True)
    assert (
        adopted.encode("a red circle on a blue cat")
        == before
        == pairs("clip sd15").ours.encode("a red circle on a blue cat")
    )


def test_slow_tokenizer_is_called() -> None:
    oracle = ByT5Tokenizer()
    adopted = from_transformers(oracle)
    assert (adopted.bos, adopted.eos, adopted.pad, adopted.length) == (None, 1, 0, 512)
    for text in TEXTS.values():
        assert frame(adopted, text, 40) == oracle(text, padding="max_length", max_length=40, truncation=True).input_ids
    assert adopted.decode(adopted.encode("a cat")) == "a cat"


def test_other_frames_are_not_adopted(pairs: Callable[[str], Pair]) -> None:
    oracle = T5Tokenizer.from_pretrained(pairs("t5 spiece").folder)
    oracle.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A", "$A $B", [])
    assert "encodes an empty text as []: pass one of CLIP" in refusal(lambda: from_transformers(oracle))
    oracle = ByT5Tokenizer()
    oracle.pad_token = None
    assert "no padding token: set its pad_token" in refusal(lambda: from_transformers(oracle))


def test_hashing() -> None:
    check = 0xCBF43926  # CRC-32 of "123456789", as its definition gives it
    tokenizer = hashing(49_408, bos=49_406, eos=49_407, pad=0, length=77, first=256)
    assert tokenizer.encode("123456789") == [256 + check % (49_406 - 256)]
    assert frame(tokenizer, "", 4) == [49_406, 49_407, 0, 0]
    ids = tokenizer.encode("A red circle, a  RED\ncircle")
    assert len(ids) == 7 and ids[:3] == ids[4:] and len(set(ids)) == 4
    assert tokenizer.decode(ids[:2]) == f"#{ids[0]} #{ids[1]}"
    for text in TEXTS.values():
        assert set(tokenizer.encode(text)) <= set(range(256, 49_406))
    small = hashing(1000, bos=None, eos=1, pad=500, length=512)
    everything = small.encode(" ".join(map(str, range(50_000))))
    assert set(everything) == set(range(1000)) - {1, 500}
    assert "make it larger" in refusal(lambda: hashing(3, bos=0, eos=1, pad=2, length=77))


# ------------------------------------------------------------------------------------------------------------
# Refusals


def changed(form: str, name: str, change: Callable[[Any], Any]) -> Callable[[], Files]:
    """The files of a form with another content of one of them; None leaves it out."""

    def make() -> Files:
        files = FORMS[form]()
        files[name] = change(files.get(name))
        return {name: content for name, content in files.items() if content is not None}

    return make


def set_to(**fields: Any) -> Callable[[Any], Any]:
    return lambda content: {**(content or {}), **fields}


def spiece(**options: Any) -> Callable[[Any], bytes]:
    def train(_: Any) -> bytes:
        file = io.BytesIO()
        lines = iter(README.splitlines())
        options.setdefault("vocab_size", 200)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, minloglevel=2, hard_vocab_limit=False, **options
        )
        return file.getvalue()

    return train


def trie(units: dict[int, int], count: int) -> bytes:
    return struct.pack(f"<I{count}I", 4 * count, *(units.get(i, 0) for i in range(count)))


def rules(charsmap: bytes) -> Callable[[Any], Any]:
    return set_to(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'd'}\nsize 791656\n"
CONFIG, JSON = "tokenizer_config.json", "tokenizer.json"

REFUSED: dict[str, tuple[Callable[[], Files], str]] = {
    "nothing": (dict, "holds no CLIP tokenizer but nothing: it needs vocab.json and merges.txt, or tokenizer.json"),
    "no merges": (changed("clip sd15", "merges.txt", lambda _: None), "but special_tokens_map.json, tokenizer_config"),
    "no spiece": (
        lambda: {CONFIG: t5_v1_1()[CONFIG]},
        "holds no T5 tokenizer but tokenizer_config.json: it needs spiece",
    ),
    "other class": (
        changed("t5 json", CONFIG, set_to(tokenizer_class="GemmaTokenizerFast")),
        "holds a GemmaTokenizer: the tokenizers of CLIP and T5 are CLIPTokenizer and T5Tokenizer",
    ),
    "other model": (
        changed("t5 json", CONFIG, set_to(tokenizer_class="CLIPTokenizer")),
        "holds a Unigram model: that of a CLIP tokenizer is BPE",
    ),
    "no model": (changed("clip json", JSON, lambda _: {"version": "1.0"}), "is no CLIP tokenizer (KeyError: 'model')"),
    "broken config": (changed("clip sd15", CONFIG, lambda _: "{"), "tokenizer_config.json' is not valid JSON"),
    "config is a list": (changed("clip sd15", CONFIG, lambda _: []), "holds a JSON list where an object is needed"),
    "config in latin-1": (changed("clip sd15", CONFIG, lambda _: b'{"a": "\xe9"}'), "is not valid JSON ('utf-8' codec"),
    "endless config": (changed("clip sd15", CONFIG, lambda _: '{"a":' * 100_000), "is not valid JSON"),
    "broken json": (changed("clip json", JSON, lambda c: json.dumps(c)[:9999]), "tokenizer.json' is not valid JSON"),
    "broken map": (
        changed("clip sd15", "special_tokens_map.json", lambda _: "["),
        "special_tokens_map.json' is not valid",
    ),
    "broken vocabulary": (changed("clip sd15", "vocab.json", lambda _: '{"a": 0'), "is no CLIP tokenizer (Exception: "),
    "broken merges": (
        changed("clip sd15", "merges.txt", lambda text: f"{text}a b c\n"),
        "is no CLIP tokenizer (Exception: ",
    ),
    "foreign merges": (
        changed("clip sd15", "merges.txt", lambda text: f"{text}zq qz\n"),
        "is no CLIP tokenizer (Exception: ",
    ),
    "no special tokens": (
        changed("clip sd15", "vocab.json", lambda vocabulary: dict(list(vocabulary.items())[:-2])),
        "lacks '<|startoftext|>', its bos_token: take all files of the tokenizer from one checkpoint",
    ),
    "foreign pad": (changed("clip sdxl", CONFIG, set_to(pad_token="<pad>")), "lacks '<pad>', its pad_token"),
    "pad is a number": (changed("clip sdxl", CONFIG, set_to(pad_token=3)), "is no CLIP tokenizer (TypeError: "),
    "added is a list": (changed("clip sdxl", CONFIG, set_to(added_tokens_decoder=[])), "(AttributeError: 'list'"),
    "added is nameless": (changed("clip sdxl", CONFIG, set_to(added_tokens_decoder={"a": "b"})), "(ValueError: "),
    "length 0": (
        changed("clip sd15", CONFIG, set_to(model_max_length=0)),
        "is 0: it is a number of tokens, such as 77",
    ),
    "length is text": (changed("t5 flux", CONFIG, set_to(model_max_length="512")), "is '512': it is a number"),
    "sentinels": (changed("t5 spiece", CONFIG, set_to(extra_ids=10**12)), "extra_ids of"),
    "LFS pointer": (changed("t5 spiece", "spiece.model", lambda _: LFS), "is truncated or no SentencePiece model"),
    "empty spiece": (changed("t5 spiece", "spiece.model", lambda _: b""), "SentencePiece model (it ends too early)"),
    "BPE spiece": (
        changed("t5 spiece", "spiece.model", spiece(model_type="bpe", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)),
        "spiece.model' is a BPE model: T5's is a unigram model",
    ),
    "spiece of XLNet": (changed("t5 spiece", "spiece.model", spiece()), "has its unknown token at 0, T5 at 2: use the"),
    "cut rules": (
        changed("t5 json", JSON, rules(b"\xff\xff\xff\x00")),
        "(ValueError: its normalisation rules are cut)",
    ),
    "uneven rules": (changed("t5 json", JSON, rules(b"\3\0\0\0abc")), "normalisation rules are cut"),
    "empty rules": (changed("t5 json", JSON, rules(bytes(4))), "normalisation rules point nowhere"),
    "rules without a first step": (
        changed("t5 json", JSON, rules(trie({0: 1 << 31 | 1 << 18}, 256) + b"\0")),
        "point nowhere",
    ),
    "rules without children": (changed("t5 json", JSON, rules(trie({0: 1 << 18}, 300) + b"\0")), "point nowhere"),
    "rules without strings": (
        changed("t5 json", JSON, rules(trie({0: 0x100 | 1 << 10, 1: 1}, 256) + b"\0")),
        "point nowhere",
    ),
    "rules that cut a character": (
        changed("t5 json", JSON, rules(trie({0: 0x100 | 1 << 10, 1: 1}, 256) + "é".encode())),
        "point nowhere",
    ),
    "rules of latin-1": (changed("t5 json", JSON, rules(trie({}, 256) + b"\xe9\0")), "is no T5 tokenizer (Exception: "),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(files: Callable[[], Files], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tokenizer", files())
    found = refusal(lambda: load(folder))
    assert message in found
    assert str(folder) in found


def test_missing_folders(tmp_path: Path) -> None:
    assert "No such file or directory): pass the tokenizer folder" in refusal(lambda: load(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    assert "Not a directory): pass the tokenizer folder" in refusal(lambda: load(tmp_path / "file"))


def test_every_cut_of_a_spiece_model_is_refused(tmp_path: Path) -> None:
    whole = trained().spiece_identity
    tails = range(len(whole) - 60, len(whole))  # fields end here, too
    for size in [*random.Random(0).sample(range(len(whole)), 100), *tails]:
        write(tmp_path, {"spiece.model": whole[:size]})
        assert "is truncated or no SentencePiece model" in refusal(lambda: load(tmp_path)), size
