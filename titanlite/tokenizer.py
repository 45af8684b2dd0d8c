"""Text to token ids: tiktoken's BPE over a local rank file, special tokens from a Hugging Face style JSON beside it.

Owns both files' format, the ids of bos, eos and pad, the encoding policy and the fingerprint that names all of it.
Text is always ordinary text: a literal "<|end_of_text|>" in a document becomes the ids of its characters, and no text
can produce a special id, because a special id that is also a BPE rank is refused. Refuses as well a vocabulary that
cannot encode every byte, and one without eos, which could not mark where documents end.
"""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from titanlite.log import logger

# The regex of Meta's Llama 3 tokenizer; a `split_pattern` in tokenizer_config.json replaces it.
LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Encoding policy. tiktoken's regex engine gives up on a million whitespace characters, so that long texts are encoded
# in pieces. A piece ends at the first _CUT past PIECE_CHARS: before a space that follows a visible character, or
# between a single newline and a letter. Both are edges of pretokens under the patterns of GPT-2, cl100k, o200k, Qwen
# and Llama 3, so that ids equal those of the unsplit text. Text that has no such place in another PIECE_CHARS
# characters is cut there, hard. All of this is a pure function of the text, and part of the fingerprint.
POLICY_VERSION = 1
PIECE_CHARS = 65536
_CUT = re.compile(r"\S(?= )|\S\n(?=[^\W\d_])")

# One character or more of every Unicode general category but surrogates; a split pattern that skips one loses text.
_EVERY_KIND = (
    "Aa\u01c5\u02b0\u4e2d\u0301\u0903\u20dd1\u2167\u00b2_-()\u00ab\u00bb!+$^\u00a9"
    " \t\r\n\u00a0\u2028\u2029\x00\x1b\u200d\ue000\U000e0fff\U0001f642 '"
)
_INT32 = np.dtype(np.int32)
_FILES_HINT = "give a folder with tokenizer.model (tiktoken BPE ranks) and tokenizer_config.json (special tokens)"


class _Encoding(threading.local):
    """One tiktoken Encoding per thread, built at the thread's first use.

    The regex engine keeps its fast cache for the thread that first used a regex, and tiktoken's clones share it: every
    other thread encoded at 0.7 of the speed.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int], file: Path) -> None:
        self._arguments = ranks, pattern, special_tokens, file
        self.ranks = ranks
        try:
            self.tiktoken = tiktoken.Encoding(
                "titanlite", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            problem = f"tiktoken refuses split_pattern {pattern!r}: {reason}"
            raise _mistake(file, f"{problem}; correct it, or leave it out for Llama 3's") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _Encoding, self._arguments  # a process that writes a token cache gets a copy


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer. Immutable, and threads may share it: tiktoken releases the GIL while it encodes."""

    split_pattern: str
    special_tokens: Mapping[str, int]
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    vocab_size: int
    """Highest id + 1, gaps included."""
    fingerprint: str
    """SHA-256, in hex, of everything that decides the ids of a document: ranks, pattern, special tokens, policy."""
    _encoding: _Encoding

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """The tokenizer in a folder, or of a rank file with its tokenizer_config.json beside it.

        Both files are read here and now: tiktoken's own reader caches by path and would miss a rewritten file.
        Raises ValueError, in one line that names tokenizer.path, the file and the fix, when they cannot be used.
        """
        rank_file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        config_file = rank_file.with_name("tokenizer_config.json")
        ranks = _read_ranks(rank_file)
        config = _read_config(config_file)
        special_tokens = _special_tokens(config, config_file)
        _check_ids(ranks, special_tokens, rank_file, config_file)
        bos_id, eos_id, pad_id = (
            _special_id(config, key, special_tokens, config_file) for key in ("bos_token", "eos_token", "pad_token")
        )
        if eos_id is None:
            problem = "no eos_token, so nothing marks where a document ends"
            raise _mistake(config_file, f"{problem}; set eos_token to a token of added_tokens_decoder")
        pattern = config.get("split_pattern", LLAMA3_SPLIT_PATTERN)
        tokenizer = cls(
            split_pattern=pattern,
            special_tokens=special_tokens,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
            vocab_size=max(*ranks.values(), *special_tokens.values()) + 1,
            fingerprint=_fingerprint(ranks, pattern, special_tokens, [bos_id, eos_id, pad_id]),
            _encoding=_Encoding(ranks, pattern, special_tokens, config_file),
        )
        tokenizer._probe(config_file)
        logger.info(
            f"tokenizer {rank_file}: {len(ranks)} ranks, {len(special_tokens)} special tokens, vocabulary "
            f"{tokenizer.vocab_size}, bos {bos_id}, eos {eos_id}, pad {pad_id}, split pattern "
            f"{'of ' + config_file.name if 'split_pattern' in config else 'of Llama 3 (default)'}, "
            f"fingerprint {tokenizer.fingerprint[:12]}"
        )
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` as ordinary text, int32 [tokens]; never a special id.

        Takes linear time and, beside the result, no more memory than another of it. A lone surrogate counts as U+FFFD.
        """
        return self._encode(text, b"", b"")

    def encode_document(self, text: str) -> np.ndarray:
        """[bos] text [eos], int32 [tokens]; no bos where there is none or where it is the eos."""
        prefix = b"" if self.bos_id is None or self.bos_id == self.eos_id else self.bos_id.to_bytes(4, sys.byteorder)
        return self._encode(text, prefix, self.eos_id.to_bytes(4, sys.byteorder))

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids as a document of these begins in training: bos, where there is one, and the text. At least one id each.

        Raises ValueError for a prompt without any.
        """
        encoded: list[list[int]] = [self.encode_document(prompt)[:-1].tolist() for prompt in prompts]
        if not all(encoded):
            number = encoded.index([]) + 1
            raise ValueError(f"prompt {number} is empty, and the tokenizer has no bos to begin with: write some text")
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; special ids as their literal text, bytes that are not UTF-8 as U+FFFD.

        Raises ValueError for an id that the vocabulary does not have.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `decode`: a token may hold a part of a character."""
        try:
            return self._encoding.tiktoken.decode_bytes(np.asarray(ids).tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(f"cannot decode: the vocabulary lacks an id ({error})") from error

    def ranks(self) -> Mapping[bytes, int]:
        """Rank, which is the id, of every token of ordinary text."""
        return self._encoding.ranks

    def unused_ids(self) -> list[int]:
        """Ids below vocab_size that stand for nothing: gaps between the special ids."""
        taken = set(self.special_tokens.values())
        # Ranks have no gap that a special id does not fill, so all ids below their number are taken.
        candidates = range(len(self._encoding.tiktoken.token_byte_values()), self.vocab_size)
        return [i for i in candidates if i not in taken and not self._stands_for_text(i)]

    def _stands_for_text(self, token: int) -> bool:
        try:
            return bool(self._encoding.tiktoken.decode_single_token_bytes(token))
        except KeyError:
            return False

    def _encode(self, text: str, prefix: bytes, suffix: bytes) -> np.ndarray:
        """Prefix and suffix are ids as int32: a small array would cost as much as a small document."""
        encode = self._encoding.tiktoken.encode_to_numpy
        pieces = _pieces(text) if len(text) > 2 * PIECE_CHARS else (text,)
        try:
            # Special tokens are neither allowed (the default) nor, as text, forbidden. The ids are uint32, below 2^31.
            ids = [encode(piece, disallowed_special=()).data for piece in pieces]
        except UnicodeEncodeError:  # surrogates: repaired as tiktoken's encode_ordinary does
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encode(repaired, prefix, suffix)
        return np.frombuffer(b"".join((prefix, *ids, suffix)), _INT32)

    def _probe(self, config_file: Path) -> None:
        """Encode a sample that holds every special token as text: no special id may appear, no character vanish."""
        sample = "".join(f"{token} {_EVERY_KIND}" for token in self.special_tokens)
        ids = self.encode(sample)
        if not set(self.special_tokens.values()).isdisjoint(ids.tolist()):
            raise ValueError(
                f"tiktoken {tiktoken.__version__} turns special tokens in text into special ids; install tiktoken>=0.12"
            )
        if self.decode(ids) != sample:
            problem = f"split_pattern {self.split_pattern!r} matches only part of a text and loses the rest"
            raise _mistake(config_file, rf"{problem}; let it match every character, as by ending it in |\s|\S")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        cut = _CUT.search(text, start + PIECE_CHARS, start + 2 * PIECE_CHARS)
        end = cut.end() if cut else start + 2 * PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _mistake(file: Path, problem: str) -> ValueError:
    return ValueError(f"tokenizer.path: {file}: {problem}")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _mistake(file, f"{error.strerror}; {_FILES_HINT}") from error


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from lines of base64 and rank."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(_read(file).splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
            if not token or rank < 0:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"tokenizer.path: {file}:{number}: expected 'base64 rank', got {line[:40].decode('latin-1')!r}; give a "
                "tiktoken rank file (not a SentencePiece model, a tokenizer.json or a Git LFS pointer)"
            ) from None
        if token in ranks or rank in taken:
            twice = f"token {token!r}" if token in ranks else f"rank {rank}"
            raise ValueError(
                f"tokenizer.path: {file}:{number}: {twice} stands in the file twice; fetch the rank file again"
            )
        ranks[token] = rank
        taken.add(rank)
    return ranks


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(file))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _mistake(file, f"not JSON ({error}); fetch or write the file again") from error
    if not isinstance(config, dict):
        raise _mistake(file, f"holds no JSON object; {_FILES_HINT}")
    return config


def _special_tokens(config: dict[str, Any], file: Path) -> dict[str, int]:
    """Text -> id of every entry of added_tokens_decoder, {"id": {"content": text}}."""
    example = '{"128001": {"content": "<|end_of_text|>"}}'
    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        raise _mistake(file, f"no added_tokens_decoder; list the special tokens in it as {example}")
    special_tokens: dict[str, int] = {}
    for key, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        is_id = key.isdecimal() and key == str(int(key)) and int(key) < 2**31  # ids are int32
        if not is_id or not isinstance(content, str) or not content or content in special_tokens:
            problem = f"added_tokens_decoder: {key!r}: {entry!r:.60} is not an id with a content of its own"
            raise _mistake(file, f"{problem}; write {example}")
        special_tokens[content] = int(key)
    return special_tokens


def _check_ids(ranks: dict[bytes, int], special_tokens: dict[str, int], rank_file: Path, config_file: Path) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _mistake(
            rank_file,
            f"no token for byte 0x{missing[0]:02x} ({len(missing)} of 256 bytes missing), so that some text could not "
            "be encoded; fetch the rank file again, or train it byte-level",
        )
    known = set(ranks.values())
    highest = max(known)
    for token, special_id in special_tokens.items():
        if special_id in known:
            raise _mistake(
                config_file,
                f"id {special_id} of {token!r} is also the rank of ordinary text in {rank_file.name}, so that text "
                f"could forge it; give it an id above {highest}",
            )
    known.update(special_tokens.values())  # p50k_base has its eos in the middle of the ranks
    lost = next(i for i in itertools.count() if i not in known)
    if lost < highest:
        raise _mistake(rank_file, f"no line for rank {lost}, but one for rank {highest}; fetch the rank file again")


def _special_id(config: dict[str, Any], key: str, special_tokens: dict[str, int], file: Path) -> int | None:
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    if not isinstance(token, str) or token not in special_tokens:
        raise _mistake(file, f"{key} {token!r} is not in added_tokens_decoder; add it there with its id")
    return special_tokens[token]


def _fingerprint(
    ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int], bos_eos_pad: list[int | None]
) -> str:
    policy = [POLICY_VERSION, PIECE_CHARS, _CUT.pattern]
    head = json.dumps([policy, pattern, sorted(special_tokens.items()), bos_eos_pad])
    digest = hashlib.sha256(head.encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d %b" % (rank, len(token), token))
    return digest.hexdigest()
