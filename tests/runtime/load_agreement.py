"""What came out of a random load against a float32 reference that is led along the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.models.decided import Precision, decided_tokens
from tests.models.test_quantised import mean_kl
from tests.runtime.random_load import LoadedEngine, Served


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One sequence, compared."""

    served: Served
    decided: np.ndarray
    """[tokens]: where no error but one of the tail can change the token."""
    is_sure: np.ndarray
    """[tokens]: where none of the tail can either."""
    num_different: int
    """Tokens that are decided and not the reference's."""
    num_surely_different: int
    """Of the sure ones."""
    kl: list[float]
    """Of the steps whose logits were recorded."""


def compare(
    served: Sequence[Served], reference: PreTrainedModel, precision: Precision
) -> list[Verdict]:
    """Asserts that decided tokens are the reference's, but for precision's most_different of all,
    which are none of the sure ones; sequences without a token are left out.

    Divergences are for the caller to judge, as a mean over many.
    """
    verdicts = [_compare_one(one, reference, precision) for one in served if one.token_ids]
    num_decided = sum(int(verdict.decided.sum()) for verdict in verdicts)
    num_different = sum(verdict.num_different for verdict in verdicts)
    is_sure = any(verdict.num_surely_different for verdict in verdicts)
    assert num_different <= precision.most_different * num_decided and not is_sure, [
        (v.served.seq_id, v.served.sampling, v.served.admitted_lengths)
        for v in verdicts
        if v.num_different
    ]
    return verdicts


def _compare_one(served: Served, reference: PreTrainedModel, precision: Precision) -> Verdict:
    first, device = len(served.prompt), reference.device
    with torch.inference_mode():
        ids = torch.tensor([[*served.prompt, *served.token_ids]], device=device)
        logits_TV = reference(ids).logits[0, first - 1 : -1].float()
        expected_T, decided_T = decided_tokens(
            logits_TV, served.sampling, first, precision.logit_error
        )
        _, is_sure_T = decided_tokens(logits_TV, served.sampling, first, precision.largest_error)
        kl = [
            mean_kl(ours_V.to(device)[None], logits_TV[index : index + 1])
            for index, ours_V in sorted(served.final_logits().items())
        ]
    decided, is_sure = decided_T.cpu().numpy(), is_sure_T.cpu().numpy()
    is_different = np.array(served.token_ids) != expected_T.cpu().numpy()
    return Verdict(
        served=served, decided=decided, is_sure=is_sure,
        num_different=int((is_different & decided).sum()),
        num_surely_different=int((is_different & is_sure).sum()), kl=kl,
    )  # fmt: skip


def assert_same_alone(loaded: LoadedEngine, verdicts: Sequence[Verdict]) -> None:
    """Run again alone, each sequence gives the same tokens up to a step that is not sure."""
    for verdict in verdicts:
        under_load = verdict.served.token_ids
        alone = loaded.run_alone(verdict.served)[: len(under_load)]
        differs = np.flatnonzero(np.array(alone) != np.array(under_load))
        if len(differs):
            assert not verdict.is_sure[differs[0]], (
                f"sequence {verdict.served.seq_id} differs alone at token {differs[0]}"
            )
