"""Two ways to say a byte-level BPE: tiktoken's ranks, and tokenizer.json's vocabulary, merges and split patterns.

tiktoken merges the leftmost adjacent pair whose concatenation has the lowest rank, and takes a pretoken that is a token
as that token. tokenizer.json names the pairs that may merge, in order. Owns why both give the same ids: whatever
stands around it, a token arises by the merges that its own bytes undergo alone, so that each token has one last pair,
`last_merge`, and no other pair with its bytes is ever adjacent. A token whose bytes alone end in several parts arises
only as a whole pretoken, which `ignore_merges` says.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

from titanlite.tokenizer import PIECE_CHARS

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER = [byte for byte in range(256) if byte not in _VISIBLE]
CHARACTERS = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHER)}
"""Byte -> the character that stands for it in the strings of a tokenizer.json (GPT-2's alphabet)."""
_BYTES = {character: byte for byte, character in CHARACTERS.items()}

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What tokenizer.json's ByteLevel splits by where use_regex is set."""

# The pieces in which titanlite.tokenizer encodes a long text, as a pattern that matches each but the last: \G, so that
# a search of a short text does not try every position. Whitespace as Python's re has it.
_SPACE = r"\t-\r\x1c-\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_BEFORE_SPACE, _AFTER_NEWLINE = rf"[^{_SPACE}](?=\x20)", rf"[^{_SPACE}]\n(?=[\p{{L}}\p{{Nl}}\p{{No}}])"
_ANY, _P = r"[\s\S]", PIECE_CHARS
PIECES = (
    rf"\G(?={_ANY}{{{_P}}}{_ANY}{{{_P + 1}}})(?:"
    rf"{_ANY}{{{_P}}}{_ANY}{{0,{_P - 3}}}?(?:{_BEFORE_SPACE}|{_AFTER_NEWLINE})"
    rf"|{_ANY}{{{_P}}}{_ANY}{{{_P - 2}}}{_BEFORE_SPACE}|{_ANY}{{{_P}}}{_ANY}{{{_P}}})"
)


def to_string(token: bytes) -> str:
    """A token as tokenizer.json has it."""
    return "".join(CHARACTERS[byte] for byte in token)


def to_bytes(string: str) -> bytes | None:
    """The inverse of `to_string`; None for a string with other characters."""
    found = [_BYTES.get(character) for character in string]
    return None if None in found else bytes(byte for byte in found if byte is not None)


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that become `token` when its bytes alone are merged; None where they end in more."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        lowest = min((rank for rank in pairs if rank is not None), default=None)
        if lowest is None:
            return None
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1])


def merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The last merge of every token of two bytes or more, by rank, and the tokens that have none."""
    pairs, whole_only = [], []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        pair = last_merge(token, ranks)
        if pair is None:
            whole_only.append(token)
        else:
            pairs.append(pair)
    return pairs, whole_only


def check_merges(ranks: Mapping[bytes, int], theirs: Sequence[tuple[bytes, bytes]], ignore_merges: bool) -> None:
    """Raise ValueError unless merging `theirs`, in order, gives the ids that tiktoken gives with `ranks`.

    Further pairs with a token's bytes do no harm: they are never adjacent.
    """
    results = [ranks.get(left + right) for left, right in theirs]
    known = [rank for rank in results if rank is not None]
    if len(known) < len(results) or known != sorted(known):
        raise ValueError("its merges do not stand in the order of the ids that they give, so no ranks can express them")
    pairs, whole_only = merges(ranks)
    if lost := set(pairs) - set(theirs):
        raise ValueError(f"{len(lost)} of its tokens have no merge, as {b''.join(min(lost))!r}")
    if whole_only and not ignore_merges:
        raise ValueError(
            f"no merge gives {len(whole_only)} of its tokens, as {whole_only[0]!r}, and ignore_merges is off"
        )


def to_oniguruma(pattern: str) -> str:
    """A split pattern for tokenizer.json's regex engine, which reads three things otherwise than tiktoken's: ^ and $
    (of a line), and a + behind {n,m} (not possessive). Raises ValueError where the last cannot be said."""
    out, in_class, at = "", 0, 0
    while at < len(pattern):
        token = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(token)
        in_class += {"[": 1, "]": -1}.get(token, 0)
        if not in_class:
            token = {"^": r"\A", "$": r"\z"}.get(token, token)
            if token == "}" and pattern[at : at + 1] == "+" and re.search(r"\{\d*,?\d*\}$", out + token):
                if pattern[at + 1 : at + 2] not in ("", "|", ")"):
                    raise ValueError(
                        f"tokenizer.json cannot express {out[-8:] + token}+ within split_pattern {pattern!r}"
                    )
                at += 1  # nothing follows that could take back what it matched
        out += token
    return out
