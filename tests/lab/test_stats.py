"""Statistics: what a choice by validation goes by."""

import random

import pytest

from ctkernels.lab.stats import beyond, exceeds, folds_for, preferred, share_error, standard_error, what_counts


def right(count, of=100, first=0):
    return [int(first <= i < first + count) for i in range(of)]


def test_the_simplest_is_kept_unless_another_is_better_beyond_the_margin():
    assert preferred([right(50), right(51)]) == 0  # one more answer right is one standard error
    assert preferred([right(50), right(52)]) == 1
    assert preferred([right(50), right(52)], margin=2.0) == 0
    assert preferred([right(50), right(51)], margin=0.0) == 1
    assert preferred([right(50), right(50, first=50)], margin=0.0) == 0
    # 20 answers lost for 25 others is noise
    assert preferred([right(50), right(40), right(55, first=20)]) == 0
    assert preferred([right(40), right(58), right(59)]) == 1  # of two that are much better, the simpler
    assert preferred([[0.5]]) == 0


@pytest.mark.parametrize("n", [3, 7, 18, 48, 90, 240, 1999])
def test_one_more_answer_is_never_beyond_one_standard_error(n):
    """Whichever way the rounding goes."""
    for count in range(0, n, max(1, n // 10)):
        assert preferred([right(count, n), right(count + 1, n)]) == 0
    if n > 3:
        assert preferred([right(0, n), right(2, n)]) == 1


def test_choices_among_equals_keep_the_simplest_about_as_often_as_one_standard_error_says():
    """Of two networks that are equally good the other is chosen in 16 % of draws, one tail of a normal distribution."""
    draw = random.Random(0)
    others = 0
    for _ in range(1000):
        a, b = ([int(draw.random() < 0.7) for _ in range(100)] for _ in range(2))
        others += preferred([a, b])
    assert abs(others - 159) < 4 * (1000 * 0.159 * 0.841) ** 0.5  # four deviations of the count


def test_folds():
    assert [folds_for(v, 4 * v) for v in (1, 40, 48, 67, 100, 199, 200, 5000)] == [5, 5, 5, 3, 2, 2, 1, 1]
    assert folds_for(50, 25) == 1  # all would have to be validated on
    assert folds_for(0, 10) == 1


def test_what_counts_is_said_with_its_numbers():
    said = what_counts(240, 300, 5)
    assert said.startswith("240 validation examples in 5 folds: the plain network is kept unless another is better")
    assert "by more than one standard error (2.0 points where a tenth of the answers differ)" in said
    assert "On 300 test examples a difference counts from about 3.7 points on" in said
    assert "points where" not in what_counts(240, 300, margin=0.0)
    assert (beyond(0), beyond(1), beyond(1.5)) == (
        "",
        " by more than one standard error",
        " by more than 1.5 standard errors",
    )


def test_errors():
    assert share_error(0.5, 100) == 0.05
    assert share_error(1.0, 100) == 0.0
    # a tenth of the answers differ, evenly: what_counts is the standard error of such differences, less a hundredth
    differences = [1.0] * 12 + [-1.0] * 12 + [0.0] * 216
    assert standard_error(differences) == pytest.approx((0.1 / 240) ** 0.5, rel=0.01)
    assert not exceeds(0.1, 0.1, 1.0)
    assert exceeds(0.1, 0.0, 1.0)
