"""Nearest rows against float64 over all of them, codes against numpy, and what the auto-encoder's codes find."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import one_line
from pipeline import UserError
from trainer.retrieval import codes, search
from trainer.retrieval.codes import principal
from trainer.retrieval.index import rounded, write_codes, write_meta
from trainer.retrieval.search import CODES, FEATURES, Index, Meta, exact, nearest, similar

Answer = tuple[np.ndarray, np.ndarray]


def brute(rows: np.ndarray, queries: np.ndarray, k: int) -> Answer:
    """In float64 over all rows; of equal distances the lower id first."""
    distances = np.array([((rows.astype(np.float64) - query) ** 2).sum(1) for query in queries.astype(np.float64)])
    ids = np.argsort(distances, 1, kind="stable")[:, :k]
    return ids, np.sqrt(np.take_along_axis(distances, ids, 1)).astype(np.float32)


def same(found: Answer, expected: Answer) -> None:
    assert [each.dtype for each in found] == [np.int64, np.float32]
    for each, right in zip(found, expected):
        np.testing.assert_array_equal(each, right)


def clusters(n: int, units: int, seed: int = 0) -> np.ndarray:
    """Rectified features about 20 centres, in 60 directions of which few count for much, as a network's are."""
    generator, falling = np.random.default_rng(seed), np.arange(1.0, 61)[:, None] ** -0.7
    directions = (np.random.default_rng(9).standard_normal((60, units)) * falling).astype(np.float32)
    centres = np.random.default_rng(8).standard_normal((20, 60)).astype(np.float32)
    inside = centres[generator.integers(20, size=n)] + 0.6 * generator.standard_normal((n, 60), np.float32)
    return np.maximum(inside @ directions + 0.1 * generator.standard_normal((n, units), np.float32), 0)


def bits_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(q, bytes), (n, bytes) → (q, n)."""
    return np.unpackbits(one[:, None] ^ other[None], axis=2).sum(2, dtype=np.int64)


def made(folder: Path, rows: np.ndarray, bits: int = 64) -> Index:
    """An index of any rows."""
    folder.mkdir()
    np.save(folder / FEATURES, rows)
    meta = Meta(7, "weights", "data", "train", "fc7", *rows.shape, bits, str(rows.dtype))
    write_codes(folder, meta, lambda what, done, whole: None)
    write_meta(folder, meta)
    return Index(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 6, 500])
def test_the_nearest_are_those_of_float64(dtype: type, k: int, monkeypatch: pytest.MonkeyPatch):
    rows, queries = clusters(230, 33).astype(dtype), clusters(9, 33, seed=1)
    rows[100:140] = rows[60:100]  # ties, on both sides of borders of chunks
    queries[:4] = rows[[0, 61, 101, 229]]
    for chunk in (1, 33 * 7, 33 * 64, 2**22):
        monkeypatch.setattr(search, "CHUNK", chunk)
        same(nearest(rows, queries, k), brute(rows, queries, k))


def test_rounding_in_float32_does_not_decide():
    generator = np.random.default_rng(2)
    rows = (300 + generator.integers(0, 3, (400, 64)) / 4).astype(np.float16)  # far from zero, close to each other
    queries = 300 + generator.standard_normal((20, 64)).astype(np.float32) / 8
    expected = brute(rows, queries, 6)
    x = torch.from_numpy(rows).float()
    naive = np.argsort((x.square().sum(1) - 2 * (torch.from_numpy(queries) @ x.T)).numpy(), 1, kind="stable")[:, :6]
    assert (naive != expected[0]).mean() > 0.3
    same(nearest(rows, queries, 6), expected)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_numbers_whose_squares_float32_does_not_hold(size: float):
    rows, queries = (clusters(50, 20) * np.float32(size)), clusters(3, 20, seed=1) * np.float32(size)
    same(nearest(rows, queries, 4), brute(rows, queries, 4))


def test_rows_that_are_all_equal_come_in_the_order_of_their_ids():
    ids, distances = nearest(np.ones((700, 5), np.float16), np.zeros((2, 5), np.float32), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert np.allclose(distances, np.sqrt(5))
    assert nearest(np.ones((3, 5), np.float16), np.zeros((0, 5), np.float32), 2)[0].shape == (0, 2)


@pytest.mark.parametrize(("n", "k"), [(5, 9), (300, 40), (70_000, 1000)])
def test_codes_that_differ_in_the_fewest_bits(n: int, k: int):
    generator = np.random.default_rng(3)
    stored, asked = (generator.integers(0, 8, (count, 5), np.uint8) for count in (n, 4))  # of 15 bits: many ties
    expected = np.argsort(bits_apart(asked, stored), 1, kind="stable")[:, :k]
    np.testing.assert_array_equal(Hamming(stored).nearest(asked, k), expected)


def test_two_stages_are_the_best_codes_and_then_the_nearest_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codes, "STEPS", 60)
    rows, queries = clusters(500, 40).astype(np.float16), clusters(12, 40, seed=1)
    rows[250:] = rows[:250]  # ties
    index = made(tmp_path / "index", rows)
    asked = index.encoder.codes(queries)
    differing = []
    for candidates in (6, 20, 900):
        found = similar(index, queries, 6, candidates)
        chosen = np.argsort(bits_apart(asked, np.load(tmp_path / "index" / CODES)), 1, kind="stable")[:, :candidates]
        for query, ids, *answer in zip(queries, np.sort(chosen, 1), *found):
            places, distances = brute(rows[ids], query[None], 6)
            same((answer[0], answer[1]), (ids[places[0]], distances[0]))
        differing.append(int((found[0] != exact(index, queries, 6)[0]).sum()))
    assert differing[0] > differing[1] >= differing[2] == 0  # with all rows as candidates the answer is the exact one
    same(exact(index, queries, 6), brute(rows, queries, 6))
    assert similar(index, queries, 50, 20)[0].shape == (12, 50)


def test_a_code_is_the_signs_of_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codes, "STEPS", 60)
    index = made(tmp_path / "index", clusters(300, 40), 32)
    up, bias, down, offset = (value.numpy() for value in vars(index.encoder).values())
    x = clusters(5000, 40, seed=1)
    inputs = x.astype(np.float64) @ up + bias
    found = np.unpackbits(index.encoder.codes(x), axis=1)
    clear = np.abs(inputs) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], (inputs > 0)[clear])
    expected = (2.0 * found - 1) @ down + offset
    np.testing.assert_allclose(index.encoder.decoded(index.encoder.codes(x)), expected, rtol=1e-4, atol=1e-4)
    again = AutoEncoder.from_bytes(index.encoder.to_bytes())
    np.testing.assert_array_equal(again.codes(x), index.encoder.codes(x))


def test_it_gives_back_what_it_has_learnt_and_finds_more_than_random_projections(tmp_path: Path):
    rows, queries = clusters(2000, 96), clusters(100, 96, seed=1)
    index = made(tmp_path / "index", rows, 32)
    lost = ((index.encoder.decoded(index.encoder.codes(queries)) - queries) ** 2).sum()
    assert lost < 0.6 * ((queries - rows.mean(0)) ** 2).sum()
    drawn = np.random.default_rng(4).standard_normal((96, 32))
    random = [np.packbits((x - rows.mean(0)) @ drawn > 0, axis=1) for x in (queries, rows)]
    true = brute(rows, queries, 6)[0]
    chosen = np.argsort(bits_apart(*random), 1, kind="stable")[:, :20]
    recall = measured(index, queries)
    assert recall
    assert (recall.queries, recall.nearest, recall.candidates) == (100, 6, 200)
    held = index.hamming.nearest(index.encoder.codes(queries), 200)
    assert recall.chosen == recall.found == np.mean([np.isin(*pair).mean() for pair in zip(true, held)])
    few = [[np.isin(*pair).mean() for pair in zip(true, each)] for each in (held[:, :20], chosen)]
    assert np.mean(few[0]) > np.mean(few[1]) + 0.1


def test_queries_that_are_rows_do_not_find_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = np.repeat(clusters(60, 16), 2, 0)  # each twice, so that a row is not told by its distance
    monkeypatch.setattr(codes, "STEPS", 60)
    index = made(tmp_path / "index", rows, 32)
    own = np.arange(0, 120, 10)
    recall = measured(index, rows[own], own)
    assert recall
    assert (recall.nearest, recall.candidates) == (6, 12)
    others = [np.delete(np.arange(120), number) for number in own]
    true = [each[brute(rows[each], rows[[number]], 6)[0][0]] for each, number in zip(others, own)]
    apart = bits_apart(index.encoder.codes(rows[own]), np.load(tmp_path / "index" / CODES))
    held = [each[np.argsort(differing[each], kind="stable")[:12]] for each, differing in zip(others, apart)]
    assert recall.chosen == recall.found == np.mean([np.isin(*pair).mean() for pair in zip(true, held)])
    assert recall.chosen < 1
    for n, nearest_rows in ((3, 2), (2, 1)):
        recall = measured(made(tmp_path / f"index{n}", rows[::2][:n], 32), rows[::2][:n], np.arange(n))
        assert recall
        assert (recall.nearest, recall.chosen, recall.found) == (nearest_rows, 1.0, 1.0)
    assert measured(made(tmp_path / "index1", rows[:1], 32), rows[:1], np.zeros(1, np.int64)) is None


@pytest.mark.parametrize(("n", "units", "bits"), [(1, 7, 32), (3, 1, 40), (100, 32, 256), (40, 300, 128)])
def test_any_rows_have_codes(n: int, units: int, bits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codes, "STEPS", 60)
    equal, constant = np.full((n, units), 3.0, np.float32), clusters(n, units)
    constant[:, ::2] = 5
    for rows in (equal, np.zeros_like(equal), constant):
        encoder = learnt(torch.from_numpy(rows), bits)
        assert all(bool(value.isfinite().all()) for value in vars(encoder).values())
        assert encoder.codes(rows).shape == (n, bits // 8)
        again = learnt(torch.from_numpy(rows), bits)
        assert again.to_bytes() == encoder.to_bytes()
    decoded = learnt(torch.from_numpy(equal), bits).decoded(encoder.codes(equal))
    np.testing.assert_allclose(decoded, equal, rtol=1e-5)


def test_it_begins_with_the_principal_components():
    x = torch.from_numpy(clusters(400, 96))
    x -= x.mean(0)
    found = principal(x, 20, torch.Generator().manual_seed(0)).double().numpy()
    np.testing.assert_allclose(found.T @ found, np.eye(20), atol=1e-5)
    most = (np.linalg.svd(x.double().numpy(), compute_uv=False)[:20] ** 2).sum()
    assert ((x.double().numpy() @ found) ** 2).sum() > 0.999 * most


def test_it_learns_from_a_sample_of_many():
    assert sample(300).tolist() == list(range(300))
    chosen = sample(3 * codes.SAMPLE)
    assert len(chosen) == codes.SAMPLE
    assert (np.diff(chosen) > 0).all()
    assert 2.9 * codes.SAMPLE < chosen[-1] < 3 * codes.SAMPLE


def test_float16_that_is_too_small_says_so():
    assert rounded(np.array([65504.0], np.float32), np.dtype(np.float16)).tolist() == [65504.0]
    with pytest.raises(UserError) as caught:
        rounded(np.array([1.0, -70000.0], np.float32), np.dtype(np.float16))
    one_line(caught, "70,000", "65,504", "--float32")
    assert rounded(np.array([70000.0], np.float32), np.dtype(np.float32)).tolist() == [70000.0]


def test_features_stay_on_disk(tmp_path: Path):
    shape, path = (10**7, 4096), tmp_path / FEATURES
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        at = file.tell()
        file.truncate(at + 2 * 4096 * 10**7)  # 82 GB of holes
        for number in (3, 9_999_999):
            file.seek(at + 2 * 4096 * number)
            file.write(np.full(4096, number % 1000, np.float16).tobytes())
    rows = Rows(path, shape, np.dtype(np.float16))
    assert type(rows.mapped) is np.memmap
    assert not rows.mapped.flags.writeable
    assert rows.gathered(np.array([9_999_999, 3, 4, 3]))[:, 5].tolist() == [999, 3, 0, 3]
    with open(path, "r+b") as file:
        file.truncate(at + 2 * 4096 * 10**7 - 1)
    for lying in ((shape, np.dtype(np.float16)), ((5, 5), np.dtype(np.float16)), (shape, np.dtype(np.float32))):
        with pytest.raises(UserError) as caught:
            Rows(path, *lying)
        one_line(caught, str(path), "damaged")
