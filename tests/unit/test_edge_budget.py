"""What fits into a device's memory."""

from __future__ import annotations

from typing import cast

import pytest

from isthmus.edge import budget
from isthmus.edge.device import Device
from isthmus.engine.part import KvConfig
from isthmus.protocol.errors import DeviceError
from isthmus.split.bundle import Bundle
from tests.edge_world import ToyBundle
from tests.toy_part import CONFIG

SIZES = budget.PartSizes(5_000_000, 1_000_000, (10_000_000,) * CONFIG.n_layers)
KV = KvConfig(max_tokens=100)


def test_kv_is_counted_in_whole_blocks() -> None:
    # 112 positions x K and V x 1 head x 4 wide x 2 bytes
    assert budget.kv_bytes(CONFIG, 3, KV) == 3 * 112 * 2 * 4 * 2
    assert budget.kv_bytes(CONFIG, 3, KvConfig("f32", 100)) == 3 * 112 * 2 * 4 * 4


def test_the_head_counts_with_the_last_layer() -> None:
    assert SIZES.weights_bytes(5) == 55_000_000
    assert SIZES.weights_bytes(6) == 66_000_000


@pytest.mark.parametrize("end", range(1, CONFIG.n_layers + 1))
def test_exactly_what_is_needed_fits(end: int) -> None:
    need = budget.needed_bytes(SIZES, CONFIG, KV, end)
    assert budget.layers_that_fit(SIZES, CONFIG, KV, need / budget.MB) == end
    assert budget.layers_that_fit(SIZES, CONFIG, KV, (need - 1) / budget.MB) == end - 1


def test_sizes_come_from_file_names() -> None:
    files = {"weights/embed.safetensors": 1, "weights/norm.safetensors": 2, "weights/head.safetensors": 4}
    sizes = budget.PartSizes.from_files(2, files | {f"weights/layer-{i:03d}.safetensors": 8 + i for i in range(2)})
    assert sizes == budget.PartSizes(1, 6, (8, 9))


def test_the_refusal_names_what_fits() -> None:
    room = budget.OVERHEAD_BYTES / budget.MB + 5 + 31
    bundle = cast(Bundle, ToyBundle())
    with pytest.raises(DeviceError, match=r"whole model.*136 MB.*3 of 6 layers fit: .*cut up to 3"):
        Device(bundle, mode="local", memory_mb=room)
    with pytest.raises(DeviceError, match=r"layers \[0, 4\) need"):
        Device(bundle, "tcp://127.0.0.1:1", encrypted=False, mode="split", cut=4, memory_mb=room)
    with pytest.raises(DeviceError, match="no layer fits"):
        Device(bundle, mode="local", memory_mb=20)
