"""Event steps, times and clocks against brute force; T5, T7."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from increlora.decide.schedules import GrowthSteps, Run, in_steps, linear_clock, ramp_clock
from increlora.errors import ScheduleError
from tests.reference import naive

REPEATABLE = settings(derandomize=True, deadline=None)  # a run never fails by chance


@pytest.mark.parametrize(("warmup", "interval", "expected"), [
    (100, 100, [200, 300, 400]), (5, 5, [10, 15, 20]), (0, 5, [5, 10, 15]), (7, 5, [10, 15, 20]), (10, 5, [15, 20, 25]),
])  # fmt: skip
def test_t5_event_steps(warmup: int, interval: int, expected: list[int]) -> None:
    growth = GrowthSteps(warmup, interval)
    assert [g for g in range(expected[-1] + 1) if growth.due(g)] == expected


@given(warmup=st.integers(0, 30), interval=st.integers(1, 13), step=st.integers(0, 60), length=st.integers(0, 60))
@settings(REPEATABLE)
def test_growth_steps_equal_brute_force(warmup: int, interval: int, step: int, length: int) -> None:
    growth = GrowthSteps(warmup, interval)
    events = naive.event_steps(warmup, interval, 200)
    assert growth.due(step) == (step in events)
    assert growth.next(step) == min(e for e in events if e >= step)
    assert growth.count(step, step + length) == len([e for e in events if step <= e < step + length])


def test_no_events_in_an_interval_that_runs_backwards() -> None:
    assert GrowthSteps(0, 5).count(20, 10) == 0


@pytest.mark.parametrize(("time", "steps", "expected"), [
    (0, None, 0), (7, None, 7), (300, 100, 300), (0.0, 100, 0), (0.05, 100, 5), (1.0, 100, 100), (1, 100, 1),
    (0.03, 101, 3), (0.5, 3, 2), (0.25, 1, 0),
])  # fmt: skip
def test_a_time_is_steps_or_a_share_of_the_run(time, steps, expected: int) -> None:
    assert in_steps(time, Run(steps), name="warmup_steps") == expected


@pytest.mark.parametrize("time", [0, 0.0, 0.001])
def test_a_time_has_a_least_value(time) -> None:
    assert in_steps(time, Run(100), name="interval_steps", least=1) == 1
    assert in_steps(12, Run(100), name="interval_steps", least=1) == 12


@pytest.mark.parametrize("time", [-1, -0.1, 1.01, 2.0, True, False])
def test_a_time_out_of_range_is_named(time) -> None:
    with pytest.raises(ScheduleError, match=rf"warmup_steps={time!r}"):
        in_steps(time, Run(100), name="warmup_steps")


def test_a_share_of_an_unknown_run_names_the_three_remedies() -> None:
    with pytest.raises(ScheduleError) as caught:
        in_steps(0.05, Run(None), name="warmup_steps")
    for part in ("warmup_steps=0.05", "`total_steps`", "increlora.attach", "Trainer"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("created", "step", "factor"), [
    (-1, 0, 0.0), (-1, 1, 0.2), (-1, 5, 1.0), (-1, 32, 28 / 55), (-1, 59, 1 / 55), (10, 11, 0.0), (10, 12, 0.2),
    (10, 16, 1.0), (10, 59, 1 / 44), (10, 10, 1.0), (56, 59, 0.4),
])  # fmt: skip
def test_t7_learning_rate(created: int, step: int, factor: float) -> None:
    assert linear_clock(step, created, warmup=5, total=60) == pytest.approx(factor, rel=1e-14, abs=0)


@given(created=st.integers(-1, 70), after=st.integers(0, 80), warmup=st.integers(0, 20), total=st.integers(1, 70))
@settings(REPEATABLE)
def test_linear_clock_equals_its_twin(created: int, after: int, warmup: int, total: int) -> None:
    step = max(0, created + after)
    factor = linear_clock(step, created, warmup=warmup, total=total)
    assert factor == naive.linear_clock(step, created, warmup, total)
    assert factor >= 0


def test_linear_clock_before_its_tensor_exists() -> None:
    assert [linear_clock(step, 7, warmup=5, total=60) for step in (0, 3, 7)] == [1.0, 1.0, 1.0]


def test_all_linear_clocks_end_together() -> None:
    assert [linear_clock(60, created, warmup=5, total=60) for created in (-1, 0, 10, 40)] == [0.0] * 4


def test_ramp_clock() -> None:
    ramp = [ramp_clock(step, 10, warmup=4) for step in range(9, 17)]
    assert ramp == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@given(step=st.integers(0, 100), created=st.integers(-1, 100), warmup=st.integers(0, 20))
@settings(REPEATABLE)
def test_ramp_clock_is_a_share_of_the_hosts_rate(step: int, created: int, warmup: int) -> None:
    share = ramp_clock(step, created, warmup=warmup)
    since = step - created
    if created == -1 or warmup == 0 or since >= warmup:
        assert share == 1.0
    else:
        assert share == (since / warmup if since > 0 else 0.0)
