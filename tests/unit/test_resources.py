"""Resource plans: how a cluster is divided, and which plans are refused because they would wait for ever."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipflow_ray.config import PoolConfig, validated
from clipflow_ray.data.resources import Cluster, Resources, ScoringPlan, check_reading, plan_scoring, plan_training
from clipflow_ray.errors import ConfigError, ResourceError
from tests.autoscaling import adds

AUTO = PoolConfig()


def cpus(*counts: int) -> list[Resources]:
    return [{"CPU": float(count)} for count in counts]


def plan(
    nodes: Sequence[Resources],
    rows: int = 10_000,
    resumed: bool = False,
    can_add: Callable[[Sequence[Resources]], bool] | None = None,
    **pool: Any,
) -> ScoringPlan:
    return plan_scoring(rows, 32, validated(PoolConfig, pool), resumed, Cluster(nodes, can_add))


def numbers(planned: ScoringPlan) -> tuple[int, int, float, int | None]:
    """Encoders, CPUs and GPUs of each, and decoders of a plan whose pool keeps its size."""
    assert planned.fewest == planned.initial == planned.most
    return planned.most, planned.encoder_cpus, planned.encoder_gpus, planned.decoders


@pytest.mark.parametrize(
    ("rows", "counts", "encoders", "encoder_cpus", "decoders"),
    [
        (10_000, [2], 1, 1, 1),
        (10_000, [3], 1, 1, 2),
        (10_000, [4], 1, 2, 2),
        (10_000, [1, 1, 1], 1, 1, 2),
        (10_000, [4, 2], 1, 4, 2),
        (10_000, [64], 14, 4, 14),
        (10_000, [16, 16], 6, 4, 14),
        (10_000, [2] * 10, 9, 2, 2),
        (10_000, [0, 8], 2, 3, 2),
        (65, [64], 3, 4, 102),
        (0, [8], 1, 3, 8),
    ],
)
def test_encoders_get_up_to_four_cpus_each_limited_by_readers_and_rows(
    rows: int, counts: list[int], encoders: int, encoder_cpus: int, decoders: int
) -> None:
    assert numbers(plan(cpus(*counts), rows)) == (encoders, encoder_cpus, 0, decoders)


@pytest.mark.parametrize(
    ("nodes", "pool", "expected"),
    [
        ([{"CPU": 8, "GPU": 2}], {}, (2, 0, 1, 14)),
        ([{"CPU": 8}, {"CPU": 0, "GPU": 1}], {}, (1, 0, 1, 14)),
        ([{"CPU": 0}, {"CPU": 2, "GPU": 1}], {}, (1, 0, 1, 2)),
        ([{"CPU": 8, "GPU": 2}], {"gpus_per_encoder": 0.3}, (6, 0, 0.3, 14)),
        ([{"CPU": 8, "GPU": 2}], {"gpus_per_encoder": 0.6}, (2, 0, 0.6, 14)),
        ([{"CPU": 8, "GPU": 3}, {"GPU": 1}], {"gpus_per_encoder": 2}, (1, 0, 2, 14)),
        ([{"CPU": 8, "GPU": 2}], {"gpus_per_encoder": 0}, (2, 3, 0, 2)),
        ([{"CPU": 8, "GPU": 4}], {"encoders": 3, "decoders": 5}, (3, 0, 1, 5)),
        (
            [{"CPU": 8, "GPU": 4}, {"GPU": 2, "accelerator_type:L4": 1}],
            {"accelerator_type": "L4"},
            (2, 0, 1, 14),
        ),
    ],
)
def test_each_gpu_or_share_of_one_gets_an_encoder_that_leaves_all_cpus_to_decoding(
    nodes: list[Resources], pool: dict[str, Any], expected: tuple[int, int, float, int]
) -> None:
    assert numbers(plan(nodes, **pool)) == expected


@pytest.mark.parametrize(
    ("nodes", "resumed", "pool", "reason"),
    [
        (cpus(1), False, {}, "1 logical CPUs on its 1 nodes"),
        (cpus(2), True, {}, "to read and to resume"),
        (cpus(1, 1), True, {}, "2 nodes"),
        (cpus(0), False, {}, "0 logical CPUs"),
        ([{"CPU": 0, "GPU": 1}], False, {}, "1 CPU to read"),
        ([{"CPU": 1, "GPU": 1}], True, {}, "2 CPU to read and to resume"),
        (cpus(3, 3), False, {"encoders": 7}, "7 encoders"),
        ([{"CPU": 8, "GPU": 2}], False, {"encoders": "3-8"}, "3 encoders with 1 GPU each"),
        ([{"CPU": 8, "GPU": 2}], False, {"gpus_per_encoder": 4}, "4 GPU each"),
        (cpus(8), False, {"gpus_per_encoder": 1}, "0 GPUs"),
        (
            [{"CPU": 8, "GPU": 2, "accelerator_type:L4": 1}],
            False,
            {"accelerator_type": "A100"},
            "accelerator_type:A100",
        ),
    ],
)
def test_a_plan_that_would_wait_for_ever_is_refused(
    nodes: list[Resources], resumed: bool, pool: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ResourceError, match=reason):
        plan(nodes, resumed=resumed, **pool)


def hangs(counts: tuple[int, ...], each: int, encoders: int, resumed: bool) -> bool:
    """Whether Ray can place the filter and the encoders so that an encoder or the reader never gets its CPUs."""

    @cache
    def stuck(free: tuple[int, ...], left: int) -> bool:
        if not left:
            return max(free) < 1
        places = [at for at, count in enumerate(free) if count >= each]
        after = [tuple(n - each * (at == to) for at, n in enumerate(free)) for to in places]
        return not after or any(stuck(state, left - 1) for state in after)

    if not resumed:
        return stuck(counts, encoders)
    starts = [tuple(n - (at == to) for at, n in enumerate(counts)) for to, count in enumerate(counts) if count]
    return not starts or any(stuck(start, encoders) for start in starts)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    st.integers(1, 4),
    st.booleans(),
)
def test_exactly_the_plans_that_would_wait_for_ever_are_refused(
    counts: tuple[int, ...], encoders: int, resumed: bool
) -> None:
    try:
        planned = plan(cpus(*counts), resumed=resumed, encoders=encoders)
    except ResourceError:
        assert hangs(counts, 1, encoders, resumed)
    else:
        assert not hangs(counts, planned.encoder_cpus, encoders, resumed)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6).map(tuple), st.booleans(), st.integers(0, 5000))
def test_a_pool_of_automatic_size_fits_and_can_be_resumed_if_the_cluster_has_three_cpus(
    counts: tuple[int, ...], resumed: bool, rows: int
) -> None:
    if sum(counts) < 2 + resumed:
        with pytest.raises(ResourceError):
            plan(cpus(*counts), rows, resumed)
        return
    planned = plan(cpus(*counts), rows, resumed)
    taken = planned.most * planned.encoder_cpus
    assert sum(count // planned.encoder_cpus for count in counts) >= planned.most
    assert sum(counts) - taken >= 1 + (sum(counts) > 2)


GPU_NODES = ({"CPU": 8, "GPU": 1}, 8)
CPU_NODES = ({"CPU": 8}, 20)


@pytest.mark.parametrize(
    ("nodes", "groups", "pool", "expected"),
    [
        # No GPU lives, and the configuration has some: they are asked for.
        (cpus(0), [GPU_NODES], {}, (1, 1, 313, 0, 1)),
        (cpus(0, 8), [GPU_NODES, CPU_NODES], {}, (1, 1, 313, 0, 1)),
        (cpus(0, 8), [GPU_NODES, CPU_NODES], {"encoders": "2-8"}, (2, 2, 8, 0, 1)),
        # Those that live are used at once.
        ([{"CPU": 8, "GPU": 4}], [GPU_NODES], {}, (1, 4, 313, 0, 1)),
        ([{"CPU": 8, "GPU": 4}], [GPU_NODES], {"encoders": "1-2"}, (1, 2, 2, 0, 1)),
        # The configuration has no GPU, or none are wanted.
        (cpus(0, 8), [CPU_NODES], {}, (1, 2, 313, 3, 0)),
        (cpus(0), [CPU_NODES], {}, (1, 1, 313, 4, 0)),
        (cpus(0), [({"CPU": 2}, 20)], {}, (1, 1, 313, 2, 0)),
        (cpus(0, 16), [GPU_NODES, CPU_NODES], {"gpus_per_encoder": 0}, (1, 3, 313, 4, 0)),
    ],
)
def test_with_an_autoscaler_the_pool_follows_what_the_cluster_can_become(
    nodes: list[Resources],
    groups: list[tuple[Resources, int]],
    pool: dict[str, Any],
    expected: tuple[int, int, int, int, float],
) -> None:
    planned = plan(nodes, can_add=adds(groups), **pool)
    assert expected == (
        planned.fewest,
        planned.initial,
        planned.most,
        planned.encoder_cpus,
        planned.encoder_gpus,
    )
    assert planned.decoders is None


@pytest.mark.parametrize("pool", [{"encoders": 9}, {"gpus_per_encoder": 2}, {"accelerator_type": "A100"}])
def test_what_the_autoscaler_cannot_add_is_refused(pool: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="autoscaler cannot add"):
        plan(cpus(0), can_add=adds([GPU_NODES, CPU_NODES]), **({"gpus_per_encoder": 1} | pool))


def test_a_cluster_on_which_no_task_would_start_is_refused_before_the_input_is_listed() -> None:
    check_reading(Cluster(cpus(0, 1)))
    check_reading(Cluster(cpus(0), adds([CPU_NODES])))
    with pytest.raises(ResourceError, match="no logical CPU on its 2 nodes"):
        check_reading(Cluster([{"CPU": 0}, {"GPU": 1}]))
    with pytest.raises(ResourceError, match="can add none"):
        check_reading(Cluster(cpus(0), adds([({"GPU": 1}, 2)])))


def test_an_autoscaler_is_not_asked_for_what_lives() -> None:
    asked: list[Sequence[Resources]] = []

    def can_add(bundles: Sequence[Resources]) -> bool:
        asked.append(bundles)
        return True

    plan([{"CPU": 8, "GPU": 1}], can_add=can_add)
    assert asked == []
    plan(cpus(8), can_add=can_add)
    assert asked[0] == [{"GPU": 1.0}, {"CPU": 1.0}]


@pytest.mark.parametrize(
    ("nodes", "groups", "workers", "expected"),
    [
        (cpus(2, 1), None, 3, {"CPU": 1}),
        ([{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 2}], None, 2, {"CPU": 1, "GPU": 1}),
        (cpus(0), [GPU_NODES], 8, {"CPU": 1, "GPU": 1}),
        (cpus(0), [CPU_NODES], 8, {"CPU": 1}),
        (cpus(2), None, 3, None),
        ([{"CPU": 8}, {"CPU": 0, "GPU": 1}], None, 1, None),
        (cpus(0), [GPU_NODES], 9, None),
    ],
)
def test_all_training_workers_fit_at_once_each_on_one_node(
    nodes: list[Resources], groups: list[tuple[Resources, int]] | None, workers: int, expected: Resources | None
) -> None:
    cluster = Cluster(nodes, adds(groups) if groups else None)
    if expected is not None:
        assert plan_training(workers, cluster) == expected
        return
    with pytest.raises(ResourceError, match="training workers"):
        plan_training(workers, cluster)


@pytest.mark.parametrize(
    ("given_as", "read_as"),
    [("auto", "auto"), ("4", (4, 4)), (4, (4, 4)), ("1-8", (1, 8)), ([1, 8], (1, 8)), ((2, 2), (2, 2))],
)
def test_the_number_of_encoders_is_one_number_or_two(given_as: Any, read_as: Any) -> None:
    pool = validated(PoolConfig, {"encoders": given_as})
    assert pool.encoders == read_as
    assert PoolConfig.model_validate_json(pool.model_dump_json()) == pool


@pytest.mark.parametrize(
    "wrong",
    [
        {"encoders": "0"},
        {"encoders": "8-1"},
        {"encoders": "many"},
        {"gpus_per_encoder": -1},
        {"gpus_per_encoder": 1.5},
        {"gpus_per_encoder": 0, "accelerator_type": "A100"},
        {"decoders": 0},
    ],
)
def test_a_wrong_pool_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validated(PoolConfig, wrong)


def test_words_of_flags_are_numbers() -> None:
    assert validated(PoolConfig, {"gpus_per_encoder": "0.5", "decoders": "4"}) == PoolConfig(
        gpus_per_encoder=0.5, decoders=4
    )
    assert validated(PoolConfig, {"gpus_per_encoder": "auto", "decoders": "auto"}) == AUTO
