"""The tokenizer on long and hostile texts, and on files that are wrong: no text raises, every mistake says its fix."""

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.make_tokenizers import SHIPPED, SMALL, property_test, real_code, write_tokenizer
from titanlite import tokenizer as tokenizer_module
from titanlite.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer

SPLIT_PATTERNS = {
    "llama3": LLAMA3_SPLIT_PATTERN,
    "qwen2": LLAMA3_SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


# ---- long and hostile texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
@settings(property_test, max_examples=200)
@given(texts=st.lists(st.text(max_size=14), max_size=20))
@example(texts=["".join(t) for n in (3, 4) for t in itertools.product("aS1/.' \n\r\t\u0301²", repeat=n)])
def test_every_soft_cut_is_an_edge_of_pretokens(name: str, texts: list[str]) -> None:
    """The claim behind _CUT, with Hugging Face's regex engine as the judge: cutting there first changes no pretoken."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS[name]), behavior="isolated")

    def pretokens(part: str) -> list[str]:
        return [token for token, _ in split.pre_tokenize_str(part)]

    for text in texts:
        for cut in tokenizer_module._CUT.finditer(text):
            assert pretokens(text[: cut.end()]) + pretokens(text[cut.end() :]) == pretokens(text)


def test_pieces_join_to_the_text_and_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 10)
    for text in ["ab cd " * 50, "x" * 95, "", "a" * 20, "中文\n" * 40, " " * 33]:
        pieces = list(tokenizer_module._pieces(text))
        assert "".join(pieces) == text
        assert all(len(piece) <= 20 for piece in pieces)
        assert all(len(piece) >= 10 for piece in pieces[:-1])
    assert list(tokenizer_module._pieces("x" * 45)) == ["x" * 20, "x" * 20, "x" * 5]  # hard: nowhere to cut


def test_long_code_has_the_ids_of_the_unsplit_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(str(SHIPPED))
    text = "".join(real_code(10))
    assert len(text) > 10 * tokenizer_module.PIECE_CHARS
    unsplit = tokenizer._encoding.tiktoken.encode_ordinary(text)
    assert tokenizer.encode(text).tolist() == unsplit
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 1000)  # a thousand cuts, in code all of them soft
    assert tokenizer.encode(text).tolist() == unsplit


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        "\n" * 1_000_000,
        "\t" * 1_000_000 + "x",
        "a" * 1_000_000,
        "\x00" * 1_000_000,
        "中\u3000" * 500_000,
    ],
    ids=["spaces", "newlines", "tabs", "no spaces", "NULs", "wide spaces"],
)
def test_a_million_of_anything_survives(text: str) -> None:
    tokenizer = Tokenizer.load(str(SHIPPED))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_are_repaired_as_tiktoken_does() -> None:
    tokenizer = Tokenizer.load(str(SHIPPED))
    for text in ["a\ud800b", "\udfff", "\ud83d\ude00 pair", "x " * 80_000 + "\udc00" + " y" * 80_000]:
        ids = tokenizer.encode_document(text).tolist()
        assert ids == [tokenizer.bos_id, *tokenizer._encoding.tiktoken.encode_ordinary(text), tokenizer.eos_id]


def test_threads_give_the_ids_of_one_thread() -> None:
    tokenizer = Tokenizer.load(str(SHIPPED))
    texts = list(real_code(40))
    expected = [tokenizer.encode_document(text).tolist() for text in texts]
    results: dict[int, list[list[int]]] = {}

    def work(thread: int) -> None:
        results[thread] = [tokenizer.encode_document(text).tolist() for text in texts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == [expected] * 4


# ---- mistakes -----------------------------------------------------------------------------------------------------


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def _write_ranks(text: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "tokenizer.model"
        file.write_bytes(text if isinstance(text, bytes) else text(file.read_bytes()))

    return edit


def _write_json(text: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "tokenizer_config.json").write_bytes(text)


RANKS, CONFIG = "tokenizer.model", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / RANKS).unlink(), f"{RANKS}: No such file or directory; give a folder with"),
        (lambda f: (f / CONFIG).unlink(), f"{CONFIG}: No such file or directory; give a folder with"),
        (lambda f: [(f / RANKS).unlink(), (f / RANKS).mkdir()], f"{RANKS}: Is a directory; give a folder with"),
        (_write_ranks(b""), f"{RANKS}: no token for byte 0x00 .256 of 256 bytes missing.*train it byte-level"),
        (_write_ranks(lambda t: t.replace(b"QQ== 65\n", b"")), f"{RANKS}: no token for byte 0x41 .1 of 256"),
        (
            _write_ranks(lambda t: t + b"YWI=\n"),
            f"{RANKS}:261: expected 'base64 rank', got 'YWI='; give a tiktoken rank",
        ),
        (_write_ranks(b"version https://git-lfs.github.com/spec/v1\n"), f"{RANKS}:1: expected .*LFS pointer"),
        (_write_ranks(b"\n\x0e\n\x05<unk>\x15\x00"), f"{RANKS}:2: expected .*not a SentencePiece model"),
        (_write_ranks(lambda t: t + b"YWI 260\n"), f"{RANKS}:261: expected 'base64 rank', got 'YWI 260'"),
        (_write_ranks(lambda t: t + b"YWI= -1\n"), f"{RANKS}:261: expected 'base64 rank', got 'YWI= -1'"),
        (_write_ranks(lambda t: t + b"YWI= x\n"), f"{RANKS}:261: expected 'base64 rank', got 'YWI= x'"),
        (_write_ranks(lambda t: t + b"QQ== 260\n"), f"{RANKS}:261: token b'A' stands in the file twice; fetch"),
        (_write_ranks(lambda t: t + b"YWI= 65\n"), f"{RANKS}:261: rank 65 stands in the file twice; fetch"),
        (
            _write_ranks(lambda t: t + b"YWI= 270\n"),
            f"{RANKS}: no line for rank 262, but one for rank 270; fetch",
        ),
        (_write_json(b"{"), f"{CONFIG}: not JSON .Expecting.*; fetch or write the file again"),
        (_write_json(b'{"a": "\xff"}'), f"{CONFIG}: not JSON .*utf-8"),
        (_write_json(b"[" * 100_000), f"{CONFIG}: not JSON .*recursion"),
        (_write_json(b"[]"), f"{CONFIG}: holds no JSON object; give"),
        (_write_json(b'{"eos_token": "</s>"}'), f"{CONFIG}: no added_tokens_decoder; list"),
        (_edit_config(eos_token=None), f"{CONFIG}: no eos_token, so .*; set eos_token to a token of"),
        (_edit_config(eos_token="<|eot|>"), f"{CONFIG}: eos_token '<|eot|>' is not in added_tokens_decoder; add it"),
        (_edit_config(bos_token={"content": "<b>"}), f"{CONFIG}: bos_token '<b>' is not in added_tokens_decoder"),
        (_edit_config(pad_token=["<s>"]), f"{CONFIG}: pad_token .'<s>'. is not in added_tokens_decoder"),
        (_edit_config(added_tokens_decoder={"65": {"content": "</s>"}}), f"{CONFIG}: id 65 of '</s>' is also the rank"),
        (
            _edit_config(added_tokens_decoder={"300": "</s>"}),
            f"{CONFIG}: added_tokens_decoder: '300': '</s>' is not an id",
        ),
        (
            _edit_config(added_tokens_decoder={"x": {"content": "</s>"}}),
            f"{CONFIG}: added_tokens_decoder: 'x': .* is not an id",
        ),
        (
            _edit_config(added_tokens_decoder={"-1": {"content": "</s>"}}),
            f"{CONFIG}: added_tokens_decoder: '-1': .* is not an id",
        ),
        (
            _edit_config(added_tokens_decoder={str(2**31): {"content": "</s>"}}),
            f"{CONFIG}: added_tokens_decoder: '2147483648'",
        ),
        (
            _edit_config(added_tokens_decoder={"300": {"content": "</s>"}, "301": {"content": "</s>"}}),
            f"{CONFIG}: added_tokens_decoder: '301': .* with a content of its own",
        ),
        (
            _edit_config(split_pattern="(a"),
            f"{CONFIG}: tiktoken refuses split_pattern '.a': .*; correct it, or leave it",
        ),
        (_edit_config(split_pattern=3), f"{CONFIG}: tiktoken refuses split_pattern 3: .*; correct it"),
        (_edit_config(split_pattern=r"\w+|\s+"), f"{CONFIG}: split_pattern .* matches only part of a text"),
    ],
)
def test_every_mistake_is_one_line_that_names_file_and_fix(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    write_tokenizer(tmp_path, SMALL, {"<s>": 260, "</s>": 261}, bos_token="<s>", eos_token="</s>")
    Tokenizer.load(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=rf"^tokenizer\.path: {tmp_path}/{message}") as raised:
        Tokenizer.load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^tokenizer\.path: /no/such/folder: No such file or directory; give a folder"
    ):
        Tokenizer.load("/no/such/folder")


def test_a_tiktoken_that_lets_text_make_special_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """encode_to_numpy of tiktoken 0.8 to 0.11 did."""

    def encode_to_numpy(self: Any, text: str, **_: Any) -> np.ndarray:
        return np.array(self.encode(text, allowed_special="all"), np.uint32)

    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", encode_to_numpy)
    with pytest.raises(ValueError, match=r"special ids; install tiktoken>=0\.12"):
        Tokenizer.load(str(SHIPPED))
