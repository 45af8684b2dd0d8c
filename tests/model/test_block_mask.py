"""FlexAttention's block mask: assembled from document starts, and the same as torch finds by evaluating every pair."""

import itertools

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.documents import EOS, may_see, qkv, tokens_of
from titanlite.model.attention import attend, build_documents
from titanlite.model.documents import document_starts, document_starts_from_lengths
from titanlite.model.ops import flex


def starts_with_boundaries(boundaries: list[list[int]], seq_len: int) -> Tensor:
    rows = [sorted({0, seq_len, *(b for b in row if b < seq_len)}) for row in boundaries]
    lengths = [[b - a for a, b in itertools.pairwise(row)] for row in rows]
    return document_starts_from_lengths(lengths, seq_len)


@given(
    boundaries=st.lists(
        st.lists(st.integers(1, 639) | st.sampled_from([127, 128, 129, 256, 383, 512])), min_size=1, max_size=3
    ),
    blocks=st.integers(1, 5),
)
@example(boundaries=[[], [128, 256], list(range(640)), [1], [639]], blocks=5)
@settings(max_examples=25)
def test_block_mask_is_the_one_that_torch_finds_by_evaluating_every_pair(boundaries: list, blocks: int) -> None:
    seq_len = blocks * flex.BLOCK
    starts = starts_with_boundaries(boundaries, seq_len)
    mine = flex.document_block_mask(starts)
    theirs = create_block_mask(
        flex.document_mask_mod(starts), len(boundaries), None, seq_len, seq_len, device="cpu", BLOCK_SIZE=flex.BLOCK
    )
    assert mine.shape == theirs.shape
    assert mine.BLOCK_SIZE == theirs.BLOCK_SIZE
    for side in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = getattr(mine, f"{side}_num_blocks"), getattr(theirs, f"{side}_num_blocks")
        assert torch.equal(counts, wanted)
        assert counts.dtype == wanted.dtype
        indices, wanted = getattr(mine, f"{side}_indices"), getattr(theirs, f"{side}_indices")
        valid = torch.arange(blocks) < counts.unsqueeze(-1)
        assert torch.equal(indices[valid], wanted[valid])
        assert indices.dtype == wanted.dtype


def test_mask_mod_is_the_definition() -> None:
    tokens = tokens_of([[5, 1, 6, 4], [1, 15]], 16)
    mask_mod = flex.document_mask_mod(document_starts(tokens, EOS))
    index = torch.arange(16)
    for b, row in enumerate(tokens.tolist()):
        got = mask_mod(torch.tensor(b), torch.tensor(0), index[:, None], index)
        assert got.tolist() == [[may_see(row, i, j) for j in range(16)] for i in range(16)]


def test_a_block_mask_of_64k_tokens_allocates_nothing_of_that_square() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                Largest.numel = max(Largest.numel, t.numel() if isinstance(t, Tensor) else 0)
            return out

    seq_len = 65536
    starts = document_starts(torch.arange(seq_len).unsqueeze(0) % 600, EOS)
    with Largest():
        flex.document_block_mask(starts)
    assert seq_len <= Largest.numel < 2 * (seq_len // flex.BLOCK) ** 2


def test_flex_forward_equals_dense_and_is_compiled_once() -> None:
    counter = CompileCounter()
    call = torch.compile(attend, backend=counter, fullgraph=True)  # on the CPU flex has no backward to check
    inputs = [t.detach() for t in qkv(2, 384, 4, 2, torch.float32)]
    for rows in ([[100, 28, 1, 200], [384]], [[], [128, 128, 128]], [[3] * 128, [127, 2, 255]]):
        tokens = tokens_of(rows, 384)
        got = call(*inputs, build_documents(tokens, EOS, "flex"))
        wanted = attend(*inputs, build_documents(tokens, EOS, "dense"))
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert counter.frame_count == 1
