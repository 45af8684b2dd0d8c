"""The checks that every run makes before its first step find what they are there to find."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.documents import EOS, tokens_of
from titanlite.model import selfcheck
from titanlite.model.documents import document_starts
from titanlite.model.selfcheck import check_backend, check_starts

CPU = torch.device("cpu")


def test_the_rule_is_held_against_the_packer() -> None:
    rows = tokens_of([[5, 1, 3], [9]], 9)
    starts = document_starts(rows[:, :-1], EOS)
    check_starts(starts, [[0, 5, 6], [0]])
    with pytest.raises(ValueError, match=r"row 0 .* begins at position 6 only by the rule"):
        check_starts(starts, [[0, 5], [0]])
    with pytest.raises(ValueError, match=r"row 1 .* begins at position 4 only by the packer"):
        check_starts(starts, [[0, 5, 6], [0, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_a_right_backend_passes(backend: str, dtype: torch.dtype) -> None:
    check_backend(backend, CPU, dtype, head_dim=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_backend_that_lets_documents_see_each_other_is_refused(dtype: torch.dtype, monkeypatch: Any) -> None:
    right = selfcheck.realise

    def one_document(starts: Tensor, backend: str) -> Any:
        documents = right(starts, backend)
        return replace(documents, starts=torch.zeros_like(starts))

    monkeypatch.setattr(selfcheck, "realise", one_document)
    with pytest.raises(ValueError, match=r"model.attention = 'sdpa' is wrong on this machine: its output differs"):
        check_backend("sdpa", CPU, dtype, head_dim=32)
