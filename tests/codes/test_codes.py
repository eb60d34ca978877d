"""What every code promises: exact bytes, exact round trips, rows that agree with the whole."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes import (
    BlockRotated,
    Code,
    Codebook,
    ColumnStack,
    Dense,
    GroupInt,
    GroupLevels,
    LowRank,
    Permuted,
    Rotated,
    RowStack,
    Scaled,
    Signed,
    Sparse,
    Sum,
    Ternary,
    from_tensors,
)
from pliant.errors import CorruptError, PliantError
from tests.codes.forms import codes, group_int, integers

FORMS = {
    BlockRotated,
    Codebook,
    ColumnStack,
    Dense,
    GroupInt,
    GroupLevels,
    LowRank,
    Permuted,
    Rotated,
    RowStack,
    Scaled,
    Signed,
    Sparse,
    Sum,
    Ternary,
}


def test_every_form_is_registered_once() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS) == 15


@settings(max_examples=150, deadline=None)
@given(codes())
def test_disk_round_trip_is_exact_and_nbytes_counts_every_byte(code: Code) -> None:
    saved = safetensors.torch.save({k: t.contiguous() for k, t in code.tensors().items()})
    header = int.from_bytes(saved[:8], "little")
    assert code.nbytes == len(saved) - 8 - header
    again = from_tensors(json.loads(json.dumps(code.meta())), safetensors.torch.load(saved))
    assert type(again) is type(code)
    assert again.meta() == code.meta()
    assert again.shape == code.shape == tuple(code.decode().shape)
    assert again.tensors().keys() == code.tensors().keys()
    assert all(torch.equal(again.tensors()[k], t) for k, t in code.tensors().items())
    assert torch.equal(again.decode(), code.decode())
    assert code.bits == code.nbytes * 8 / (code.shape[0] * code.shape[1])


@settings(max_examples=150, deadline=None)
@given(codes(), st.data())
def test_rows_agree_with_decode(code: Code, data: st.DataObject) -> None:
    whole, out = code.decode(), code.shape[0]
    start, stop = sorted(data.draw(st.lists(st.integers(0, out), min_size=2, max_size=2)))
    step = data.draw(st.sampled_from([None, 2]))
    picked = data.draw(st.lists(st.integers(0, out - 1), max_size=9))
    for index in (slice(start, stop, step), torch.tensor(picked, dtype=torch.int64)):
        near = 1e-5 * max(1.0, float(whole.abs().max()) if whole.numel() else 1.0)
        torch.testing.assert_close(code.rows(index), whole[index], rtol=1e-5, atol=near)


@settings(max_examples=60, deadline=None)
@given(codes(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_decode_rounds_to_the_dtype_asked_for(code: Code, dtype: torch.dtype) -> None:
    decoded = code.decode(dtype)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, code.decode().to(dtype), rtol=1e-2, atol=1e-2)


@settings(max_examples=60, deadline=None)
@given(codes())
def test_writing_into_what_was_decoded_leaves_the_code_unchanged(code: Code) -> None:
    before = {key: tensor.clone() for key, tensor in code.tensors().items()}
    code.decode().zero_()
    code.decode(torch.bfloat16)
    assert all(torch.equal(before[key], tensor) for key, tensor in code.tensors().items())


@settings(max_examples=100, deadline=None)
@given(codes(), st.data())
def test_damaged_tensors_are_told(code: Code, data: st.DataObject) -> None:
    meta, tensors = code.meta(), dict(code.tensors())
    key = data.draw(st.sampled_from(sorted(tensors)))
    damage = data.draw(st.sampled_from(["missing", "dtype", "shape", "extra", "name"]))
    if damage == "missing":
        del tensors[key]
    elif damage == "dtype":
        tensors[key] = tensors[key].to(torch.float64)
    elif damage == "shape":
        tensors[key] = torch.cat([tensors[key].reshape(-1), tensors[key].new_zeros(1)])
    elif damage == "extra":
        tensors["stowaway"] = torch.zeros(1)
    else:
        meta["code"] = "no_such_form"
    with pytest.raises(CorruptError):
        from_tensors(meta, tensors)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"shape": [8]}, "shape"),
        ({"shape": [8, 61]}, "expected"),
        ({"zeros": 1}, "zeros"),
        ({"scale_bits": 11}, "scale_bits"),
    ],
)
def test_damaged_meta_is_told(change: dict, word: str) -> None:
    code = group_int(8, 60)
    with pytest.raises(CorruptError, match=word):
        from_tensors(code.meta() | change, code.tensors())


def test_indices_out_of_range_are_told() -> None:
    sparse = Sparse.from_dense(torch.eye(10))
    bad = sparse.tensors() | {"columns": torch.full((10,), 10, dtype=torch.uint8)}
    with pytest.raises(CorruptError, match="columns"):
        from_tensors(sparse.meta(), bad)
    permuted = Permuted.by(Dense(torch.randn(2, 5)), torch.randperm(5))
    bad = permuted.tensors() | {"order": torch.zeros(5, dtype=torch.uint8)}
    with pytest.raises(CorruptError, match="permutation"):
        from_tensors(permuted.meta(), bad)


def test_a_codes_dtype_and_device_are_kept_by_to() -> None:
    code = Sum((group_int(8, 60), Sparse.from_dense(torch.randn(8, 60), torch.eye(8, 60).bool())))
    moved = code.to("cpu")
    assert moved.device.type == "cpu"
    assert torch.equal(moved.decode(), code.decode())


def test_sparse_takes_the_smaller_layout_and_keeps_values_exactly() -> None:
    one = torch.zeros(1000, 300)
    one[7, 299] = 0.123
    code = Sparse.from_dense(one)
    assert code.layout == "rows"
    assert code.nbytes == 2 + 2 + 2
    assert code.decode()[7, 299] == torch.tensor(0.123).half().float()
    many = torch.randn(100, 200)
    code = Sparse.from_dense(many, torch.rand(100, 200) < 0.1)
    assert code.layout == "counts"
    assert code.nbytes == 3 * code.values.numel() + 100
    with pytest.raises(PliantError, match="one position"):
        Sparse.from_coordinates(torch.tensor([1, 1]), torch.tensor([2, 2]), torch.ones(2), (4, 4))


def test_sparse_empty_and_repeated_rows() -> None:
    empty = Sparse.from_dense(torch.zeros(5, 7))
    assert torch.equal(empty.decode(), torch.zeros(5, 7))
    assert empty.nbytes == 0
    matrix = torch.randn(6, 9).half().float()
    index = torch.tensor([3, 3, 0, 5])
    assert torch.equal(Sparse.from_dense(matrix).rows(index), matrix[index])


def test_codebook_shared_levels_count_once() -> None:
    index = integers(16, 12, 40)
    shared = Codebook.pack(index, torch.randn(1, 1, 16), 4)
    assert shared.nbytes == 12 * 20 + 32
    assert torch.equal(shared.indices(), index)
    assert torch.equal(shared.decode(), shared.levels.float()[0, 0][index.long()])


def test_permuted_places_columns() -> None:
    weight, order = torch.randn(4, 11), torch.randperm(11)
    assert torch.equal(Permuted.by(Dense(weight[:, order]), order).decode(), weight)


def test_rows_of_a_stack_without_looking_where_they_lie() -> None:
    """What a CUDA graph takes, where no place may be waited for."""
    stack = RowStack(tuple(Dense(torch.randn(rows, 5)) for rows in (3, 1, 4)))
    index = torch.tensor([7, 0, 3, 3, 2, 4])
    torch.testing.assert_close(
        stack._rows_of_all(index, torch.float64), stack.decode(torch.float64)[index]
    )
    assert torch.equal(stack._rows_of_all(index, torch.float32), stack.rows(index))


def test_low_rank_of_full_rank_restores() -> None:
    weight = torch.randn(9, 14)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    code = LowRank.from_factors(u * s, v, torch.float32)
    torch.testing.assert_close(code.decode(), weight, rtol=1e-4, atol=1e-5)


def test_mismatched_shapes_are_told() -> None:
    with pytest.raises(PliantError, match="shape"):
        Sum((Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2))))
    with pytest.raises(PliantError, match="width"):
        RowStack((Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2))))
    with pytest.raises(PliantError, match="multiply"):
        LowRank(Dense(torch.zeros(2, 3)), Dense(torch.zeros(2, 3)))
    with pytest.raises(PliantError, match="in_scale"):
        Scaled(Dense(torch.zeros(2, 3)), None, torch.zeros(2).half())
