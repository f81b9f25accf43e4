"""The sums over DeepSpeed's stages against small cases computed by hand, on an odd number of processes."""

import dataclasses
from collections.abc import Sequence

import pytest
from torch import nn

from engine.memory import Tensors, Zero, account, gathered_elements, partition
from engine.traced import Step

TENSORS = Tensors(groups=(((6, False), (4, False)), ((100, True), (30, True))), frozen=(8,), buffers=20, apart=12)
STEP = Step(2, [(500, 0), (400, 200), (10, 560)])


def cost(sizes: Sequence[int]) -> tuple[int, int]:
    """As Adam's: two float32 of states each, and one of the largest to work with."""
    return 8 * sum(sizes), 4 * max(sizes)


def test_what_a_method_is_made_of() -> None:
    class Linear(nn.Linear):
        pass

    method = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), Linear(5, 2), nn.BatchNorm2d(2))
    method[2].bias.requires_grad_(False)
    groups = [{"params": [method[1].weight, method[1].bias]}, {"params": [method[0].weight, method[2].weight]}]
    found = Tensors.of(method, groups, [nn.Linear(2, 2)])
    assert found.groups == (
        ((5, False), (5, False)),
        ((15, True), (10, False)),
    )  # a class of its own is not sent in half
    assert (found.frozen, found.buffers, found.apart, found.trained) == ((2,), 2 * 4 + 2 * 4 + 8, 24, 35)


def test_zero0_holds_everything_and_copies_the_gradients_once() -> None:
    found = account(TENSORS, Zero(0), 3, cost)
    assert (found.parameters, found.gradients, found.optimizer, found.other) == (560, 560, 1120, 32 + 20 + 12)
    held = 560 + 1120 + 64
    assert found.held + STEP.peak(found.while_made) == held + 600  # 400 activations with 200 bytes of gradients
    assert found.outside == held + 560 + 560  # gradients and their copy for the all-reduce; Adam needs less
    assert found.peak(STEP) == found.outside


def test_a_moving_average_is_a_second_network() -> None:
    plain, average = (account(TENSORS, Zero(0), 3, cost, ema=ema) for ema in (False, True))
    assert average.other - plain.other == average.peak(STEP) - plain.peak(STEP) == 4 * 148 + 20


def test_a_group_is_padded_to_twice_the_number_of_processes() -> None:
    assert [partition(n, 3) for n in (1, 6, 7, 10, 130)] == [2, 2, 4, 4, 44]
    assert [partition(n, 1) for n in (1, 2, 7)] == [2, 2, 8]


def test_zero1_has_a_second_copy_of_its_part_and_whole_gradients() -> None:
    found = account(TENSORS, Zero(1, bucket=110), 3, cost)
    mine = 4 * (4 + 44)
    whole = 4 * 3 * (4 + 44)
    assert (found.parameters, found.gradients, found.optimizer) == (whole + mine, 560, 2 * mine)
    held = whole + mine + 2 * mine + 64
    # Going back, 30 go through the bucket, then 100 + 4 + 6. The last process updates parts of 100, 4 and 30.
    bucket, kept = 4 * 110, 4 * (4 + 100 + 30)
    assert found.held + STEP.peak(found.while_made) == held + 400 + 200 + bucket
    assert found.outside == held + bucket + (560 - bucket) + kept


def test_zero2_keeps_gradients_of_its_part_only() -> None:
    found = account(TENSORS, Zero(2, bucket=110), 3, cost)
    held, bucket, kept = 4 * 3 * 48 + 3 * 4 * 48 + 64, 4 * 110, 4 * 134
    assert found.gradients == kept
    assert found.held + STEP.peak(found.while_made) == held + max(400 + bucket, 10 + bucket + 440 + kept)
    assert found.outside == held + bucket + 440 + kept
    twice = account(TENSORS, Zero(2, bucket=110), 3, cost, accumulation=2)
    assert twice.outside - found.outside == kept  # the sum of the parts before


def test_half_precision_has_a_bucket_of_its_own() -> None:
    found = account(TENSORS, Zero(2, half=True, bucket=110), 3, cost)
    # Linear's 30 and 100 in one, everything else in the other; each copied in float32, the first then halved.
    assert found.communication == 2 * 440 + 100 * (4 + 2)


def test_offload_leaves_weights_and_one_gradient_on_the_gpu() -> None:
    found = account(TENSORS, Zero(2, offload=True, bucket=110), 3, cost)
    mine = 4 * 48
    assert (found.optimizer, found.gradients, found.offload) == (0, 0, True)
    assert found.outside == 4 * 3 * 48 + 64 + 400 + 440 + 440
    assert found.host == 3 * mine + 2 * mine + 400 + 4 * 44


def test_zero3_shards_every_tensor_and_gathers_the_large_ones() -> None:
    zero = Zero(3, bucket=110, persistent=10, prefetch=0)
    found = account(TENSORS, zero, 3, cost)
    mine = 4 * ((2 + 2) + (34 + 10))  # 100 = 34 + 34 + 32
    assert (found.parameters, found.gradients, found.optimizer) == (2 * mine, mine, 2 * mine)
    other = 4 * 3 + 20 + 12  # of the 8 that are frozen 3 are here
    held = 5 * mine + other + 4 * (6 + 4 + 8) + 440
    gathered = 4 * (100 + 30)
    assert found.held + STEP.peak(found.while_made) == held + gathered + max(500, 400 + 440, 10 + 440)
    assert found.outside == held + 4 * 148 + 20  # a whole copy, while it is evaluated
    alone = account(TENSORS, zero, 1, cost)
    assert alone.held + STEP.peak(alone.while_made) == 5 * 560 + 4 * 8 + 20 + 12 + 440 + 840  # nothing is gathered


@pytest.mark.parametrize(
    ("reuse", "prefetch", "elements"),
    [(1_000_000, 0, 600), (200, 0, 100 + 300), (200, 150, 550), (0, 0, 300), (0, 1000, 600)],
)
def test_what_zero3_has_gathered_at_the_turn(reuse: int, prefetch: int, elements: int) -> None:
    zero = Zero(3, persistent=50, prefetch=prefetch, reuse=reuse)
    assert gathered_elements([300, 200, 100, 49, 1], zero) == elements


def test_more_processes_never_need_more() -> None:
    tensors = dataclasses.replace(TENSORS, groups=(((1000, True), (501, False)), ((77, False),)))
    for stage in range(4):
        zero = Zero(stage, bucket=500)
        needed = [account(tensors, zero, n, cost).parameters for n in (2, 3, 5, 7, 64)]
        assert needed == sorted(needed, reverse=True)


def test_deepspeeds_defaults_and_settings_are_read() -> None:
    assert Zero.of({"zero_optimization": {"stage": 0}}) == Zero(0)
    merged = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 7,
            "stage3_max_reuse_distance": 8,
            "stage3_prefetch_bucket_size": 9,
            "stage3_param_persistence_threshold": 10,
            "offload_optimizer": {"device": "cpu"},
        },
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    }
    assert Zero.of(merged) == Zero(3, offload=True, half=True, bucket=7, persistent=10, prefetch=9, reuse=8)
