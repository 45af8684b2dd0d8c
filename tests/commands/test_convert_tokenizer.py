"""The exported tokenizer.json, opened by AutoTokenizer, against titanlite's own ids, and back again."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.make_tokenizers import real_code, single_bytes, write_llama3_like, write_tokenizer
from titanlite.convert import bpe
from titanlite.convert.comparison import HOSTILE
from titanlite.convert.tokenizer_files import import_tokenizer
from titanlite.convert.tokenizer_files import write_tokenizer as export
from titanlite.tokenizer import PIECE_CHARS, Tokenizer

SHIPPED = Path(__file__).parents[2] / "assets" / "tokenizer"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
)
WORDS = [b"th", b"the", b" the", b"in", b"ing", b"er", b"12", b"123", b"  ", b"    ", b"\n\n", "\u4e2d\u6587".encode()]
E, B = {"eos_token": "<e>"}, {"bos_token": "<b>", "eos_token": "<e>"}
N = 256 + len(WORDS)
SMALL: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "llama3-pattern": ({"<b>": N, "<e>": N + 1}, B),
    "no-bos": ({"<e>": N}, E),
    "bos-is-eos": ({"<e>": N}, E | {"bos_token": "<e>"}),
    "gaps": ({"<b>": N + 3, "<e>": N + 7, "<pad>": N + 5}, B | {"pad_token": "<pad>"}),
    "gpt2-pattern": ({"<b>": N, "<e>": N + 1}, B | {"split_pattern": bpe.GPT2_PATTERN}),
    "cl100k-pattern": ({"<b>": N, "<e>": N + 1}, B | {"split_pattern": CL100K_PATTERN}),
    "words-as-special": ({"thing": N, "in the": N + 1, " ": N + 2}, {"bos_token": "thing", "eos_token": " "}),
}


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


def opened(ours: Tokenizer, folder: Path) -> Any:
    """What AutoTokenizer makes of the exported folder."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    export(str(folder), ours, 1 << 30)
    return AutoTokenizer.from_pretrained(folder)


def check_same(theirs: Any, ours: Tokenizer, text: str) -> None:
    wanted = ours.encode_document(text)[:-1].tolist()  # as a prompt begins
    assert theirs(text).input_ids == wanted
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text).tolist()
    assert theirs.decode(wanted) == ours.decode(wanted)


def documents(count: int) -> Iterator[str]:
    """Pieces of real code, of 0 to 3,000 characters."""
    rng = random.Random(0)
    code = real_code(every=7 if count < 1000 else 1)
    text, at = "", 0
    for _ in range(count):
        if at >= len(text):
            text, at = next(code), 0
        size = rng.choice((0, 1, 20, 300, 3000))
        yield text[at : at + size]
        at += max(size, 1)


def every_plane(seed: int, count: int) -> str:
    """Random characters of all 17 planes, assigned or not."""
    rng = random.Random(seed)
    numbers = (rng.randrange(plane << 16, (plane + 1) << 16) for _ in range(count) for plane in range(17))
    return "".join(chr(number) for number in numbers if not 0xD800 <= number < 0xE000)


def test_ids_of_documents_and_of_hostile_text(tmp_path: Path) -> None:
    ours = Tokenizer.load(str(SHIPPED))
    theirs = opened(ours, tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size
    special = [*ours.special_tokens, "".join(ours.special_tokens), "a<|end_of_text|>b", "<|end_of_text", " <|pad|>\n"]
    for text in [*documents(300), *special, HOSTILE, every_plane(0, 400)]:
        check_same(theirs, ours, text)


@pytest.mark.parametrize("name", SMALL)
def test_ids_of_other_tokenizers_and_there_and_back(name: str, tmp_path: Path) -> None:
    special, config = SMALL[name]
    ours = Tokenizer.load(str(write_tokenizer(tmp_path / "ours", [*single_bytes(), *WORDS], special, **config)))
    theirs = opened(ours, tmp_path / "hf")
    for text in [
        "",
        "the thing in 12345678 the\n\n\n  end   \n",
        *special,
        HOSTILE,
        every_plane(1, 20),
        *documents(20),
    ]:
        check_same(theirs, ours, text)
    for token, token_id in special.items():
        assert theirs.convert_tokens_to_ids(token) == token_id
    assert import_tokenizer(str(tmp_path / "hf"), str(tmp_path / "back")).fingerprint == ours.fingerprint


def test_a_special_token_among_the_ranks(tmp_path: Path) -> None:
    """As in p50k_base."""
    tokens = [*single_bytes(), *WORDS[:-1]]  # all of them arise by merges
    folder = write_tokenizer(tmp_path / "ours", tokens, {"<e>": len(tokens)}, **E)
    with (folder / "tokenizer.model").open("a") as file:
        file.write(f"ICAg {len(tokens) + 1}\n")  # three spaces
    ours = Tokenizer.load(str(folder))
    theirs = opened(ours, tmp_path / "hf")
    for text in ["<e>", " <e>   <e>", HOSTILE]:
        check_same(theirs, ours, text)
    assert import_tokenizer(str(tmp_path / "hf"), str(tmp_path / "back")).fingerprint == ours.fingerprint
    with (folder / "tokenizer.model").open("a") as file:
        file.write(f"eHl6 {len(tokens) + 2}\n")  # xyz, of which no part but the bytes is a token
    with pytest.raises(ValueError, match="'<e>' lies among the ranks, and b'xyz' is a token that no merge gives"):
        opened(Tokenizer.load(str(folder)), tmp_path / "other")


def test_a_special_token_that_is_also_a_word_is_refused(tmp_path: Path) -> None:
    special = {"the": N, "<e>": N + 1}
    ours = Tokenizer.load(str(write_tokenizer(tmp_path / "ours", [*single_bytes(), *WORDS], special, **E)))
    with pytest.raises(ValueError, match="'the' is a special token and one of text"):
        opened(ours, tmp_path / "hf")


@settings(max_examples=60)
@given(
    st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=14),
    st.lists(st.text("ab ", max_size=40), min_size=1, max_size=8),
)
def test_merges_of_any_vocabulary_in_any_order_give_the_ids_of_tiktoken(tokens: list[str], texts: list[str]) -> None:
    """Also of vocabularies that no training makes: a token below its parts, or one that only a whole pretoken is."""
    import tiktoken
    import tokenizers

    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    pairs, whole_only = bpe.merges(ranks)
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={bpe.to_string(token): rank for token, rank in ranks.items()},
            merges=[(bpe.to_string(left), bpe.to_string(right)) for left, right in pairs],
            ignore_merges=bool(whole_only),
        )
    )
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?[ab]+| +"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = tiktoken.Encoding("any", pat_str=r" ?[ab]+| +", mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        assert theirs.encode(text).ids == ours.encode_ordinary(text)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_long_texts_are_cut_where_titanlite_cuts_them(seed: int, tmp_path: Path) -> None:
    """Just before, on and after the places at which a cut is looked for, found and forced."""
    ours = Tokenizer.load(str(SHIPPED))
    theirs = opened(ours, tmp_path)
    rng = random.Random(seed)
    kinds = ("self", "e", "\u4e2d", " ", "\n", "1", "\x1c", "\u3000")
    for offset in (-3, -2, -1, 0, 1, 2):
        for mark in (" b", "\nb", "\n1", "\n\u2167", " \nb", "\x1c b"):
            begin = rng.choice(kinds) * (PIECE_CHARS * rng.choice((1, 2)))
            text = begin[: len(begin) - len(begin) % PIECE_CHARS + offset or None][: 2 * PIECE_CHARS + offset] + mark
            text = text.rjust(PIECE_CHARS + offset, "x") + rng.choice(kinds) * (2 * PIECE_CHARS)
            assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text).tolist()
        if seed == 0:  # the quick suite has a taste of it
            break


def test_a_tokenizer_that_hugging_face_trained_comes_in(tmp_path: Path) -> None:
    """Its merges, its vocabulary with the special tokens first or last, GPT-2's split, and no bos."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(documents(200), vocab_size=600, show_progress=False)
    made.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "hf").mkdir()
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = import_tokenizer(str(tmp_path / "hf"), str(tmp_path / "ours"))
    assert ours.eos_id == ours.bos_id == 600
    for text in [*documents(100), HOSTILE, every_plane(2, 20)]:
        assert ours.encode(text).tolist() == made.encode(text).ids
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    spoilt = {
        "order": content | {"model": content["model"] | {"merges": merges[::-1]}},
        "have no merge": content | {"model": content["model"] | {"merges": merges[:-1]}},
        "NFC": content | {"normalizer": {"type": "NFC"}},
        "prefix space": content | {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581"}},
        "byte_fallback": content | {"model": content["model"] | {"byte_fallback": True}},
        "byte-level alphabet": content | {"model": content["model"] | {"vocab": {"\u2581the": 3}}},
        "known form": {"model": []},
    }
    for reason, broken in spoilt.items():
        (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=reason):
            import_tokenizer(str(tmp_path / "hf"), str(tmp_path / "none"))


def test_patterns_that_engines_read_otherwise() -> None:
    assert bpe.to_oniguruma(r"a{1,3}+|[$^]\$|^b$") == r"a{1,3}|[$^]\$|\Ab\z"
    assert bpe.to_oniguruma(bpe.GPT2_PATTERN) == bpe.GPT2_PATTERN
    with pytest.raises(ValueError, match="split_pattern"):
        bpe.to_oniguruma(r"\p{N}{1,3}+x")
    assert bpe.to_oniguruma(r"\p{L}+") == r"\p{L}+"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shipped", "llama3-like"])
def test_ids_of_10000_documents_every_character_and_a_megabyte_without_spaces(name: str, tmp_path: Path) -> None:
    ours = Tokenizer.load(str(SHIPPED if name == "shipped" else write_llama3_like(tmp_path / "llama3")))
    theirs = opened(ours, tmp_path / "hf")
    texts = list(documents(10_000))
    for text, ids in zip(texts, theirs(texts).input_ids, strict=True):
        assert ids == ours.encode_document(text)[:-1].tolist()
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    check_same(theirs, ours, " ".join(everything[i : i + 1000] for i in range(0, len(everything), 1000)))
    runs = ("x", "ab", "\u4e2d\u6587", "=", " ", "\n", "1", "\x1c", "\U0001f642", "word ", "a\n1\n", "\ufffe")
    for text in [run * (1_000_000 // len(run)) for run in runs] + [everything]:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text).tolist()
    assert import_tokenizer(str(tmp_path / "hf"), str(tmp_path / "back")).fingerprint == ours.fingerprint
