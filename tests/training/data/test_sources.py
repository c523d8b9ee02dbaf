"""Where data comes from: a place that can't be opened is one sentence."""

import pytest

from training.data.errors import DataError
from training.data.pickapic.source import find


@pytest.mark.parametrize("url", ["nowhere://folder", "http://[::1"])
def test_a_source_of_an_unknown_kind_is_named(url):
    with pytest.raises(DataError, match="Can't read") as raised:
        find(url, "*.parquet", 1 << 20)
    assert url in str(raised.value) and "\n" not in str(raised.value)
