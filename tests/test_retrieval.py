"""Nearest rows against float64 over all of them, codes against numpy, and what the auto-encoder's codes find."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from trainer.retrieval import codes, search
from trainer.retrieval.codes import learn
from trainer.retrieval.index import write_codes, write_meta
from trainer.retrieval.search import (
    CODES,
    ENCODER,
    FEATURES,
    FILES,
    META,
    BadIndex,
    Index,
    Meta,
    binary_index,
    nearest,
    recall,
    similar,
)  # fmt: skip

Answer = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "STEPS", 60)


def brute(rows: np.ndarray, queries: np.ndarray, k: int) -> Answer:
    """In float64 over all rows; of equal distances the lower id first."""
    distances = np.array([((rows.astype(np.float64) - query) ** 2).sum(1) for query in queries.astype(np.float64)])
    ids = np.argsort(distances, 1, kind="stable")[:, :k]
    return ids, np.sqrt(np.take_along_axis(distances, ids, 1))


def same(answer: Answer, expected: Answer) -> None:
    assert [part.dtype for part in answer] == [np.int64, np.float64]
    np.testing.assert_array_equal(answer[0], expected[0])
    np.testing.assert_allclose(answer[1], expected[1], rtol=1e-6)


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
    write_codes(folder, meta, lambda stage, done, total: None)
    write_meta(folder, meta)
    return Index(folder)


@pytest.mark.parametrize("k", [1, 6, 500])
def test_the_nearest_are_those_of_float64(k: int, monkeypatch: pytest.MonkeyPatch):
    rows, queries = clusters(230, 33).astype(np.float16), clusters(9, 33, seed=1)
    rows[100:140] = rows[60:100]  # ties, on both sides of borders of chunks
    queries[:4] = rows[[0, 61, 101, 229]]
    for chunk in (1, 33 * 7, 33 * 64, 2**22):
        monkeypatch.setattr(search, "CHUNK", chunk)
        same(nearest(rows, queries, k), brute(rows, queries, k))


def test_rounding_in_float32_does_not_decide_and_a_row_is_at_no_distance_from_itself():
    generator = np.random.default_rng(2)
    rows = (300 + generator.integers(0, 3, (400, 64)) / 4).astype(np.float16)  # far from zero, close to each other
    queries = 300 + generator.standard_normal((20, 64)).astype(np.float32) / 8
    queries[0] = rows[17]
    expected = brute(rows, queries, 6)
    x = torch.from_numpy(rows).float()
    naive = np.argsort((x.square().sum(1) - 2 * (torch.from_numpy(queries) @ x.T)).numpy(), 1, kind="stable")[:, :6]
    assert (naive != expected[0]).mean() > 0.3
    same(nearest(rows, queries, 6), expected)
    assert expected[1][0, 0] == 0


@pytest.mark.parametrize("greatest", [3e38, 1e-30])
def test_distances_and_squares_that_float32_does_not_hold(greatest: float):
    rows = clusters(53, 20)
    rows *= np.float32(greatest / rows.max())
    same(nearest(rows[:50], -rows[50:], 4), brute(rows[:50], -rows[50:], 4))


def test_rows_that_are_all_equal_come_in_the_order_of_their_ids():
    assert nearest(np.ones((700, 5), np.float16), np.zeros((2, 5), np.float32), 3)[0].tolist() == [[0, 1, 2]] * 2
    assert nearest(np.ones((3, 5), np.float16), np.zeros((0, 5), np.float32), 2)[0].shape == (0, 2)


@pytest.mark.parametrize(("n", "k"), [(5, 5), (70_000, 1000)])
def test_codes_that_differ_in_the_fewest_bits(n: int, k: int):
    generator = np.random.default_rng(3)
    stored, asked = (generator.integers(0, 8, (count, 5), np.uint8) for count in (n, 4))  # of 15 bits: many ties
    expected = np.argsort(bits_apart(asked, stored), 1, kind="stable")[:, :k]
    np.testing.assert_array_equal(binary_index(stored).search(asked, k)[1], expected)


def test_two_stages_are_the_best_codes_and_then_the_nearest_of_them(tmp_path: Path):
    rows, queries = clusters(500, 40).astype(np.float16), clusters(12, 40, seed=1)
    rows[250:] = rows[:250]  # ties
    index = made(tmp_path / "index", rows)
    asked = index.encoder.codes(queries)
    differing = []
    for candidates in (6, 20, 900):
        ids, distances = similar(index, queries, 6, candidates)
        chosen = np.argsort(bits_apart(asked, np.load(tmp_path / "index" / CODES)), 1, kind="stable")[:, :candidates]
        for i, positions in enumerate(np.sort(chosen, 1)):
            best, expected = brute(rows[positions], queries[i : i + 1], 6)
            same((ids[i], distances[i]), (positions[best[0]], expected[0]))
        differing.append(int((ids != brute(rows, queries, 6)[0]).sum()))
    assert differing[0] > differing[1] >= differing[2] == 0  # with all rows as candidates the answer is the exact one
    assert similar(index, queries, 50, 20)[0].shape == (12, 50)


def test_it_gives_back_what_it_has_learnt_and_finds_more_than_random_projections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(codes, "STEPS", 300)
    rows, queries = clusters(2000, 96), clusters(100, 96, seed=1)
    index = made(tmp_path / "index", rows, 32)
    signs = 2.0 * np.unpackbits(index.encoder.codes(queries), axis=1) - 1
    decoded = signs @ index.encoder.down.numpy() + index.encoder.offset.numpy()
    assert ((decoded - queries) ** 2).sum() < 0.6 * ((queries - rows.mean(0)) ** 2).sum()
    drawn = np.random.default_rng(4).standard_normal((96, 32))
    random = [np.packbits((x - rows.mean(0)) @ drawn > 0, axis=1) for x in (queries, rows)]
    true = brute(rows, queries, 6)[0]
    chosen = np.argsort(bits_apart(*random), 1, kind="stable")[:, :20]
    held = index.binary.search(index.encoder.codes(queries), 200)[1]
    share = f"{100 * np.mean([np.isin(*pair).mean() for pair in zip(true, held)]):.1f}"
    text = f"100 queries: of the 6 nearest, the nearest 200 codes hold {share} %, the answer {share} %\nby codes "
    assert recall(index, queries).startswith(text)
    few = [[np.isin(*pair).mean() for pair in zip(true, ids)] for ids in (held[:, :20], chosen)]
    assert np.mean(few[0]) > np.mean(few[1]) + 0.1


def test_queries_that_are_rows_do_not_find_themselves(tmp_path: Path):
    rows = np.repeat(clusters(60, 16), 2, 0)  # each twice, so that no row is known by its distance
    index = made(tmp_path / "index", rows, 32)
    own = np.arange(0, 120, 10)
    others = [np.delete(np.arange(120), number) for number in own]
    true = [ids[brute(rows[ids], rows[[number]], 6)[0][0]] for ids, number in zip(others, own)]
    apart = bits_apart(index.encoder.codes(rows[own]), np.load(tmp_path / "index" / CODES))
    held = [ids[np.argsort(differing[ids], kind="stable")[:12]] for ids, differing in zip(others, apart)]
    share = f"{100 * np.mean([np.isin(*pair).mean() for pair in zip(true, held)]):.1f}"
    assert share != "100.0"
    text = f"12 queries: of the 6 nearest, the nearest 12 codes hold {share} %, the answer {share} %\n"
    assert recall(index, rows[own], own).startswith(text)
    assert recall(made(tmp_path / "index1", rows[:1], 32), rows[:1], np.zeros(1, np.int64)) == ""


@pytest.mark.parametrize(("n", "units", "bits"), [(1, 7, 32), (3, 1, 40), (40, 300, 128)])
def test_any_rows_have_codes(n: int, units: int, bits: int):
    equal, constant = np.full((n, units), 3.0, np.float32), clusters(n, units)
    constant[:, ::2] = 5
    for rows in (equal, np.zeros_like(equal), constant):
        encoder, again = (learn(torch.from_numpy(rows), bits) for _ in range(2))
        assert encoder.codes(rows).shape == (n, bits // 8)
        for name, value in vars(encoder).items():
            assert bool(value.isfinite().all())
            assert torch.equal(getattr(again, name), value)


def test_features_stay_on_disk(tmp_path: Path):
    """Of an index of 8 GB of holes, rows are looked up."""
    index, shape = made(tmp_path / "index", np.zeros((2, 4096), np.float16)), (10**6, 4096)
    np.save(index.folder / CODES, np.zeros((10**6, 8), np.uint8))
    with open(index.folder / FEATURES, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        start = file.tell()
        file.truncate(start + 2 * 4096 * 10**6)
        file.seek(start + 2 * 4096 * 999_999)
        file.write(np.full(4096, 999, np.float16).tobytes())
    write_meta(index.folder, Meta(7, "weights", "data", "train", "fc7", *shape, 64, "float16"))
    rows = Index(index.folder).rows
    assert type(rows) is np.memmap
    assert not rows.flags.writeable
    assert rows[[999_999, 3]][:, 5].tolist() == [999, 0]


LAYERS = {"up": torch.zeros(16, 32), "bias": torch.zeros(32), "down": torch.zeros(32, 16), "offset": torch.zeros(16)}


@pytest.mark.parametrize(
    ("meta", "file", "content", "words"),
    [
        ({"n": 2**40}, "", None, "features.npy: damaged (not float32 of shape (1099511627776, 16)"),
        ({"n": 0}, "", None, "index.json: damaged, or of another version (n: expected int >= 1)"),
        ({"n": 6}, "", None, "features.npy: damaged (not float32 of shape (6, 16)"),
        ({"units": 8, "n": 24}, "", None, "features.npy: damaged (not float32 of shape (24, 8)"),
        ({"units": "x"}, "", None, "(units: expected int, got str)"),
        ({"dtype": "object"}, "", None, "(dtype: invalid enum value 'object')"),
        ({"bits": 33}, "", None, "(bits: expected int that's a multiple of 8)"),
        ({"bits": 64}, "", None, "not |u1 of shape (12, 8) in 96"),
        ({"step": -1}, "", None, "(step: expected int >= 0)"),
        ({}, CODES, np.zeros((12, 4), np.int8), "|i1 of shape (12, 4) in 48 bytes, not |u1 of shape (12, 4) in 48"),
        ({}, CODES, np.zeros((12, 4), object), "damaged ("),
        ({}, CODES, b"", "damaged ("),
        ({}, FEATURES, np.zeros((16, 12), np.float32), "features.npy: damaged (not float32 of shape (12, 16)"),
        (
            {},
            FEATURES,
            np.zeros((12, 16), np.float32).T.copy().T,
            "features.npy: damaged (not float32 of shape (12, 16)",
        ),
        (
            {},
            ENCODER,
            save(LAYERS | {"up": torch.zeros(32, 16)}),
            "not the layers of an auto-encoder of 16 units and 32 bits",
        ),
        ({}, ENCODER, save(LAYERS | {"up": torch.zeros(16, 32).double()}), "not the layers of"),
        ({}, ENCODER, save(LAYERS | {"more": torch.zeros(1)}), "not the layers of"),
        ({}, ENCODER, b"x" * 100, "damaged ("),
    ],
)
def test_an_index_that_lies_under_right_digests(
    tmp_path: Path, meta: dict[str, Any], file: str, content: np.ndarray | bytes | None, words: str
):
    rows = clusters(12, 16)
    index = made(tmp_path / "index", rows, 32)
    if isinstance(content, np.ndarray):
        np.save(index.folder / file, content, allow_pickle=True)
    elif content is not None:
        (index.folder / file).write_bytes(content)
    write_meta(index.folder, replace(index.meta, **meta))
    with pytest.raises(BadIndex) as refusal:
        Index(index.folder)
    assert words in str(refusal.value)
    assert re.fullmatch(rf"{index.folder}\b.*; make it again: python -m trainer index --force", str(refusal.value))


@pytest.mark.parametrize("name", [META, *FILES])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str):
    index = made(tmp_path / "index", clusters(12, 16), 32)
    (index.folder / name).unlink()
    os.mkfifo(index.folder / name)
    with pytest.raises((BadIndex, OSError), match="not a regular file"):
        Index(index.folder)
