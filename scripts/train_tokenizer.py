"""Train a byte-level BPE tokenizer with Llama 3's split pattern and write it as titanlite reads it.

Made the shipped assets/tokenizer from the Python source of the standard library. The same input gives the same files.
Every 50th document is held out; on those, the written files must give the ids that the trained model gives.
"""

import argparse
import base64
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from titanlite.config import SourceConfig
from titanlite.data.source import open_source
from titanlite.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer

try:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as BpeTokenizer
except ImportError:
    sys.exit("train_tokenizer.py needs the tokenizers library: pip install 'titanlite[dev]'")

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
HELD_OUT_EVERY = 50


def train(documents: Iterable[str], num_ranks: int) -> BpeTokenizer:
    if num_ranks < 256:
        raise ValueError(f"--vocab_size {num_ranks + len(SPECIAL_TOKENS)} leaves no room for 256 bytes; raise it")
    tokenizer = BpeTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < num_ranks:
        raise ValueError(
            f"the input yields {tokenizer.get_vocab_size()} ranks, not {num_ranks}; give more text with --input or "
            "lower --vocab_size"
        )
    return tokenizer


def token_bytes(token: str) -> bytes:
    """The bytes behind a token of the byte-level alphabet: GPT-2's map, visible Latin-1 characters stand for
    themselves and the others, in order, for U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return bytes(ord(c) if ord(c) < 0x100 else hidden[ord(c) - 0x100] for c in token)


def write(tokenizer: BpeTokenizer, folder: Path, made_by: str) -> None:
    ranks = sorted((rank, token_bytes(token)) for token, rank in tokenizer.get_vocab().items())
    special = {str(len(ranks) + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL_TOKENS)}
    bos, eos, pad = SPECIAL_TOKENS
    config = {
        "made_by": made_by,
        "split_pattern": LLAMA3_SPLIT_PATTERN,
        "added_tokens_decoder": special,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check(tokenizer: BpeTokenizer, folder: Path, documents: Iterable[str]) -> str:
    """Compare the written files with the trained model on `documents`; returns a report."""
    written = Tokenizer.load(str(folder))
    num_documents = num_tokens = num_bytes = 0
    for text in documents:
        ids = written.encode(text).tolist()
        if ids != tokenizer.encode(text).ids:
            raise ValueError(f"{folder} and the trained model differ on the held-out text {text[:60]!r}...")
        num_documents += 1
        num_tokens += len(ids)
        num_bytes += len(text.encode())
    return (
        f"vocabulary {written.vocab_size}, fingerprint {written.fingerprint[:12]}; on {num_documents} held-out "
        f"documents {num_tokens} tokens, all as the trained model's, {num_bytes / max(num_tokens, 1):.2f} bytes each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=8192, help="ids, 3 special tokens included (default: 8192)")
    parser.add_argument("--output", default="assets/tokenizer", help="folder to write (default: assets/tokenizer)")
    parser.add_argument(
        "--input",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="text or .jsonl files, as in data.paths (default: the running Python's standard library)",
    )
    args = parser.parse_args()
    folder = Path(args.output)
    name = " ".join(args.input) or f"the standard library of Python {platform.python_version()}"
    try:
        source = open_source("data", SourceConfig(paths=tuple(args.input)), "")
        if source.numbering is None:
            raise ValueError("--input: compressed files have no random access: name text, jsonl or parquet files")
        documents = range(source.numbering.num_documents)
        held_out = documents[::HELD_OUT_EVERY]
        kept = [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY] or documents
        tokenizer = train(map(source.read, kept), args.vocab_size - len(SPECIAL_TOKENS))
        write(tokenizer, folder, f"scripts/train_tokenizer.py, from {len(kept)} documents of {name}")
        print(f"{folder}: {check(tokenizer, folder, map(source.read, held_out))}")
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer.py: {error}")


if __name__ == "__main__":
    main()
