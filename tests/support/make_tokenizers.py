"""Tokenizers for tests, made from nothing: small ones with known ids, and one of Llama 3's exact size and shape.

python -m tests.support.make_tokenizers FOLDER     writes the Llama-3-shaped one (in about a second)
"""

import base64
import json
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from titanlite.config import SourceConfig
from titanlite.data.source import open_source

property_test = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "assets" / "tokenizer"
BYTES = [bytes([b]) for b in range(256)]  # rank == byte, so that ids can be computed by hand
SMALL = [*BYTES, b"he", b"ll", b"hell", b" w"]  # ranks 256 to 259
LLAMA3_RANKS = 128_000
# Names and order of Meta's Llama 3 tokenizer: ten named places, then reserved ones up to 256.
LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]

# Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, kana, Han, Hangul, emoji, combining marks, Han of plane 2.
SCRIPTS = [
    *((0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x939), (0xE01, 0xE2E)),
    *((0x3041, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x300, 0x36F), (0x20000, 0x20FFF)),
]


def write_tokenizer(folder: Path, tokens: Iterable[bytes], special: dict[str, int], **config: Any) -> Path:
    """Write both files. `tokens` in rank order; `config` goes into tokenizer_config.json as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    added = {str(i): {"content": token, "special": True} for token, i in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, **config}))
    return folder


def single_bytes() -> list[bytes]:
    """The 256 bytes in GPT-2's order, which Llama 3's file shares: visible Latin-1 characters first."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([b]) for b in visible + [b for b in range(256) if b not in visible]]


def llama3_tokens(seed: int = 0) -> list[bytes]:
    """128,000 tokens in rank order; each beyond the bytes is the concatenation of two of lower rank.

    Prefixes of real words and of their tails give code much to merge and rival ways to do it; words of many scripts and
    random concatenations fill the rest.
    """
    rng = random.Random(seed)
    tokens = {token: rank for rank, token in enumerate(single_bytes())}

    def add_prefixes(word: bytes) -> None:
        for end in range(2, len(word) + 1):
            tokens.setdefault(word[:end], len(tokens))

    for run in (" " * 40, "\n" * 8, "\t" * 8, "=" * 64, "-" * 64, "    \n\n", ").\n\n", "'ll", "'S", "\r\n"):
        add_prefixes(run.encode())
    for number in range(1000):
        add_prefixes(f"{number:03d}".encode())
    for word in _common_words():
        add_prefixes(word)
        add_prefixes(word[rng.randint(1, len(word)) :])
        if len(tokens) > 80_000:
            break
    while len(tokens) < 110_000:
        first, last = rng.choice(SCRIPTS)
        add_prefixes("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 3))).encode())
    pool = list(tokens)
    while len(tokens) < LLAMA3_RANKS:
        token = rng.choice(pool) + rng.choice(pool)
        if len(token) <= 16 and token not in tokens:
            tokens[token] = len(tokens)
            pool.append(token)
    return list(tokens)


def _common_words() -> list[bytes]:
    """Words, with a space or dot before them, and runs of punctuation of the standard library, commonest first."""
    counts: Counter[str] = Counter()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        counts.update(re.findall(r"[ ._(]?[A-Za-z]+| ?[^\w\s]+", file.read_text(encoding="utf-8", errors="ignore")))
    return [word.encode() for word, _ in counts.most_common()]


def real_code(every: int = 25) -> Iterator[str]:
    """Each 25th (or `every`th) file of the standard library."""
    source = open_source("data", SourceConfig(), "")
    assert source.numbering is not None
    return map(source.read, range(0, source.numbering.num_documents, every))


def write_llama3_like(folder: Path) -> Path:
    special = {token: LLAMA3_RANKS + i for i, token in enumerate(LLAMA3_SPECIAL)}
    return write_tokenizer(folder, llama3_tokens(), special, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


if __name__ == "__main__":
    print(write_llama3_like(Path(sys.argv[1])))
