"""Error rates against plain numpy: drawn probabilities with many ties, few classes, and classes without images."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

from trainer.evaluate import Confusion, Evaluation, Tally, top_k_errors

SEEDS = range(40)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,), of which one class in three has none, and probabilities (n, classes) of few different values, as
    many zero."""
    random = np.random.default_rng(seed)
    classes, n = 2 + seed % 11, int(random.integers(1, 60))
    weights = random.integers(0, 1 + random.integers(1, 5), (n, classes))
    weights[weights.sum(1) == 0] = 1
    with_images = np.flatnonzero(np.arange(classes) % 3 != 2)
    return random.choice(with_images, n), weights / weights.sum(1, keepdims=True)


def by_ranks(labels: np.ndarray, chances: np.ndarray, k: int) -> np.ndarray:
    """(n,): the share of the places that the true class could have, were level ones put in any order, which are not
    among the first k."""
    errors = []
    for label, row in zip(labels, chances):
        before = sum(value > row[label] for value in row)
        level = sum(value == row[label] for value in row)
        errors.append(np.mean([before + place >= k for place in range(level)]))
    return np.array(errors)


def expected(labels: np.ndarray, chances: np.ndarray) -> tuple[int, float, float, float]:
    """Images, top-1 and top-5 error in percent, and nats, of which one image has 708 at most: no logarithm of 0."""
    true = np.maximum(chances[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
    return len(labels), *(100 * by_ranks(labels, chances, k).mean() for k in (1, 5)), -np.log(true).mean()


def tallied(labels: np.ndarray, chances: np.ndarray, batch: int) -> Tally:
    tally = Tally(chances.shape[1])
    for start in range(0, len(labels) + batch, batch):  # the last one is empty
        tally.add(*(torch.from_numpy(array[start : start + batch]) for array in (labels, chances)))
    return tally


@pytest.mark.parametrize("seed", SEEDS)
def test_errors_and_nats_are_those_of_numpy(seed: int):
    labels, chances = drawn(seed)
    for batch in (1, 7, 100):
        tally = tallied(labels, chances, batch)
        assert astuple(tally.whole()) == pytest.approx(expected(labels, chances), abs=1e-10)
        assert len(tally.by_class()) == chances.shape[1]
        for label, found in enumerate(tally.by_class()):
            own = labels == label
            if own.any():
                assert found is not None
                assert astuple(found) == pytest.approx(expected(labels[own], chances[own]), abs=1e-10)
            else:
                assert found is None


def test_what_is_drawn_has_ties_wrong_ones_and_zeros():
    """Else the test above would prove little."""
    found = np.concatenate([by_ranks(*drawn(seed), k) for seed in SEEDS for k in (1, 5)])
    assert {0.0, 0.5, 1.0} <= set(found)
    assert len(set(found)) > 12
    assert any((chances[np.arange(len(labels)), labels] == 0).any() for labels, chances in map(drawn, SEEDS))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_whole_is_the_mean_of_the_classes_by_their_images(seed: int):
    tally = tallied(*drawn(seed), batch=16)
    classes = np.array([astuple(found) for found in tally.by_class() if found])
    assert tally.whole().samples == classes[:, 0].sum()
    mean = (classes[:, 1:] * classes[:, :1]).sum(0) / classes[:, 0].sum()
    assert astuple(tally.whole())[1:] == pytest.approx(mean, abs=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_errors_of_any_k(k: int):
    for seed in SEEDS:
        labels, chances = drawn(seed)
        found = top_k_errors(torch.from_numpy(chances), torch.from_numpy(labels), k).numpy()
        np.testing.assert_allclose(found, by_ranks(labels, chances, k), atol=1e-12)


def test_the_rule_of_2012_by_hand():
    """Wrong where k classes or more are strictly larger; of those that are level, each has its part of what is left."""
    chances = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2], [0.7, 0.1, 0.2, 0.0]], dtype=torch.float64)
    for k, errors in ((1, [3 / 4, 1, 1]), (2, [1 / 2, 2 / 3, 1]), (3, [1 / 4, 1 / 3, 0]), (4, [0, 0, 0])):
        assert top_k_errors(chances, torch.tensor([3, 1, 1]), k).tolist() == pytest.approx(errors)


@pytest.mark.parametrize("seed", SEEDS)
def test_confused_pairs_are_those_of_a_confusion_matrix(seed: int):
    """The most frequent first, then by label; of classes that are level the first one counts as predicted."""
    labels, chances = drawn(seed)
    matrix = np.zeros((chances.shape[1],) * 2, int)
    np.add.at(matrix, (labels, chances.argmax(1)), 1)
    images = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix.ravel(), kind="stable")
    pairs = [divmod(int(place), len(matrix)) for place in order if matrix.ravel()[place]]
    known = [
        Confusion(true, other, matrix[true, other], 100 * matrix[true, other] / images[true]) for true, other in pairs
    ]
    for batch in (1, 100):
        tally = tallied(labels, chances, batch)
        for most in (0, 1, 3, 1000):
            found = tally.confused(most)
            assert [astuple(pair) for pair in found] == [pytest.approx(astuple(pair)) for pair in known[:most]]


def test_without_images_every_class_is_empty():
    tally = Tally(3)
    tally.add(torch.zeros(0, dtype=torch.int64), torch.zeros((0, 3), dtype=torch.float64))
    assert tally.by_class() == [None, None, None]
    assert tally.confused(9) == []


def test_an_evaluation_is_plain_json():
    assert Evaluation(3, 50.0, 12.5, 0.5).to_dict() == {
        "samples": 3,
        "top1_error": 50.0,
        "top5_error": 12.5,
        "nll": 0.5,
    }
