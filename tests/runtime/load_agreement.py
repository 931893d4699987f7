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
    """[tokens]: where no allowed error can change the token."""
    num_different: int
    """Tokens that are decided and not the reference's."""
    kl: list[float]
    """Of the steps whose logits were recorded."""


def compare(
    served: Sequence[Served], reference: PreTrainedModel, precision: Precision
) -> list[Verdict]:
    """Asserts that decided tokens are the reference's, but for precision's most_different of all;
    sequences without a token are left out.

    Divergences are for the caller to judge, as a mean over many.
    """
    verdicts = [_compare_one(one, reference, precision) for one in served if one.token_ids]
    num_decided = sum(int(verdict.decided.sum()) for verdict in verdicts)
    different = [v for v in verdicts if v.num_different]
    assert sum(v.num_different for v in different) <= precision.most_different * num_decided, [
        (v.served.seq_id, v.served.sampling, v.served.admitted_lengths) for v in different
    ]
    return verdicts


def _compare_one(served: Served, reference: PreTrainedModel, precision: Precision) -> Verdict:
    first, device = len(served.prompt), reference.device
    with torch.inference_mode():
        ids = torch.tensor([[*served.prompt, *served.token_ids]], device=device)
        logits_TV = reference(ids).logits[0, first - 1 : -1].float()
        expected_T, decided_T = decided_tokens(logits_TV, served.sampling, first, precision)
        kl = [
            mean_kl(ours_V.to(device)[None], logits_TV[index : index + 1])
            for index, ours_V in sorted(served.final_logits().items())
        ]
    decided = decided_T.cpu().numpy()
    is_different = np.array(served.token_ids) != expected_T.cpu().numpy()
    return Verdict(
        served=served, decided=decided, num_different=int((is_different & decided).sum()), kl=kl
    )


def assert_same_alone(loaded: LoadedEngine, verdicts: Sequence[Verdict]) -> None:
    """Run again alone, each sequence gives the same tokens up to a step that is not decided."""
    for verdict in verdicts:
        under_load = verdict.served.token_ids
        alone = loaded.run_alone(verdict.served)[: len(under_load)]
        differs = np.flatnonzero(np.array(alone) != np.array(under_load))
        if len(differs):
            assert not verdict.decided[differs[0]], (
                f"sequence {verdict.served.seq_id} differs alone at token {differs[0]}"
            )
