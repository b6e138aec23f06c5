"""Parameter counts added up by hand from the papers' layer tables, against the counts that the entries state.

The contract test compares the entries with the modules; together, the three agree.
"""

from __future__ import annotations

import itertools

import pytest

from robench.catalog import find


def conv(size: int, inputs: int, outputs: int, *, bias: bool = True) -> int:
    return size * size * inputs * outputs + (outputs if bias else 0)


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def batch_norm(channels: int) -> int:
    return 2 * channels


def basic_stage(blocks: int, inputs: int, outputs: int) -> int:
    """Blocks of two 3x3 convolutions; a 1x1 convolution with batch norm where the width changes."""
    first = conv(3, inputs, outputs, bias=False) + conv(3, outputs, outputs, bias=False) + 2 * batch_norm(outputs)
    other = 2 * conv(3, outputs, outputs, bias=False) + 2 * batch_norm(outputs)
    shortcut = conv(1, inputs, outputs, bias=False) + batch_norm(outputs) if inputs != outputs else 0
    return first + shortcut + (blocks - 1) * other


def wide_stage(blocks: int, inputs: int, outputs: int, *, shortcut: bool = True) -> int:
    """The first batch norm has the input's width; the shortcut is a bare 1x1 convolution."""
    first = batch_norm(inputs) + conv(3, inputs, outputs, bias=False)
    first += batch_norm(outputs) + conv(3, outputs, outputs, bias=False)
    other = 2 * (batch_norm(outputs) + conv(3, outputs, outputs, bias=False))
    return first + (conv(1, inputs, outputs, bias=False) if shortcut else 0) + (blocks - 1) * other


def wide(blocks: int, width: int, *, shortcut: bool = True) -> int:
    widths = [16, 16 * width, 32 * width, 64 * width]
    stages = sum(wide_stage(blocks, i, o, shortcut=shortcut) for i, o in itertools.pairwise(widths))
    return conv(3, 3, 16, bias=False) + stages + batch_norm(widths[3]) + dense(widths[3], 10)


def bottleneck_stage(blocks: int, inputs: int, width: int) -> int:
    """1x1, 3x3, 1x1 convolutions to four times the width, with batch norms; one shortcut."""
    outputs = 4 * width
    inner = conv(3, width, width, bias=False) + conv(1, width, outputs, bias=False)
    norms = 2 * batch_norm(width) + batch_norm(outputs)
    first = conv(1, inputs, width, bias=False) + conv(1, inputs, outputs, bias=False) + batch_norm(outputs)
    return first + (blocks - 1) * conv(1, outputs, width, bias=False) + blocks * (inner + norms)


def four_stages(blocks: tuple[int, int, int, int]) -> int:
    stem = conv(3, 3, 64, bias=False) + batch_norm(64)
    stages = zip(blocks, (64, 64, 128, 256), (64, 128, 256, 512), strict=True)
    return stem + sum(basic_stage(*stage) for stage in stages) + dense(512, 10)


BY_HAND = {
    # 28 -> 26 -> 24 -> 12 -> 10 -> 8 -> 4
    "small_cnn": conv(3, 1, 32) + conv(3, 32, 32) + conv(3, 32, 64) + conv(3, 64, 64)
    + dense(64 * 4 * 4, 200) + dense(200, 200) + dense(200, 10),
    "sgr_cnn_mnist": conv(3, 1, 32) + conv(3, 32, 32) + conv(3, 32, 64) + conv(3, 64, 64)
    + dense(64 * 4 * 4, 200) + dense(200, 200) + dense(200, 10),
    # 32 -> 30 -> 28 -> 14 -> 12 -> 10 -> 5
    "sgr_cnn_cifar10": conv(3, 3, 64) + conv(3, 64, 64) + conv(3, 64, 128) + conv(3, 128, 128)
    + dense(128 * 5 * 5, 256) + dense(256, 256) + dense(256, 10),
    # 28 -> 14 -> 7
    "lenet5": conv(5, 1, 32) + conv(5, 32, 64) + dense(64 * 7 * 7, 1024) + dense(1024, 10),
    "mlp_4x1024": dense(784, 1024) + 3 * dense(1024, 1024) + dense(1024, 10),
    "emr_cnn_half": conv(5, 3, 16) + conv(5, 16, 32) + conv(3, 32, 64) + conv(3, 64, 64) + dense(64, 10),
    "emr_cnn": conv(5, 3, 32) + conv(5, 32, 64) + conv(3, 64, 128) + conv(3, 128, 128) + dense(128, 10),
    "digits_cnn": conv(3, 1, 16) + conv(3, 16, 32) + conv(3, 32, 32) + dense(32 * 4 * 4, 32) + dense(32, 10),
    "resnet20": conv(3, 3, 16, bias=False) + batch_norm(16) + basic_stage(3, 16, 16) + basic_stage(3, 16, 32)
    + basic_stage(3, 32, 64) + dense(64, 10),
    "resnet18": four_stages((2, 2, 2, 2)),
    "resnet34": four_stages((3, 4, 6, 3)),
    # Batch norms without scale and shift: a bias is all they leave.
    "resnet34_555": conv(3, 3, 16) + 10 * conv(3, 16, 16) + conv(1, 16, 32) + 10 * conv(3, 32, 32)
    + conv(1, 32, 64) + 10 * conv(3, 64, 64) + dense(64, 10),
    "resnet10_111": conv(3, 3, 16) + 2 * conv(3, 16, 16) + conv(1, 16, 32) + 2 * conv(3, 32, 32)
    + conv(1, 32, 64) + 2 * conv(3, 64, 64) + dense(64, 10),
    "wrn_28_4": wide(4, 4),
    "wrn_28_10": wide(4, 10),
    "wrn_34_10": wide(5, 10),
    "wrn_34_10_madry": wide(5, 10, shortcut=False),
    "resnet50": conv(7, 3, 64, bias=False) + batch_norm(64) + bottleneck_stage(3, 64, 64)
    + bottleneck_stage(4, 256, 128) + bottleneck_stage(6, 512, 256) + bottleneck_stage(3, 1024, 512)
    + dense(2048, 1000),
}  # fmt: skip

#: As printed by the authors, by torchvision, or in wide use.
PRINTED = {
    "small_cnn": 312_202,
    "lenet5": 3_274_634,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 25_557_032,
    "wrn_28_10": 36_479_194,
    "wrn_34_10": 46_160_474,
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_the_entry_states_the_count_added_up_by_hand(name: str) -> None:
    assert find("architectures", name).facts["parameter_counts"][name] == BY_HAND[name]


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_the_sum_is_the_printed_count(name: str) -> None:
    assert BY_HAND[name] == PRINTED[name]


def test_the_unused_block_of_trades_explains_its_larger_file() -> None:
    assert wide(5, 10) + wide_stage(5, 16, 160) == 48_262_586
