"""Timing layers and chains in a runtime: each a tiny network of its own, all of them called in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import prod, sqrt

import torch

from passes.geometry import Geometry
from surgery.cost import threads_set
from surgery.cost.calls import Call, check_installed
from surgery.cost.chains import RUNTIMES, Setup
from surgery.cost.profile import Entry, TimedShape
from surgery.progress import tracked

__all__ = ["describe", "in_terms_of_layers", "time_shapes"]

REFERENCE = Geometry(in_channels=64, out_channels=64, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), output_padding=(0, 0))
REFERENCE_INPUT = (1, 64, 28, 28)
TOGETHER = 40  # networks called in turn; that many keep each other's weights out of the caches, as the layers of a network do
WEIGHTS_TOGETHER = 60_000_000
INPUTS_TOGETHER = 200_000_000  # numbers; what comes out of the layers takes as much again, and more in training
ROUNDS = (5, 25)
FEWEST_ROUNDS = 3  # where even the least number of rounds takes twice as long as it may
SLOW_SECONDS = 5e-3  # calls that take longer are not repeated before they count
GROUP_SECONDS = 4.0  # no further rounds are begun after this long
TOTAL_SECONDS = 240.0  # in all; the later groups get what the earlier ones have left
SURE = 0.015  # standard error, as a share of the time, at which no further rounds are needed
SAMPLE_SECONDS = 2e-4  # shorter calls are repeated


def time_shapes(shapes: Sequence[TimedShape], setup: Setup) -> tuple[dict[str, Entry], float]:
    """Times of these shapes by key, and of the reference layer beside them.

    Calls go in turn, one of each shape a round, so that other work on the machine falls on all alike, and weights come from where they come from in
    a network. Each time is taken relative to the reference layer, which is called again and again in between, and the median of the ratios counts.
    On a slow or busy machine there are fewer rounds, and the spread says so.

    Raises:
        MissingExtra: the runtime is not installed.
        SurgeryError: the runtime refuses a shape.
    """
    from statistics import median

    check_installed(setup.runtime)
    found: dict[str, Entry] = {}
    with threads_set(setup.threads), torch.no_grad():
        reference_shape = TimedShape((REFERENCE,), REFERENCE_INPUT)
        reference = _prepared(reference_shape, setup)
        typical = _loops_and_time(reference)[1]
        references: list[float] = []
        groups, began = list(_groups(shapes)), time.perf_counter()
        for number, group in enumerate(tracked(groups, f"timing {len(shapes)} shapes in {setup.runtime}")):
            left = max(TOTAL_SECONDS - (time.perf_counter() - began), 0.0)
            calls = [_prepared(shape, setup) for shape in group]
            entries, seen = _in_turn(calls, reference, _pause(setup), min(GROUP_SECONDS, left / (len(groups) - number)))
            references += seen
            found |= {shape.key: entry for shape, entry in zip(group, entries, strict=True)}
            del calls  # before the next group takes its memory
        base = median(references) if references else typical
    return {key: Entry(entry.seconds * base, entry.spread) for key, entry in found.items()}, base


def in_terms_of_layers(call: Call, shapes: Sequence[TimedShape], setup: Setup) -> float:
    """How many times as long a call takes as these layers together (each as often as it is named), all of them timed in turn."""
    often = {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}
    with threads_set(setup.threads), torch.no_grad():
        calls = [call, *(_prepared(shape, setup) for shape in often)]
        entries, _ = _in_turn(calls, _prepared(TimedShape((REFERENCE,), REFERENCE_INPUT), setup), _pause(setup))
    return entries[0].seconds / sum(n * entry.seconds for n, entry in zip(often.values(), entries[1:], strict=True))


def describe(setup: Setup) -> dict[str, str]:
    """What tells the devices of profiles apart."""
    from surgery.benchmark import environment

    runtime = setup.runtime
    known = environment([runtime])
    version = known.get(runtime, known["torch"])
    place = torch.cuda.get_device_name(setup.device) if setup.device.startswith("cuda") and torch.cuda.is_available() else setup.device
    return {
        "runtime": f"{runtime} {version}",
        "processor": known["processor"],
        "system": known["system"],
        "device": place,
        "threads": str(setup.threads),
    }


def _groups(shapes: Sequence[TimedShape]) -> Iterator[list[TimedShape]]:
    group: list[TimedShape] = []
    for shape in dict.fromkeys(shapes):
        weights, inputs = sum(s.weights for s in (*group, shape)), sum(prod(s.input_shape) for s in (*group, shape))
        if group and (len(group) == TOGETHER or weights > WEIGHTS_TOGETHER or inputs > INPUTS_TOGETHER):
            yield group
            group = []
        group.append(shape)
    if group:
        yield group


def _pause(setup: Setup) -> float:
    """Seconds between two calls: worker threads of one network stop spinning before the next one needs the cores."""
    return 0.002 if setup.threads > 1 and setup.runtime == "openvino" else 0.0


def _in_turn(calls: Sequence[Call], reference: Call, pause: float, seconds: float = GROUP_SECONDS) -> tuple[list[Entry], list[float]]:
    """Times relative to the reference's, and those of the reference in seconds; after so many seconds as few rounds as may be."""
    from statistics import median

    loops = [_loops_and_time(call)[0] for call in calls]
    often = _loops_and_time(reference)[0]
    ratios: list[list[float]] = [[] for _ in calls]
    seen: list[float] = []
    began = time.perf_counter()
    for number in range(ROUNDS[1]):
        beside = _sample(reference, often, pause)
        seen.append(beside)
        for start in range(0, len(calls), 8):
            times = [_sample(call, n, pause) for call, n in zip(calls[start : start + 8], loops[start : start + 8], strict=True)]
            following = _sample(reference, often, pause)
            seen.append(following)
            for index, mine in enumerate(times):
                ratios[start + index].append(2 * mine / (beside + following))
            beside = following
        taken = time.perf_counter() - began
        if number + 1 >= ROUNDS[0] and (taken > seconds or all(_standard_error(values) < SURE for values in ratios)):
            break
        if number + 1 >= FEWEST_ROUNDS and taken > 2 * seconds:
            break
    return [Entry(median(values), _standard_error(values)) for values in ratios], seen


def _standard_error(values: Sequence[float]) -> float:
    """Of the median, as a share of it, by the quartiles: 1.253 standard deviations / sqrt(n), one of which is 0.741 of the distance between them."""
    from statistics import quantiles

    low, middle, high = quantiles(values, n=4)
    return 0.93 * (high - low) / middle / sqrt(len(values))


def _loops_and_time(call: Call) -> tuple[int, float]:
    call()
    seconds = _sample(call, 1, 0.0)
    if seconds < SLOW_SECONDS:
        seconds = min(_sample(call, 1, 0.0) for _ in range(2))
    return max(1, round(SAMPLE_SECONDS / max(seconds, 1e-9))), seconds


def _sample(call: Call, loops: int, pause: float) -> float:
    if pause:
        time.sleep(pause)
    began = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - began) / loops


def _prepared(shape: TimedShape, setup: Setup) -> Call:
    return RUNTIMES[setup.runtime](shape, setup)
