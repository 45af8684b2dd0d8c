"""The tokenizer against hand-computed ids, Hugging Face's conversion of the same files, and bad input."""

import base64
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests.support.make_tokenizers import (
    BYTES,
    LLAMA3_SPECIAL,
    REPOSITORY,
    SHIPPED,
    SMALL,
    property_test,
    real_code,
    write_llama3_like,
    write_tokenizer,
)
from titanlite import tokenizer as tokenizer_module
from titanlite.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer

HOSTILE = [
    "",
    " ",
    "\x00",
    "\x00" * 1000,
    "\ufeffBOM",
    "<|end_of_text|>",
    "a<|begin_of_text|><|end_of_text|> <|eot_id|>\n<|end_of_text|>",
    "it's IT'S I'LL we'Ve ſ'ſ 'ſ",
    "1234567 ١٢٣٤ ²³ Ⅷ 1a2b",
    "a\r\n\r\n  b\n \n\t c   \n",
    "".join(map(chr, range(256))),
    "e\u0301\u0302\u200d\u2028\u2029\u00a0\u3000\u180e\u200b x",
    "👩‍👩‍👧‍👦🏳️‍🌈 नमस्ते สวัสดี 你好，世界。 안녕 שלום مرحبا",
    *(f"{chr(plane << 16 | 0x41F0)}a {chr(plane << 16 | 0xFFF0)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17)),
]


# ---- hand-computed ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "config", "bos_eos_pad_vocab", "text", "document"),
    [
        pytest.param(  # "hello wo" = hell o | " w" o
            {"<|endoftext|>": 260},
            {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
            (260, 260, None, 261),
            "hello wo",
            [258, 111, 259, 111, 260],
            id="GPT-2-like: bos is eos",
        ),
        pytest.param(
            {"<|bos|>": 260, "<|eos|>": 261, "<|pad|>": 262},
            {"bos_token": {"content": "<|bos|>"}, "eos_token": {"content": "<|eos|>"}, "pad_token": "<|pad|>"},
            (260, 261, 262, 263),
            "hello",
            [260, 258, 111, 261],
            id="Llama-3-like: tokens as objects",
        ),
        pytest.param(
            {"<|endoftext|>": 300, "<|im_start|>": 301},
            {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": None},
            (None, 300, None, 302),
            "he he",
            [256, 32, 256, 300],
            id="Qwen-like: no bos, ids with gaps",
        ),
        pytest.param(
            {"<s>": 260, "</s>": 261},
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
            (260, 261, 261, 262),
            "",
            [260, 261],
            id="pad is eos, empty text",
        ),
        pytest.param(
            {"<s>": 260, "</s>": 261},
            {"bos_token": "<s>", "eos_token": "</s>"},
            (260, 261, None, 262),
            "</s>",
            [260, 60, 47, 115, 62, 261],
            id="a special token in the text is characters",
        ),
        pytest.param(
            {"<s>": 260, "</s>": 261},
            {"eos_token": "</s>", "split_pattern": r"\w|\W"},
            (None, 261, None, 262),
            "hell\n",
            [104, 101, 108, 108, 10, 261],
            id="own split pattern: no merges across characters",
        ),
    ],
)
def test_documents_have_the_ids_computed_by_hand(
    tmp_path: Path,
    special: dict[str, int],
    config: dict[str, Any],
    bos_eos_pad_vocab: tuple[int | None, int, int | None, int],
    text: str,
    document: list[int],
) -> None:
    tokenizer = Tokenizer.load(str(write_tokenizer(tmp_path, SMALL, special, **config)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == bos_eos_pad_vocab
    assert tokenizer.special_tokens == special
    ids = tokenizer.encode_document(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == document
    bos = 1 if tokenizer.bos_id not in (None, tokenizer.eos_id) else 0
    assert tokenizer.encode(text).tolist() == document[bos:-1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ranks_may_leave_a_hole_for_a_special_token(tmp_path: Path) -> None:
    """As p50k_base does: eos sits in the middle of the ranks."""
    write_tokenizer(tmp_path, BYTES, {"<eos>": 256}, eos_token="<eos>")
    with open(tmp_path / "tokenizer.model", "ab") as file:
        file.write(base64.b64encode(b"ab") + b" 257\n")
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode_document("ab").tolist() == [257, 256]
    assert tokenizer.vocab_size == 258


def test_decode_shows_special_tokens_and_replaces_broken_utf8(tmp_path: Path) -> None:
    special = {"<s>": 260, "</s>": 261}
    tokenizer = Tokenizer.load(str(write_tokenizer(tmp_path, SMALL, special, bos_token="<s>", eos_token="</s>")))
    assert tokenizer.decode([260, 258, 111, 261]) == "<s>hello</s>"
    assert tokenizer.decode(np.array([0xE4, 0xBD, 0x41], np.int64)) == "\ufffdA"
    assert tokenizer.decode([]) == ""
    for unknown in (262, -1):
        with pytest.raises(ValueError, match=f"lacks an id.*{unknown}" if unknown > 0 else "lacks an id"):
            tokenizer.decode([65, unknown])


# ---- Llama 3's size and shape, against Hugging Face ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["generated", "real"])
def llama3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokenizer, Any]]:
    """Our tokenizer and Hugging Face's, which reads the same rank file with its own code."""
    if request.param == "generated":
        folder = write_llama3_like(tmp_path_factory.mktemp("llama3"))
    elif "TITANLITE_LLAMA3_TOKENIZER" in os.environ:
        folder = Path(os.environ["TITANLITE_LLAMA3_TOKENIZER"])
    else:
        pytest.skip("Llama 3's files are licensed and not shipped: TITANLITE_LLAMA3_TOKENIZER names a folder with them")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # transformers reads through tiktoken's path cache
        yield Tokenizer.load(str(folder)), TikTokenConverter(str(folder / "tokenizer.model")).converted()


def test_llama3_has_its_size_and_special_tokens(llama3: tuple[Tokenizer, Any], request: pytest.FixtureRequest) -> None:
    tokenizer, reference = llama3
    assert tokenizer.vocab_size == 128_256
    assert len(tokenizer.special_tokens) == 256
    assert reference.get_vocab_size() == 128_000
    assert (tokenizer.bos_id, tokenizer.special_tokens["<|end_of_text|>"]) == (128_000, 128_001)
    assert tokenizer.special_tokens["<|eot_id|>"] == 128_009
    if "real" in request.node.name:
        assert tokenizer.encode("hello world").tolist() == [15339, 1917]
    reference_with_special = tokenizers.Tokenizer.from_str(reference.to_str())
    reference_with_special.add_special_tokens(LLAMA3_SPECIAL)
    assert reference_with_special.encode("".join(LLAMA3_SPECIAL)).ids == list(range(128_000, 128_256))


def test_llama3_agrees_on_real_code_and_hostile_strings(llama3: tuple[Tokenizer, Any]) -> None:
    tokenizer, reference = llama3
    used: set[int] = set()
    for text in [*real_code(), *HOSTILE]:
        ids = tokenizer.encode(text).tolist()
        assert ids == reference.encode(text).ids, text[:80]
        assert tokenizer.decode(ids) == text
        used.update(ids)
    assert len(used) > 4000  # or the texts would prove little


@settings(property_test, max_examples=400)
@given(data=st.data())
def test_llama3_agrees_on_any_text(llama3: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    tokenizer, reference = llama3
    token = st.integers(0, 127_999).map(lambda i: tokenizer.decode([i]))
    part = (
        token
        | st.text(max_size=8)
        | st.sampled_from(["'", "s", "LL", " ", "  ", "\n", "\r\n", "\t", "12", "<|eot_id|>"])
    )
    text = "".join(data.draw(st.lists(part, max_size=30)))
    ids = tokenizer.encode(text).tolist()
    assert ids == reference.encode(text).ids
    assert max(ids, default=0) < 128_000


# ---- identity -----------------------------------------------------------------------------------------------------


def test_a_rewritten_rank_file_is_read_again(tmp_path: Path) -> None:
    """tiktoken's own reader caches by path and would return the old vocabulary."""
    write_tokenizer(tmp_path, [*BYTES, b"ab"], {"</s>": 257}, eos_token="</s>")
    first = Tokenizer.load(str(tmp_path))
    write_tokenizer(tmp_path, [*BYTES, b"bc"], {"</s>": 257}, eos_token="</s>")
    second = Tokenizer.load(str(tmp_path))
    assert first.encode("abc").tolist() == [256, 99]
    assert second.encode("abc").tolist() == [97, 256]
    assert first.fingerprint != second.fingerprint


def test_the_fingerprint_names_all_that_decides_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, special = [*BYTES, b"ab", b"bc"], {"<s>": 258, "</s>": 259}
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    variants = [
        (tokens, special, config),
        ([*BYTES, b"bc", b"ab"], special, config),
        ([*BYTES, b"ab", b"bd"], special, config),
        (tokens, {"<s>": 258, "</S>": 259}, {**config, "eos_token": "</S>"}),
        (tokens, {"<s>": 258, "</s>": 260}, config),
        (tokens, special, {"eos_token": "</s>"}),
        (tokens, special, {**config, "eos_token": "<s>"}),
        (tokens, special, {**config, "pad_token": "<s>"}),
        (tokens, special, {**config, "split_pattern": r"\s+|\S+"}),
    ]

    def fingerprint(i: int) -> str:
        return Tokenizer.load(
            str(write_tokenizer(tmp_path / str(i), variants[i][0], variants[i][1], **variants[i][2]))
        ).fingerprint

    fingerprints = [fingerprint(i) for i in range(len(variants))]
    assert len(set(fingerprints)) == len(variants)
    assert all(len(f) == 64 for f in fingerprints)
    default = {**config, "split_pattern": LLAMA3_SPLIT_PATTERN, "comment": "a note decides nothing"}
    elsewhere = write_tokenizer(tmp_path / "elsewhere", tokens, special, **default)
    lines = (elsewhere / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (elsewhere / "tokenizer.model").write_bytes(b"\n".join(reversed(lines)))
    assert Tokenizer.load(str(elsewhere)).fingerprint == fingerprints[0]
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 1000)
    assert fingerprint(0) != fingerprints[0]


def test_the_shipped_tokenizer_loads_and_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="titanlite"):
        tokenizer = Tokenizer.load(str(SHIPPED / "tokenizer.model"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (8189, 8190, 8191, 8192)
    assert tokenizer.split_pattern == LLAMA3_SPLIT_PATTERN
    (line,) = [record.getMessage() for record in caplog.records]
    for said in (
        "8189 ranks",
        "3 special",
        "vocabulary 8192",
        "bos 8189",
        "eos 8190",
        "pad 8191",
        "tokenizer_config.json",
    ):
        assert said in line
    assert tokenizer.fingerprint[:12] in line
    assert Tokenizer.load(str(SHIPPED)).fingerprint == tokenizer.fingerprint


# ---- the script that trains the shipped one -----------------------------------------------------------------------


def test_the_training_script_gives_the_same_files_twice(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: " + "the cat sat on the mat while another dog barked\n" * 20)
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_tokenizer.py"), "--vocab_size", "280", "--input"]
    for output in ("a", "b"):
        run = [*command, str(tmp_path / "*.txt"), "--output", str(tmp_path / output)]
        result = subprocess.run(run, capture_output=True, text=True, check=True)
        assert "all as the trained model's" in result.stdout
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = Tokenizer.load(str(tmp_path / "a"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (280, 277, 278, 279)
    assert len(tokenizer.encode(" the the")) == 2
    failed = subprocess.run([*command, str(tmp_path / "*.nothing")], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("train_tokenizer.py: data.paths")
