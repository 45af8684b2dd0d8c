"""Statistics of a corpus: packing figures against rows written down as lists, surveys against the documents."""

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands.test_show import CORPORA, SEQ_LEN, load, make_config, shown, texts, write_jsonl
from tests.data.test_windows import naive_windows
from titanlite.data.corpus import open_corpus
from titanlite.inspection import survey as survey_module
from titanlite.inspection.survey import Survey, pack, survey
from titanlite.inspection.transcript import _Pooled as Pooled
from titanlite.tokenizer import Tokenizer


def naive_split(lengths: list[int], num_rows: int, seq_len: int) -> tuple[int, int, int, int]:
    """Pieces, squares of their lengths among the inputs, fitting documents and those of them in two rows, of rows of a
    list of all tokens."""
    stream: list[int] = []
    while len(stream) < (num_rows + 1) * seq_len + max(lengths):
        for length in lengths:
            stream += [stream[-1] + 1 if stream else 0] * length
    pieces = squares = 0
    cut, fitting = set(), set()
    for row in range(num_rows):
        counts = Counter(stream[row * seq_len : (row + 1) * seq_len])
        pieces += len(counts)
        squares += sum(count**2 for count in counts.values())
    whole = Counter(stream)
    begun = sorted(set(stream[: num_rows * seq_len + 1]))
    for document in begun:
        if whole[document] <= seq_len + 1:
            fitting.add(document)
            first = stream.index(document)
            last = first + whole[document] - 1  # in the row of the first token, or as the target behind its inputs
            if last > (first // seq_len + 1) * seq_len:
                cut.add(document)
    return pieces, squares, len(fitting), len(cut)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(3, 20))
def test_split_figures_equal_those_of_a_list_of_tokens(lengths: list[int], seq_len: int) -> None:
    with patch.object(survey_module, "_PACKED_ROWS", 8):
        packing = pack(np.array(lengths), "split", seq_len)
    pieces, squares, fitting, cut = naive_split(lengths, 8, seq_len)
    assert packing.num_rows == 8
    assert packing.documents_per_row == pieces / 8
    assert packing.attention == pytest.approx(squares / (8 * seq_len**2))
    assert packing.cut == cut / max(1, fitting)
    assert packing.padding == 0


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(3, 20))
def test_best_fit_figures_equal_those_of_the_naive_packer(lengths: list[int], seq_len: int) -> None:
    with patch.object(survey_module, "_PACKED_ROWS", 8):
        packing = pack(np.array(lengths), "best_fit", seq_len)
    many = lengths * (40 * seq_len // sum(lengths) + 2)
    rows = naive_windows(many, len(many), "best_fit", seq_len, 8)[0].rows
    assert len(rows) == packing.num_rows
    pads = sum(row.count(None) for row in rows)
    assert packing.padding == pytest.approx(pads / (len(rows) * (seq_len + 1)))
    per_row = [Counter(token[0] for token in row[:-1] if token) for row in rows]
    assert packing.documents_per_row == sum(map(len, per_row)) / len(rows)
    inputs = [Counter(("pad", k) if token is None else token[0] for k, token in enumerate(row[:-1])) for row in rows]
    assert packing.attention == pytest.approx(
        sum(n**2 for row in inputs for n in row.values()) / (len(rows) * seq_len**2)
    )
    assert packing.cut == 0


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_survey_is_exact_from_the_cache_and_close_from_a_sample(share: float, tmp_path: Path) -> None:
    config = load(make_config(tmp_path, data__held_out_fraction=share))
    write_jsonl(tmp_path / "a.jsonl", documents := texts("a", 2000))
    tokenizer = Tokenizer.load(config.tokenizer.path)

    def surveyed(reader: str) -> Survey:
        corpus = open_corpus(replace(config.data, reader=reader), tokenizer, seq_len=SEQ_LEN, seed=0)  # type: ignore[arg-type]
        source = corpus.sources["data"]
        out = source.held_out(np.zeros(2000, np.int64), np.arange(2000))
        expected.append(sorted(len(t.encode()) + 2 for t, held in zip(documents, out, strict=True) if not held))
        return survey(source)

    expected: list[list[int]] = []
    whole = surveyed("streamed")
    with patch.object(survey_module, "_SAMPLE_BYTES", 60_000):
        sample, again = surveyed("streamed"), surveyed("streamed")
        cached = surveyed("cached")
    for exact in (whole, cached):
        assert exact.is_whole
        assert sorted(exact.lengths.tolist()) == expected[0]
        assert (exact.num_documents, exact.num_tokens) == (len(expected[0]), sum(expected[0]))
    assert np.array_equal(whole.lengths, cached.lengths)  # in the same random order
    assert np.array_equal(sample.lengths, again.lengths)
    assert not sample.is_whole
    assert np.array_equal(sample.lengths, whole.lengths[: len(sample.lengths)])
    assert 60_000 <= sample.lengths.sum() < 90_000
    assert sample.num_documents == pytest.approx(len(expected[0]), rel=0.1)
    assert sample.num_tokens == pytest.approx(sum(expected[0]), rel=0.15)


def test_statistics_of_a_mixture_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(tmp_path, **CORPORA["mixture"], training__steps=50)
    lengths = {name: sorted(len(t.encode()) + 2 for t in texts(name, n)) for name, n in (("a", 61), ("b", 11))}
    text = shown(capsys, "--job.config_file", path, "--stats")
    table = {line.split()[0]: line.split() for line in text.split("\n\n")[1].splitlines()}
    for name, share, counts in (
        ("a", "70.0%", lengths["a"]),
        ("b", "30.0%", lengths["b"]),
        ("all", "", [*lengths["a"], *lengths["b"]]),
    ):
        counts = sorted(counts)
        longer = sum(count > SEQ_LEN + 1 for count in counts) / len(counts)
        at = [counts[math.ceil(q * len(counts)) - 1] for q in (0.5, 0.05, 0.95, 1)]
        cells = [len(counts), f"{sum(counts):,}", f"{sum(counts) / len(counts):,.1f}", *at, f"{longer:.1%}"]
        rows = {"a": 140, "b": 60}.get(name)  # of 200
        epochs = [f"{rows * SEQ_LEN / sum(counts):.3g}"] if rows else []
        assert table[name] == [name, *filter(None, [share]), *map(str, cells), *epochs]
    packings = [line.split() for line in text.split("\n\n")[2].splitlines()[1:-1]]
    assert [row[:2] for row in packings] == [[n, p] for p in ("split", "best_fit") for n in ("a", "b", "all")]
    for a, b, both in (packings[:3], packings[3:]):
        for mine in range(-4, 0):
            one, other, mixed = (float(row[mine].rstrip("%")) for row in (a, b, both))
            assert mixed == pytest.approx(0.7 * one + 0.3 * other, abs=0.11)
    lines = text.split("\n\n")[3].splitlines()[1:]
    shares = [re.findall(r"([\d,]+) to ([\d,]+) +([\d.]+)% +([\d.]+)%", line)[0] for line in lines]
    counts = [*lengths["a"], *lengths["b"]]
    for low, high, documents, tokens in shares:
        inside = [count for count in counts if int(low.replace(",", "")) <= count <= int(high.replace(",", ""))]
        assert float(documents) == pytest.approx(100 * len(inside) / len(counts), abs=0.051)
        assert float(tokens) == pytest.approx(100 * sum(inside) / sum(counts), abs=0.051)
    assert sum(float(share[2]) for share in shares) == pytest.approx(100, abs=0.5)
    assert "~" not in text
    with patch.multiple(survey_module, _SAMPLE_BYTES=2000, _PORTION=8):
        estimated = shown(capsys, "--job.config_file", path, "--stats", "--data.held_out_fraction", 0.2)
    assert re.search(r"^a +70.0% +~[\d]+ +~[\d,]+ ", estimated, re.MULTILINE)
    assert re.search(r"^all +~[\d]+ +~[\d,]+ ", estimated, re.MULTILINE)
    assert re.search(r"^~ source a: estimated from (16|24|32) documents drawn at random", estimated, re.MULTILINE)
    assert "held out of training (data.held_out_fraction) are not counted" in estimated


def test_a_sampled_document_counts_for_those_it_stands_for() -> None:
    few = Survey(np.array([10, 20, 30]), num_documents=30, num_looked_at=3, is_whole=False)
    many = Survey(np.array([100, 200]), num_documents=70, num_looked_at=2, is_whole=False)
    pooled = Pooled({"few": few, "many": many})
    assert (pooled.num_documents, pooled.num_tokens, pooled.about) == (100, 600 + 10500, "~")
    assert [pooled.quantile(share) for share in (0.1, 0.11, 0.3, 0.31, 0.65, 0.66)] == [10, 20, 30, 100, 100, 200]
    assert pooled.share(pooled.lengths > 100) == pytest.approx(0.35)
