"""How pages lie: which are packed, how wide they become, and where a number goes."""

import numpy as np
import pytest

from tlt_jax.pallas_kernels.verify_attention import page_layout


@pytest.mark.parametrize(
    ("name", "page_size", "head_dim", "packing"),
    [
        (None, 64, 64, 1),
        ("triton_gpu", 64, 64, 1),
        ("mosaic_tpu", 128, 64, 1),
        ("mosaic_tpu", 16, 128, 1),
        ("mosaic_tpu", 64, 64, 2),
        ("mosaic_tpu", 16, 80, 8),
        ("mosaic_tpu", 48, 64, 1),
    ],
)
def test_pages_that_fill_no_lanes_are_packed(name, page_size, head_dim, packing):
    assert page_layout.packing(name, page_size, head_dim) == packing


def test_features_are_padded_to_whole_rows():
    sizes = [(80, 1), (80, 4), (80, 8), (64, 2), (64, 8)]
    assert [page_layout.padded(*size) for size in sizes] == [80, 96, 128, 64, 64]


def test_a_feature_stands_behind_those_before_it():
    pages = np.arange(3 * 8 * 4).reshape(3, 8, 4)
    packed = page_layout.pack(pages, 2)
    assert packed.shape == (3, 4, 8)
    np.testing.assert_array_equal(packed[1, 3, :4], pages[1, 6])
    np.testing.assert_array_equal(packed[1, 3, 4:], pages[1, 7])
    np.testing.assert_array_equal(page_layout.unpack(packed, 2), pages)
