"""Mixtures: exact shares, one stream whatever the ranks and restarts, and an end that is the same for all."""

import json
import logging
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.loaders import batches, build
from tests.support.naive_stream import dealt_rows, splitmix64
from titanlite.config.sections import DataConfig, SourceConfig
from titanlite.data import feed
from titanlite.data.mixture import Deck
from titanlite.data.order import DocumentOrder, HeldOut

weights = st.lists(
    st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.25, 0.3, 0.7, 1.0, 2.0, 3.0, 12.5]), min_size=1, max_size=5
).filter(any)


def named(values: list[float]) -> dict[str, float]:
    return {f"s{i}": value for i, value in enumerate(values)}


@given(weights, st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_every_deck_holds_the_exact_shares(values: list[float], seed: int, number: int) -> None:
    deck = Deck(named(values), seed)
    dealt = deck.sources(number * deck.num_rows, deck.num_rows)
    for i, value in enumerate(values):
        share = Fraction(str(value)) / sum(Fraction(str(v)) for v in values)
        assert Fraction(int((dealt == i).sum()), deck.num_rows) == share


@given(weights, st.integers(0, 100), st.integers(0, 3000), st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_a_row_has_one_dealer_however_it_is_asked(values: list[float], seed: int, first: int, steps: list[int]) -> None:
    whole = Deck(named(values), seed).sources(0, first + sum(steps))
    deck = Deck(named(values), seed)
    for num_rows in steps:
        assert deck.sources(first, num_rows).tolist() == whole[first : first + num_rows].tolist()
        first += num_rows
        assert deck.dealt(first).tolist() == np.bincount(whole[:first], minlength=len(values)).tolist()


def test_rows_of_a_source_are_spread_over_the_deck() -> None:
    deck = Deck({"a": 0.7, "b": 0.2, "c": 0.06, "d": 0.04}, 3)
    dealt = deck.sources(0, 5000)
    for i, share in enumerate((0.7, 0.2, 0.06, 0.04)):
        counts = np.cumsum(dealt == i)
        assert np.abs(counts - share * np.arange(1, 5001)).max() < 2  # at every row, not only at the end of a deck


def test_orders_of_decks_differ_by_number_and_seed() -> None:
    deck = Deck({"a": 0.5, "b": 0.3, "c": 0.2}, 0)
    orders = [tuple(deck.sources(10 * k, 10).tolist()) for k in range(20)]
    assert len(set(orders)) > 5
    assert Deck({"a": 0.5, "b": 0.3, "c": 0.2}, 1).sources(0, 200).tolist() != deck.sources(0, 200).tolist()


def test_shares_that_no_deck_holds_are_rounded_by_less_than_a_row() -> None:
    values = {"a": 0.3333333333, "b": 0.6666666667, "c": 0.123456789}
    deck = Deck(values, 0)
    assert deck.num_rows == 1 << 20
    assert deck.counts.sum() == deck.num_rows
    for count, value in zip(deck.counts.tolist(), values.values(), strict=True):
        assert abs(count - value / sum(values.values()) * deck.num_rows) < 1
    with pytest.raises(ValueError, match=r"data.sources.b.weight = 1e-08 is less than a row in 1,048,576"):
        Deck({"a": 1.0, "b": 1e-8}, 0)


def test_dealers_are_those_that_checkpoints_rely_on() -> None:
    golden = [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 1, 0, 0, 1, 0, 2]
    assert golden == golden_dealers([5, 3, 2], 42, 0) + golden_dealers([5, 3, 2], 42, 1)
    assert Deck({"a": 0.5, "b": 0.3, "c": 0.2}, 42).sources(0, 20).tolist() == golden


def golden_dealers(counts: list[int], seed: int, deck: int) -> list[int]:
    """The order of a deck in plain Python: rows sorted by ((n << 32) + start) // count."""
    places = []
    for s, count in enumerate(counts):
        start = splitmix64(splitmix64(splitmix64(seed) ^ deck) ^ splitmix64(s)) >> 32
        places += [(((n << 32) + start) // count, s) for n in range(count)]
    return [s for _, s in sorted(places)]


# The stream of a mixture


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "CHUNK_BYTES", 200)
    monkeypatch.setattr(feed, "_ORDER_DOCUMENTS", 50)


def texts(letter: str, num_documents: int) -> list[str]:
    return [f"{letter}{k}" * (k * 7 % 13) for k in range(num_documents)]


WINDOW_TOKENS = 400
CORPORA = {"web": texts("w", 60), "books": ["b" * 700, "B" * 90], "code": texts("c", 25), "one": ["single"]}


def mixture(folder: Path, **sources: dict[str, Any]) -> DataConfig:
    """One jsonl file per source; the keys are those of a source's table."""
    for name in sources:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in CORPORA[name])
        (folder / f"{name}.jsonl").write_text(lines)
    configs = {name: SourceConfig(paths=(str(folder / f"{name}.jsonl"),), **keys) for name, keys in sources.items()}
    return DataConfig(
        sources=configs,
        cache_dir=str(folder / "cache"),
        num_workers=0,
        prefetch=0,
        shuffle_block=8,
        window_tokens=WINDOW_TOKENS,
    )


def naive_rows(
    name: str, num_rows: int, seq_len: int, window_rows: int, seed: int, block: int, share: float = 0.0
) -> list[list[int]]:
    """The rows of one source, from a stream of its own written down as a list."""
    order = DocumentOrder(len(CORPORA[name]), seed, block)
    out = HeldOut(name, [f"{name}.jsonl"], share)
    tokens: list[int] = []
    epochs: list[int] = []
    counter = 0
    while len(tokens) <= (num_rows + window_rows + 1) * seq_len:
        document = order.documents(np.array([counter]))
        if not out(np.array([0]), document)[0]:
            tokens += [257, *CORPORA[name][int(document[0])].encode(), 256]
            epochs += [counter // len(CORPORA[name])] * (len(tokens) - len(epochs))
        counter += 1
    rows = dealt_rows(epochs, num_rows, seq_len, window_rows, seed, name)
    return [tokens[r * seq_len : (r + 1) * seq_len + 1] for r in rows]


ALL = {"web": {"weight": 0.5}, "books": {"weight": 0.25}, "code": {"weight": 0.2}, "one": {"weight": 0.05}}


@settings(max_examples=settings().max_examples // 4)
@given(
    values=st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), min_size=4, max_size=4).filter(any),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 9)),
    seed=st.integers(0, 5),
    share=st.sampled_from([0.0, 0.2]),
    threads=st.sampled_from([(0, 0), (1, 1), (3, 2)]),
)
def test_mixture_is_the_rows_of_its_sources_in_the_order_of_the_deck(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[float],
    shape: tuple[int, int],
    seed: int,
    share: float,
    threads: tuple[int, int],
) -> None:
    seq_len, num_rows = shape
    by_name = dict(zip(CORPORA, values, strict=True))
    if share and any(
        by_name[n] and HeldOut(n, [f"{n}.jsonl"], share)(np.zeros(len(t), int), np.arange(len(t))).all()
        for n, t in CORPORA.items()
    ):
        return
    data = mixture(tmp_path_factory.mktemp("mixture"), **{name: {"weight": w} for name, w in by_name.items()})
    data = replace(data, num_workers=threads[0], prefetch=threads[1], held_out_fraction=share)
    made = batches(data, 3, seq_len=seq_len, global_batch_size=num_rows, seed=seed)
    names = sorted(name for name, w in by_name.items() if w)
    dealers = Deck({name: by_name[name] for name in names}, seed).sources(0, 3 * num_rows).tolist()
    shares = {name: by_name[name] / sum(by_name.values()) for name in names}
    windows = {name: max(1, round(shares[name] * WINDOW_TOKENS / seq_len)) for name in names}
    rows = {name: iter(naive_rows(name, len(dealers), seq_len, windows[name], seed, 8, share)) for name in names}
    expected = [next(rows[names[dealer]]) for dealer in dealers]
    assert [row for batch in made for row in batch.rows.tolist()] == expected
    counts = Counter(names[dealer] for dealer in dealers)
    for name, ledger in made[-1].source_ledgers.items():
        tokens = counts[name] * seq_len  # and one more once the row with which the stream begins is dealt
        assert ledger["targets"] + ledger["document_first"] - tokens in ((0, 1) if tokens else (0,))
        assert ledger["tokens_read"] == sum(ledger[k] for k in ("targets", "document_first", "carried", "dropped"))
    assert all(
        made[-1].ledger[key] == sum(ledger[key] for ledger in made[-1].source_ledgers.values())
        for key in made[-1].ledger
    )


@pytest.mark.parametrize("dp_degree", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 8))])
def test_every_rank_and_restart_sees_the_same_mixture(dp_degree: int, tmp_path: Path) -> None:
    data, cursor = mixture(tmp_path, **ALL), None
    for step, whole in enumerate(batches(data, 6, global_batch_size=24)):  # every step by loaders of their own
        ranks = [
            batches(data, 1, global_batch_size=24, dp_rank=r, dp_degree=dp_degree, cursor=cursor)[0]
            for r in range(dp_degree)
        ]
        assert [row for rank in ranks for row in rank.rows.tolist()] == whole.rows.tolist()
        assert sum(rank.fingerprint_part for rank in ranks) % 2**64 == whole.fingerprint_part, step
        assert all(rank.cursor == whole.cursor for rank in ranks)
        cursor = json.loads(json.dumps(whole.cursor))


def test_order_of_the_tables_and_sources_of_weight_0_do_not_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = batches(mixture(tmp_path, web={"weight": 3}, code={"weight": 1}), 3)
    scaled = mixture(tmp_path, code={"weight": 0.25}, web={"weight": 0.75}, books={"weight": 0.0})
    (tmp_path / "books.jsonl").unlink()  # it is not even looked at
    for a, b in zip(first, batches(scaled, 3), strict=True):
        assert a.rows.tolist() == b.rows.tolist()
        assert a.cursor == b.cursor
    assert "sources of weight 0, left out: books" in caplog.text


def test_other_weights_or_sources_are_another_stream(tmp_path: Path) -> None:
    made = build(mixture(tmp_path, **ALL))
    cursor = next(iter(made)).cursor
    other = mixture(tmp_path, **{**ALL, "one": {"weight": 0.1}})
    with pytest.raises(ValueError, match=r"source web was 10 of 20 rows.* and is 10 of 21 rows"):
        build(other, cursor=cursor)
    with pytest.raises(ValueError, match=r"source books was .* and is none.*; source books removed"):
        build(mixture(tmp_path, web={}), cursor=cursor, saved_corpus=made.corpus)


def test_manifest_tells_what_each_source_holds(tmp_path: Path) -> None:
    corpus = build(mixture(tmp_path, web={}, one={"weight": 2.0})).corpus
    assert corpus["num_documents"] == 61
    web, one = corpus["sources"]["web"], corpus["sources"]["one"]
    assert (web["num_documents"], web["weight"], web["reader"]) == (60, 1.0, "streamed")
    tokens = sum(len(text) + 2 for text in CORPORA["web"])
    assert 0.6 * tokens < web["num_tokens"] < 1.6 * tokens  # estimated
    assert one["num_tokens"] == len("single") + 2  # its only document is in the sample
    assert corpus["num_tokens"] == web["num_tokens"] + one["num_tokens"]


# The end of the data


@pytest.mark.parametrize("threads", [(0, 0), (2, 2)])
def test_run_ends_where_a_source_has_dealt_its_epochs(tmp_path: Path, threads: tuple[int, int]) -> None:
    data = mixture(tmp_path, web={"weight": 0.5, "max_epochs": 2}, code={"weight": 0.5})
    data = replace(data, num_workers=threads[0], prefetch=threads[1])
    tokens = 2 * sum(len(text) + 2 for text in CORPORA["web"])
    num_rows = (tokens - 1) // 16  # a row of 16 shows 17 tokens
    steps = num_rows // 2  # four rows a step, two of them from web
    ends = []
    for rank in range(2):
        made = build(data, dp_rank=rank, dp_degree=2)
        got = list(made)
        assert len(got) == steps
        assert "source 'web' has no row left after max_epochs = 2" in str(made.ended)
        assert made.ended is not None
        ends.append(made.ended.ledgers)
        made.close()
    assert ends[0] == ends[1]
    web, code = ends[0]["web"], ends[0]["code"]
    assert web["tokens_read"] == tokens  # all that there is
    dealt = web["targets"] + web["document_first"]
    assert dealt - steps * 2 * 16 in (0, 1)  # 1 where the last row is not that with which the stream begins
    assert (web["carried"], web["dropped"]) == (0, tokens - dealt)
    assert code["tokens_read"] == code["targets"] + code["document_first"] + code["dropped"]
    assert code["dropped"] == got[-1].source_ledgers["code"]["carried"]
    # The end is no part of the stream: with more epochs the run goes on.
    more = replace(data, sources={**data.sources, "web": replace(data.sources["web"], max_epochs=3)})
    expected = batches(mixture(tmp_path, web={"weight": 0.5}, code={"weight": 0.5}), steps + 1)
    (again,) = batches(more, 1, cursor=got[-1].cursor)
    assert again.rows.tolist() == expected[-1].rows.tolist()


def test_many_epochs_are_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = mixture(tmp_path, web={"weight": 0.9}, one={"weight": 0.1})
    made = batches(data, 30)
    warned = [r.getMessage() for r in caplog.records if "more than 4 epochs" in r.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("source 'one'")
    assert made[-1].epochs["one"] > 8
    assert made[-1].epochs["web"] < 4


def test_more_bad_records_than_allowed_stop_the_run_at_a_step_of_the_data(tmp_path: Path) -> None:
    data = mixture(tmp_path, web={})
    lines = (tmp_path / "web.jsonl").read_text().splitlines()
    lines[10::10] = ["{"] * len(lines[10::10])
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    data = replace(data, on_bad_record="skip", max_bad_records=3)
    good = [batch.ledger["bad_records"] for batch in batches(replace(data, max_bad_records=0), 30)]
    steps = sum(bad <= 3 for bad in good)
    assert 0 < steps < 30
    for workers in (0, 2):
        made = build(replace(data, num_workers=workers))
        taken = iter(made)
        assert len(list(islice(taken, steps))) == steps
        with pytest.raises(ValueError, match="more bad records than data.max_bad_records = 3"):
            next(taken)
        made.close()


def test_held_out_everything_is_an_error_not_a_loop(tmp_path: Path) -> None:
    data = replace(mixture(tmp_path, one={}), held_out_fraction=0.999999)
    with pytest.raises(ValueError, match="no document is left to train on"):
        next(iter(build(data)))
