"""Prompts from files, their ids, and what is printed of their continuations. Needs no torch."""

import codecs
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from titanlite.tokenizer import Tokenizer


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, "-" for standard input: a line each, or a JSON string or {"prompt": ...} a line where its
    name ends in .jsonl. Lines without any text are no prompts.

    Raises ValueError with file and line.
    """
    try:
        if path == "-":
            lines = sys.stdin.read().split("\n")
        else:
            with open(path, encoding="utf-8-sig") as file:
                lines = file.read().split("\n")  # universal newlines; splitlines would split at U+2028 too
    except OSError as error:
        raise ValueError(f"--prompt_file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {path}: not UTF-8 text (byte {error.start})") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompt_file {path}: holds no prompt: write one a line")
    return [_from_json(path, *pair) if path.endswith(".jsonl") else pair[1] for pair in numbered]


def _from_json(path: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'--prompt_file {path}:{number}: write a JSON string or {{"prompt": "..."}} a line')
    return prompt


class GrowingText:
    """Text of tokens that come one by one, in pieces of whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What the token completes; empty where it ends within a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def end(self) -> str:
        """U+FFFD for a character that was begun and never completed."""
        return self._decoder.decode(b"", final=True)


@dataclass
class Continuation:
    """What has become of one prompt."""

    prompt: str
    num_prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    """New ones, without the eos."""
    finish: str = ""
    """eos or length; empty while it goes on."""

    def take(self, token: int, eos_id: int, max_new_tokens: int) -> None:
        if token == eos_id:
            self.finish = "eos"
        else:
            self.tokens.append(token)
            self.finish = "length" if len(self.tokens) == max_new_tokens else ""


class Printer:
    """Prints continuations to standard output: a single text as it grows; several, and JSON, whole and in order."""

    def __init__(self, continuations: Sequence[Continuation], tokenizer: Tokenizer, as_json: bool) -> None:
        self._continuations, self._tokenizer, self._as_json = continuations, tokenizer, as_json
        self._next = 0  # to print of those that are printed whole; of a single one, its next token
        self._growing = GrowingText(tokenizer) if len(continuations) == 1 and not as_json else None
        if self._growing:
            print(continuations[0].prompt, end="", flush=True)

    def update(self) -> None:
        """Print what is new."""
        if self._growing:
            only = self._continuations[0]
            text = "".join(self._growing.push(token) for token in only.tokens[self._next :])
            self._next = len(only.tokens)
            print(text, end=self._growing.end() + "\n" if only.finish else "", flush=True)
            return
        while self._next < len(self._continuations) and self._continuations[self._next].finish:
            self._print_whole(self._continuations[self._next])
            self._next += 1

    def _print_whole(self, continuation: Continuation) -> None:
        text = self._tokenizer.decode(continuation.tokens)
        if self._as_json:
            content = {
                "prompt": continuation.prompt,
                "text": text,
                "finish": continuation.finish,
                "tokens": continuation.tokens,
                "num_prompt_tokens": continuation.num_prompt_tokens,
            }
            print(json.dumps(content, ensure_ascii=False), flush=True)
        else:
            print(
                f"=== prompt {self._next + 1} of {len(self._continuations)}",
                continuation.prompt + text,
                sep="\n",
                flush=True,
            )
