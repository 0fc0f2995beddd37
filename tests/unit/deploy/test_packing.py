"""Codes to bytes and back, at every width."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ricciq.deploy.packing import pack, unpack
from ricciq.quant.codebook import Codebook
from ricciq.quant.grid import UniformGrid

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, "ternary"]
widths = pytest.mark.parametrize("bits", WIDTHS)
# How many codes each plane puts into a byte.
CODES_A_BYTE = {
    1: [8],
    2: [4],
    3: [4, 8],
    4: [2],
    5: [2, 8],
    6: [2, 4],
    7: [2, 4, 8],
    8: [1],
    "ternary": [5],
}


def expected_bytes(bits, count: int) -> int:
    return sum(-(-count // per_byte) for per_byte in CODES_A_BYTE[bits])


def codes_of(bits) -> torch.Tensor:
    grid = UniformGrid.for_weights(bits)
    return torch.arange(grid.low, grid.high + 1, grid.step)


@widths
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_unpacking_undoes_packing(bits, data):
    every = codes_of(bits)
    indices = data.draw(st.lists(st.integers(0, len(every) - 1), max_size=70))
    codes = every[indices]
    planes = pack(codes, bits)
    unpacked = unpack(planes, len(codes))
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked, codes.to(torch.int32))
    assert sum(len(plane.data) for plane in planes) == expected_bytes(bits, len(codes))


@widths
def test_every_code_survives_in_every_place_of_a_byte(bits):
    every = codes_of(bits)
    for count in range(1, 18):
        for shift in range(count):
            codes = every.repeat(1 + count)[shift : shift + count]
            assert torch.equal(unpack(pack(codes, bits), count), codes.to(torch.int32))


@widths
def test_planes_are_bytes_and_tables_of_256_rows(bits):
    planes = pack(codes_of(bits).repeat(3), bits)
    assert [plane.table.shape for plane in planes] == [(256, n) for n in CODES_A_BYTE[bits]]
    assert all(plane.data.dtype == torch.uint8 for plane in planes)
    assert all(plane.table.dtype == torch.int32 for plane in planes)


def test_the_first_code_takes_the_lowest_bits():
    (plane,) = pack(torch.tensor([-2, 1, 0, -1]), 2)
    assert plane.data.tolist() == [0b01_10_11_00]


def test_any_shape_and_integer_type_is_packed_in_order():
    codes = torch.tensor([[[1, -1], [0, 1]], [[-1, 0], [1, 1]]], dtype=torch.int8)
    planes = pack(codes, "ternary")
    assert unpack(planes, 8).tolist() == codes.flatten().tolist()


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        (1, 0),
        (1, 2),
        (1, 3),
        (1, -3),
        (2, 2),
        (2, -3),
        (3, 4),
        (4, -9),
        (5, 16),
        (6, 32),
        (7, -65),
        (8, -128),
        (8, 128),
        ("ternary", 2),
        ("ternary", -2),
    ],
)
def test_a_code_off_the_grid_is_refused(bits, code):
    good = codes_of(bits)[0]
    with pytest.raises(ValueError, match="outside the grid"):
        pack(torch.tensor([good, code, good]), bits)


@pytest.mark.parametrize(
    ("bits", "codes"),
    [(1, [-50, 3]), (2, [-64, -9, 0, 50]), (2, [-4, 7, 7, 9]), ("ternary", [-2, 0, 64])],
)
def test_codes_of_a_codebook(bits, codes):
    every = torch.tensor(codes)
    drawn = every[torch.randint(len(codes), (3, 37), generator=torch.Generator().manual_seed(0))]
    planes = pack(drawn, bits, Codebook(every.float()))
    assert len(planes) == 1
    assert torch.equal(unpack(planes, drawn.numel()).view_as(drawn), drawn.int())


def test_what_a_codebook_does_not_hold_is_refused():
    book = Codebook(torch.tensor([-4.0, -1.0, 0.0, 7.0]))
    with pytest.raises(ValueError, match="cannot be packed at 2 bits"):
        pack(torch.tensor([-4, 1]), 2, book)
    with pytest.raises(ValueError, match="cannot be packed at 3 bits"):
        pack(torch.tensor([-4, 7]), 3, book)
