"""Decoding: a KV cache, a batch and its padding change nothing; Hugging Face agrees; eos ends a prompt."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model.test_hugging_face import hugging_face
from tests.support.cases import some_quick
from tests.support.documents import EOS
from tests.support.llamas import SCALED, TINY, VARIANTS, build
from titanlite.model import decode
from titanlite.model.attention import realise
from titanlite.model.decode import KVCache, generate, right_align
from titanlite.model.documents import document_starts_from_lengths
from titanlite.model.transformer import Llama

CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 64, 89, 100, 128, 144, 177, 200]
NEVER = -1


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts in which every id occurs, eos (and 0, with which batches are padded) too."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(TINY.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def greedy(
    model: Llama, prompts: list[list[int]], num_tokens: int, eos_id: int = NEVER
) -> tuple[list[list[int]], list[Tensor]]:
    """New tokens of each prompt, and the logits [steps, V] from which they were chosen."""
    logits: list[Tensor] = []

    def choose(of_step: Tensor) -> list[int]:
        logits.append(of_step)
        return of_step.argmax(-1).tolist()

    steps = generate(model, prompts, max_new_tokens=num_tokens, eos_id=eos_id, choose=choose, device=CPU)
    tokens = [[token for token in of_prompt if token is not None] for of_prompt in zip(*steps, strict=True)]
    return tokens, list(torch.stack(logits, 1))


@torch.no_grad()
def without_cache(model: Llama, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """The same for one prompt alone, by training's forward pass over the whole prefix for every token."""
    ids, logits = list(prompt), []
    for _ in range(num_tokens):
        documents = realise(document_starts_from_lengths([[len(ids)]], len(ids)), "sdpa")
        logits.append(model.output(model(torch.tensor([ids]), documents))[0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@pytest.mark.parametrize("name", some_quick(VARIANTS, "plain", "rope-scaled"))
def test_cache_and_batch_change_neither_tokens_nor_logits(name: str) -> None:
    config = VARIANTS[name]
    model, prompts = build(config), prompts_of(LENGTHS)
    assert any(EOS in prompt for prompt in prompts)
    batch_tokens, batch_logits = greedy(model, prompts, 12)
    for prompt, tokens, logits in zip(prompts, batch_tokens, batch_logits, strict=True):
        (alone,), (alone_logits,) = greedy(model, [prompt], 12)
        wanted, wanted_logits = without_cache(model, prompt, 12)
        assert tokens == alone == wanted
        torch.testing.assert_close(logits, wanted_logits, atol=1e-10, rtol=0)
        torch.testing.assert_close(alone_logits, wanted_logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("columns", [1, 7, 199, 200])
def test_prompts_may_go_through_the_model_in_parts(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build(VARIANTS["rope-scaled"]), prompts_of([200, 3, 50])
    wanted = greedy(model, prompts, 3)
    monkeypatch.setattr(decode, "PREFILL_COLUMNS", columns)
    tokens, logits = greedy(model, prompts, 3)
    assert tokens == wanted[0]
    torch.testing.assert_close(logits, wanted[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "llama3"])
def test_positions_go_on_from_the_cache_in_every_bit(scaling: dict, dtype: torch.dtype) -> None:
    """The angles that blocks get, against those of the whole document at once."""
    model = build(replace(TINY, **scaling), dtype)
    angles: list[Tensor] = []
    model.layers["1"].register_forward_pre_hook(lambda module, args: angles.append(args[1]))
    prompts = prompts_of([130, 1, 40])
    new, _ = greedy(model, prompts, 6)
    got = torch.cat(angles, 1)
    for row, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
        angles.clear()
        whole = torch.tensor([[*prompt, *tokens[:-1]]])
        length = whole.shape[1]
        model(whole, realise(document_starts_from_lengths([[length]], length), "dense"))
        assert torch.equal(got[row, -length:], angles[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_follows_the_whole_pass_in_training_types(dtype: torch.dtype) -> None:
    model, prompts = build(VARIANTS["rope-scaled"], dtype), prompts_of(LENGTHS)
    new, logits = greedy(model, prompts, 8)
    exact = build(VARIANTS["rope-scaled"])
    exact.load_state_dict(model.state_dict())
    for prompt, tokens, got in zip(prompts, new, logits, strict=True):
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.no_grad():
            starts = document_starts_from_lengths([[ids.shape[1]]], ids.shape[1])
            wanted = exact.output(exact(ids, realise(starts, "dense")))[0, -8:]
            whole = model.output(model(ids, realise(starts, "dense")))[0, -8:]
        # No further from float64 than training's own forward pass is.
        assert (got.double() - wanted).norm() < 1.5 * (whole.double() - wanted).norm() + 1e-6 * wanted.norm()


def test_ids_of_pads_do_not_matter() -> None:
    model, prompts = build(TINY, torch.float32), prompts_of([3, 20, 11])
    tokens, starts = right_align(prompts, 2)
    is_pad = torch.arange(20) < torch.tensor([[17], [0], [9]])
    assert torch.equal(
        starts[:, :20] == torch.arange(20), is_pad | (torch.arange(20) == torch.tensor([[17], [0], [9]]))
    )
    results = []
    for pads in (0, EOS, 5, torch.randint(TINY.vocab_size, tokens.shape)):
        cache = KVCache(starts, len(model.layers))
        hidden = model(torch.where(is_pad, pads, tokens), cache.next(20))
        results.append([hidden[~is_pad], model(torch.tensor([[7], [0], [9]]), cache.next(1))])
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert torch.equal(got, wanted)


def test_the_cache_takes_its_memory_once_and_no_more_columns_than_it_has() -> None:
    model = build(TINY)
    tokens, starts = right_align(prompts_of([4]), 2)
    cache = KVCache(starts, len(model.layers))
    with torch.no_grad():
        model(tokens, cache.next(4))
        places = [layer.keys.data_ptr() for layer in cache.layers]
        assert all(layer.keys.shape == (1, TINY.n_kv_heads, 6, 8) for layer in cache.layers)
        for _ in range(2):
            model(torch.tensor([[1]]), cache.next(1))
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    with pytest.raises(AssertionError, match="a cache for 6 columns, not 7"):
        cache.next(1)


def test_an_eos_ends_its_prompt_and_the_last_one_ends_all() -> None:
    model, calls = build(TINY), []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    script = iter([[5, 9, 6], [9, 4, 7], [4, 4, 9], [4, 4, 4]])
    steps = generate(
        model, prompts_of([2, 3, 4]), max_new_tokens=10, eos_id=9, choose=lambda logits: next(script), device=CPU
    )
    assert list(steps) == [[5, 9, 6], [9, None, 7], [None, None, 9]]
    assert calls == [(3, 4), (3, 1), (3, 1)]


def test_max_new_tokens_needs_no_pass_after_the_last() -> None:
    model, calls = build(TINY), []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    assert [len(tokens) for tokens in greedy(model, prompts_of([2]), 3)[0]] == [3]
    assert calls == [(1, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("name", some_quick(VARIANTS, "plain"))
def test_greedy_text_equals_hugging_face(name: str) -> None:
    config = VARIANTS[name]
    ours = build(config, torch.float32)
    theirs, _ = hugging_face(ours)
    prompts = prompts_of([10, 1, 33], seed=1)
    tokens, logits = greedy(ours, prompts, 200)
    best = torch.stack(logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4, "a near tie, which rounding may decide: take another seed"
    for prompt, mine in zip(prompts, tokens, strict=True):
        wanted = theirs.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=200,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert mine == wanted[0, len(prompt) :].tolist()
    assert len({tuple(of_prompt[-20:]) for of_prompt in tokens}) > 1
