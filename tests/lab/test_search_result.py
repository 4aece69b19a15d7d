"""What the result of a search says, and how sure it is."""

import pytest
import torch

from ctkernels.lab import BetaSearch, Comparison, plot, verdict
from ctkernels.lab.stats import sign_test

pytest.importorskip("sklearn", reason="the laboratory needs scikit-learn")
pytest.importorskip("tqdm", reason="the laboratory needs tqdm")


def test_uncertainty():
    found = Comparison(both=50, only_plain=2, only_steered=8, neither=40)
    assert found.samples == 100
    assert (found.plain, found.steered) == (0.52, 0.58)
    assert found.gain == 0.06
    differences = torch.tensor([1.0] * 8 + [-1.0] * 2 + [0.0] * 90, dtype=torch.float64)
    assert found.standard_error == pytest.approx(differences.std(correction=0).item() / 10)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 0) == 1.0
    assert 0 < sign_test(40_000, 41_000) < 0.001


def made(chosen, comparison):
    return BetaSearch(
        betas=(0.8, 0.9, 1.0),
        val_accuracy=(0.5, 0.7, 0.6),
        plain_val_accuracy=0.6,
        plain_is_beta_1=True,
        chosen=chosen,
        test=Comparison(*comparison),
        sites=("act",),
        missed=(),
        arguments={},
        sizes={"val": 50},
        feature_layer="output of x",
        converged=(True, True, True),
        seconds={},
    )


def test_the_sentence_says_what_was_shown():
    assert "no beta did better than the plain network in validation" in made(1.0, (60, 0, 0, 40)).verdict()
    assert (
        made(0.9, (50, 5, 7, 38))
        .verdict()
        .startswith("No difference beyond chance was shown: beta = 0.9 scored 57.0 %")
    )
    assert made(0.9, (50, 20, 2, 28)).verdict().startswith("Steering hurt here")
    helped = made(0.9, (50, 2, 20, 28))
    assert helped.verdict().startswith("Steering helped here")
    both = verdict([helped, made(1.0, (70, 0, 0, 30))])
    assert "the 2 draws gave +18.0, +0.0, 1 of them keeping the plain network" in both
    assert "on 200 test images" in both
    assert both.startswith("Steering helped on average, but not in every draw: ")
    assert verdict([helped, helped]).startswith("Steering helped here: ")
    assert "did not help" in verdict([made(1.0, (70, 0, 0, 30))] * 2)


def test_table():
    lines = made(0.9, (50, 2, 20, 28)).table().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0.8", "0.9", "1"]
    assert lines[2].endswith("← chosen")
    assert lines[3].endswith("(plain network)")


@pytest.mark.parametrize("count", [1, 3])
def test_picture(tmp_path, count):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    results = [made(0.9, (50, 2, 20, 28)), made(1.0, (70, 0, 0, 30)), made(0.8, (50, 2, 20, 28))][:count]
    plot(results if count > 1 else results[0], tmp_path / "a.png", title="a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="one or more searches over one grid"):
        plot([], tmp_path / "b.png")
