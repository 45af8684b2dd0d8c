"""Prompts from files and what is printed: whole characters, in order, each as soon as it can be."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.make_tokenizers import SHIPPED, SMALL, write_tokenizer
from titanlite.generate.text import Continuation, GrowingText, Printer, read_prompts
from titanlite.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), SMALL, {"<b>": 260, "<e>": 261}, bos_token="<b>", eos_token="<e>"
    )
    return Tokenizer.load(str(folder))


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.load(str(SHIPPED))


@given(ids=st.lists(st.one_of(st.integers(0, 261), st.sampled_from([0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9])), max_size=12))
def test_growing_text_is_the_text_in_whole_characters(shipped: Tokenizer, ids: list[int]) -> None:
    special = sorted(shipped.special_tokens.values())
    ids = [special[i - 260] if i >= 260 else i for i in ids]
    growing = GrowingText(shipped)
    pieces = [growing.push(i) for i in ids]
    assert "".join([*pieces, growing.end()]) == shipped.decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: Tokenizer) -> None:
    growing = GrowingText(tokenizer)
    assert [growing.push(i) for i in "a\U0001f642b".encode()] == ["a", "", "", "", "\U0001f642", "b"]
    assert growing.push(0xF0) == growing.push(0x9F) == ""
    assert growing.end() == "\ufffd"


def test_prompts_begin_as_documents_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.encode_prompts(["he", "", "<e>"]) == [[260, 256], [260], [260, *b"<e>"]]
    for config in ({}, {"bos_token": "<e>"}):
        folder = write_tokenizer(tmp_path / str(len(config)), SMALL, {"<e>": 260}, eos_token="<e>", **config)
        bosless = Tokenizer.load(str(folder))
        assert bosless.encode_prompts(["he"]) == [[256]]
        with pytest.raises(ValueError, match="prompt 2 is empty, and the tokenizer has no bos"):
            bosless.encode_prompts(["he", ""])


def test_a_prompt_a_line_or_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufefffirst\r\n\n  \n second \u2028 line\nlast".encode())
    assert read_prompts(str(text)) == ["first", " second \u2028 line", "last"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"two\\nlines"\n\n{"prompt": "", "id": 3}\n')
    assert read_prompts(str(lines)) == ["two\nlines", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert read_prompts("-") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "No such file or directory"),
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text (byte 3)"),
        ("a.jsonl", b'"x"\n{"text": "y"}', 'a.jsonl:2: write a JSON string or {"prompt": "..."} a line'),
        ("b.jsonl", b"{", "b.jsonl:1: write a JSON string"),
        ("c.jsonl", b"7", "c.jsonl:1: write a JSON string"),
    ],
)
def test_what_is_no_prompt_file_is_named(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_prompts(str(tmp_path / name))
    assert told in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_text_grows_and_ends_with_its_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()  # what has left the process, flushed
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="utf-8"))
    only = Continuation("he", 2)
    printer = Printer([only], tokenizer, as_json=False)
    seen = [out.getvalue().decode()]
    for token in (257, 0xC3, 0xA9, 0xC3, 261):
        only.take(token, eos_id=261, max_new_tokens=9)
        printer.update()
        seen.append(out.getvalue().decode())
    assert seen == ["he", "hell", "hell", "hell\u00e9", "hell\u00e9", "hell\u00e9\ufffd\n"]
    assert (only.tokens, only.finish) == ([257, 0xC3, 0xA9, 0xC3], "eos")


def test_several_texts_come_whole_and_in_order(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    made = [Continuation(prompt, 2) for prompt in "ab"]
    printer = Printer(made, tokenizer, as_json=False)
    made[1].take(*(261, 261, 2))
    printer.update()
    assert capsys.readouterr().out == ""  # the first is not done
    for token in b"xy":
        made[0].take(token, 261, 2)
    printer.update()
    assert capsys.readouterr().out == "=== prompt 1 of 2\naxy\n=== prompt 2 of 2\nb\n"
    assert [one.finish for one in made] == ["length", "eos"]


def test_json_has_an_object_a_line(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    only = Continuation("one\nline", 9)
    printer = Printer([only], tokenizer, as_json=True)
    assert capsys.readouterr().out == ""
    for token in (10, 0xC3, 261):
        only.take(token, 261, 5)
        printer.update()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "prompt": "one\nline",
        "text": "\n\ufffd",
        "finish": "eos",
        "tokens": [10, 0xC3],
        "num_prompt_tokens": 9,
    }
