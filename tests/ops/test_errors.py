"""Bad input of every kind: the message names the argument, what was expected, and what came; nothing is changed."""

import pytest
import torch

import ctkernels
from ctkernels.functional import ctu, head_edit

X = torch.randn(2, 4, 3)

BAD = {
    "x is a list": (([1.0], 0.9), {}, TypeError, "ctu: x must be a tensor, got list"),
    "x is int": ((torch.ones(3, dtype=torch.int64), 0.9), {}, TypeError, "x must be float32, .* got int64"),
    "x is complex": ((torch.ones(3, dtype=torch.complex64), 0.9), {}, TypeError, "got complex64"),
    "x is sparse": ((torch.eye(3).to_sparse(), 0.9), {}, TypeError, r"x must be a strided tensor, got sparse_coo"),
    "x is nested": (
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), 0.9),
        {},
        TypeError,
        "x must be a strided tensor, got a nested one",
    ),
    "activation is a list": (
        (X, 0.9),
        {"activation": ["relu"]},
        ValueError,
        r"activation must be one of .* got \['relu'\]",
    ),
    "channel_dim of a scalar": (
        (torch.tensor(1.0), 0.9),
        {"channel_dim": 0},
        ValueError,
        "channel_dim must be None for an x without dimensions, got 0",
    ),
    "beta above 1": ((X, 1.5), {}, ValueError, "beta must be between 0 and 1, got 1.5"),
    "beta negative": ((X, -0.1), {}, ValueError, "beta must be between 0 and 1, got -0.1"),
    "beta is NaN": ((X, float("nan")), {}, ValueError, "beta must be between 0 and 1, got nan"),
    "beta is a string": ((X, "0.9"), {}, TypeError, "beta must be a number or a tensor, got str"),
    "beta is a bool": ((X, True), {}, TypeError, "beta must be a number or a tensor, got bool"),
    "beta is None": ((X, None), {}, TypeError, "beta must be a number or a tensor, got NoneType"),
    "coeff above 1": ((X, 0.9, 2), {}, ValueError, "coeff must be between 0 and 1, got 2"),
    "beta is 2-D": ((X, torch.rand(2, 4)), {}, ValueError, r"beta must have at most one dimension, got shape \(2, 4\)"),
    "beta is int": (
        (X, torch.ones(4, dtype=torch.int32)),
        {"channel_dim": 1},
        TypeError,
        "beta must be float32, .* got int32",
    ),
    "no channel_dim": ((X, torch.rand(4)), {}, ValueError, "channel_dim is needed, because beta has 4 values"),
    "wrong count": (
        (X, torch.rand(5)),
        {"channel_dim": 1},
        ValueError,
        r"beta must have 1 value or x.shape\[1\] = 4 values, got 5",
    ),
    "empty beta": ((X, torch.rand(0)), {"channel_dim": 1}, ValueError, "got 0"),
    "coeff count": ((X, 0.9, torch.rand(3)), {"channel_dim": 1}, ValueError, "coeff must have 1 value or .* got 3"),
    "scale count": (
        (X, 0.9),
        {"channel_dim": 1, "scale": torch.rand(3)},
        ValueError,
        "scale must have 1 value or .* got 3",
    ),
    "shift is 2-D": ((X, 0.9), {"shift": torch.rand(1, 4)}, ValueError, "shift must have at most one dimension"),
    "channel_dim outside": ((X, 0.9), {"channel_dim": 3}, ValueError, "channel_dim must be between -3 and 2 .* got 3"),
    "channel_dim float": ((X, 0.9), {"channel_dim": 1.0}, TypeError, "channel_dim must be an int, got float"),
    "activation": ((X, 0.9), {"activation": "elu"}, ValueError, "activation must be one of 'relu', .*; got 'elu'"),
    "slope type": (
        (X, 0.9),
        {"activation": "leaky_relu", "negative_slope": "a"},
        TypeError,
        "negative_slope must be a number",
    ),
    "residual shape": (
        (X, 0.9),
        {"residual": torch.rand(2, 4)},
        ValueError,
        r"residual must have x's shape \(2, 4, 3\), got \(2, 4\)",
    ),
    "residual type": ((X, 0.9), {"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "beta too large": (
        (X, 10**400),
        {},
        ValueError,
        "beta must be a number that float64 can hold, got one beyond 1.8e308",
    ),
    "slope too large": (
        (X, 0.9),
        {"activation": "prelu", "negative_slope": -(10**400)},
        ValueError,
        "negative_slope must be a number that float64 can hold",
    ),
    "eps infinite": ((X, 0.9), {"eps": float("inf")}, ValueError, "eps must be between 0 and 1, got inf"),
    "eps NaN": ((X, 0.9), {"eps": float("nan")}, ValueError, "eps must be between 0 and 1, got nan"),
    "eps negative": ((X, 0.9), {"eps": -1.0}, ValueError, "eps must be between 0 and 1, got -1.0"),
    "device": (
        (X, torch.rand(4, device="meta")),
        {"channel_dim": 1},
        ValueError,
        "beta must be on x's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_message(case):
    args, kwargs, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        ctu(*args, **kwargs)


def test_inplace_where_a_gradient_is_needed_changes_nothing():
    x = torch.randn(5)
    before = x.clone()
    beta = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace=True would overwrite x, which the backward pass needs"):
        ctu(x, beta, inplace=True)
    with pytest.raises(ValueError, match="without overlapping elements"):
        ctu(torch.zeros(1).expand(5), 0.9, inplace=True)
    with pytest.raises(TypeError, match="residual must have x's dtype"):
        ctu(x.bfloat16(), 0.9, residual=x, inplace=True)
    assert torch.equal(x, before)


def test_backends():
    with (
        pytest.raises(ValueError, match=r"use_backend: name must be one of 'cpu', .*; got 'tpu'"),
        ctkernels.use_backend("tpu"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="'cpu' was forced but cannot serve this tensor: "),
        ctkernels.use_backend("cpu"),
    ):
        ctu(torch.empty(3, device="meta"), 0.9)
    text = ctkernels.explain(torch.randn(2, 3))
    assert "ctu on a float32 tensor of shape (2, 3) on cpu" in text
    assert "reference" in text
    assert "head_edit on a float32 tensor" in ctkernels.explain(torch.randn(2), "head_edit")
    with pytest.raises(ValueError, match=r"op must be one of .*'attention_head_edit'; got 'add'"):
        ctkernels.explain(torch.randn(2), "add")
    with ctkernels.use_backend("reference"):
        assert "forced: used" in ctkernels.explain(torch.randn(2))
    assert "meta" in ctkernels.explain(torch.empty(2, device="meta"))


@pytest.mark.parametrize("index", [[0, 3], [-1, 0]])
def test_an_index_past_the_rows_is_named(index):
    rows = torch.tensor(index)
    message = rf"index must lie in 0..2, got values from {min(index)} to {max(index)}"
    with pytest.raises(ValueError, match=f"head_edit: {message}"):
        head_edit(torch.randn(2, 5, 6), torch.randn(3, 2, 3), index=rows)
    with pytest.raises(ValueError, match=f"ctu: {message}"):
        ctu(torch.randn(2, 4), torch.rand(3, 4), torch.rand(3, 1), channel_dim=1, index=rows)
