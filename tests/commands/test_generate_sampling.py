"""Drawing tokens: the distribution against its definition, draws against the distribution, seeds against batches."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.model.test_decode import CPU, NEVER, prompts_of
from tests.support.llamas import TINY, build
from tests.support.make_tokenizers import SMALL, write_tokenizer
from titanlite.generate.sampling import Sampler, Sampling, distribution, draw, generators
from titanlite.model.decode import generate
from titanlite.tokenizer import Tokenizer


def by_definition(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> dict[int, float]:
    """Probability by id, in plain Python: temperature, then the k best, then the fewest of these that reach p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = math.fsum(weights.values())
    kept: dict[int, float] = {}
    for i in order:
        if top_p < 1 and math.fsum(kept.values()) / total >= top_p:
            break
        kept[i] = weights[i]
    return {i: weight / math.fsum(kept.values()) for i, weight in kept.items()}


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=1, max_size=20),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 2, 5, 100]),
    # Not the sum of any few of these probabilities, where rounding would decide.
    top_p=st.sampled_from([1e-9, 0.1234567, 0.5432109, 0.9012345, 1.0]),
)
@example(logits=[1.0, 1.0, 1.0], temperature=1.0, top_k=2, top_p=1.0)  # of equals those with lower ids
@example(logits=[0.0, 5.0], temperature=1e-300, top_k=None, top_p=0.9)  # no overflow
def test_the_distribution_is_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    # Beside another row, which must not matter.
    rows = torch.tensor([logits, logits[::-1]], dtype=torch.float64)
    probabilities, ids = distribution(rows, Sampling(temperature, top_k, top_p))
    found = {i: p for i, p in zip(ids[0].tolist(), probabilities[0].tolist(), strict=True) if p > 0}
    wanted = {i: p for i, p in by_definition(logits, temperature, top_k, top_p).items() if p > 0}
    assert found == pytest.approx(wanted, rel=1e-12)
    assert list(found) == list(wanted)
    assert probabilities.sum(-1).tolist() == pytest.approx([1, 1], rel=1e-12)


def test_a_grid_of_uniform_numbers_draws_every_token_as_often_as_its_probability_says() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0, 0.0]], dtype=torch.float64)
    num = 100_000
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    counts = draw(probabilities.expand(num, -1).contiguous(), uniform).bincount(minlength=6)
    assert (counts / num - probabilities[0]).abs().max() <= 1 / num
    for u, wanted in ((0.0, 0), (0.5, 1), (math.nextafter(1, 0), 3)):  # the border belongs to the next token
        assert draw(probabilities, torch.tensor([u], dtype=torch.float64)).tolist() == [wanted]
    # A sum that rounds to less than the product with it: the last token that can be drawn, and not the one behind.
    tenths = torch.tensor([[0.1] * 10 + [0.0]], dtype=torch.float64)
    assert draw(tenths, torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)).tolist() == [9]
    assert draw(tenths, torch.tensor([1.0], dtype=torch.float64)).tolist() == [9]


def test_the_sampler_draws_from_the_distribution_with_the_prompts_own_numbers() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(0.8, 20, 0.9, seed=5)
    prompts = [[1, 2], [3], [1, 2]]
    drawn = [Sampler(sampling, generators(prompts, 5), 50)(logits) for _ in range(2)]
    assert drawn[0] == drawn[1]
    probabilities, ids = distribution(logits, sampling)
    uniform = torch.tensor([g.random() for g in generators(prompts, 5)], dtype=torch.float64)
    assert drawn[0] == ids.gather(1, draw(probabilities, uniform)[:, None])[:, 0].tolist()


def test_numbers_follow_from_seed_prompt_and_how_often_it_was_asked() -> None:
    first, other, again = (g.random() for g in generators([[1, 2], [12], [1, 2]], 0))
    assert len({first, other, again}) == 3
    assert [g.random() for g in generators([[12], [1, 2], [1, 2]], 0)] == [other, first, again]
    assert generators([[1, 2]], 1)[0].random() != first


def sampled(prompts: list[list[int]], seed: int = 0) -> list[list[int]]:
    sampler = Sampler(Sampling(1.5, 30, 0.95, seed), generators(prompts, seed), TINY.vocab_size)
    steps = generate(build(TINY), prompts, max_new_tokens=20, eos_id=NEVER, choose=sampler, device=CPU)
    return [[token for token in of_prompt if token is not None] for of_prompt in zip(*steps, strict=True)]


def test_a_prompt_draws_the_same_alone_and_in_any_batch() -> None:
    prompts = prompts_of([5, 40, 1, 17])
    batch = sampled(prompts)
    assert [sampled([prompt])[0] for prompt in prompts] == batch
    assert sampled(prompts[::-1]) == batch[::-1]
    assert sampled(prompts, seed=1) != batch
    twice = sampled([prompts[0], prompts[0]])
    assert twice[0] == batch[0] != twice[1]


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]], dtype=torch.bfloat16)
    assert Sampler(Sampling(), generators([[0]], 0), 4)(logits) == [1]


def test_ids_that_the_tokenizer_lacks_are_never_chosen(tmp_path: Path) -> None:
    special = {"<a>": 262, "<b>": 265}
    tokenizer = Tokenizer.load(str(write_tokenizer(tmp_path, SMALL, special, eos_token="<b>")))
    assert tokenizer.unused_ids() == [260, 261, 263, 264]
    assert tokenizer.vocab_size == 266
    logits = torch.zeros(1, 300)
    logits[0, [261, 263, 266, 299]] = 9.0
    logits[0, 262] = 5.0
    before = logits.clone()
    for sampling in (Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)):
        sampler = Sampler(sampling, generators([[0]], 0), tokenizer.vocab_size, tokenizer.unused_ids())
        assert sampler(logits) == [262]
    assert torch.equal(logits, before)


def test_special_ids_among_the_ranks_leave_no_gap(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, SMALL, {"<e>": 256}, eos_token="<e>")
    lines = (folder / "tokenizer.model").read_text().splitlines()
    moved = [f"{line.split()[0]} {int(line.split()[1]) + (int(line.split()[1]) >= 256)}" for line in lines]
    (folder / "tokenizer.model").write_text("\n".join(moved))
    tokenizer = Tokenizer.load(str(folder))
    assert (tokenizer.vocab_size, tokenizer.unused_ids()) == (261, [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    logits = torch.zeros(2, 8)
    logits[1, 3] = torch.nan
    with pytest.raises(ValueError, match="logits are not numbers"):
        Sampler(Sampling(temperature), generators([[0], [1]], 0), 8)(logits)
