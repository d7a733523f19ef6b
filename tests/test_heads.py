"""Linear classifiers: float32 scores whatever the precision of the network before them."""

import pytest
import torch
import torch.nn.functional as F

from graftwork.methods.parts.heads import LinearHead, linear_head, linear_scores
from graftwork.operators.backbones import loading


def head(width: int, classes: int) -> LinearHead:
    torch.manual_seed(0)
    return linear_head(width, classes, std=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_are_those_of_double_precision_for_the_features_given(precision: str) -> None:
    made, rows = head(64, 50), torch.randn(20, 64)
    given = rows if precision == "fp32" else rows.bfloat16()
    with torch.no_grad(), loading.autocast("cpu", precision):
        found = made(given)
    exact = given.double() @ made.weight.double().T + made.bias.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_in_fp32_they_are_those_of_a_plain_layer_to_the_bit() -> None:
    made, rows = head(64, 50), torch.randn(20, 64)
    assert torch.equal(made(rows), F.linear(rows, made.weight, made.bias))


def test_ties_at_the_top_are_none_where_a_plain_layer_makes_some() -> None:
    """Hundreds of near scores: in bfloat16 the largest often stands there twice."""
    made, rows = head(192, 1000), torch.randn(2000, 192)

    def ties(scores: torch.Tensor) -> int:
        return int(((scores == scores.amax(dim=1, keepdim=True)).sum(dim=1) > 1).sum())

    with torch.no_grad(), loading.autocast("cpu", "bf16"):
        assert ties(F.linear(rows, made.weight, made.bias)) > 20
        assert ties(made(rows)) == 0


def test_gradients_reach_features_and_weights_under_autocast() -> None:
    made, rows = head(8, 3), torch.randn(4, 8, requires_grad=True)
    with loading.autocast("cpu", "bf16"):
        scores = linear_scores(rows, made.weight, made.bias)
    scores.square().sum().backward()
    assert rows.grad is not None and made.weight.grad is not None
    wanted = 2 * scores.detach().T @ rows.detach()
    torch.testing.assert_close(made.weight.grad, wanted)
