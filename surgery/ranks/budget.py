"""Budgets: ranks and kinds of all layers at once, so that the network as a whole costs no more than it may and loses as little as it can.

The network's error is taken as the root mean square of its layers' errors |W - W'|_F / |W|_F; ``criterion="max"`` takes the largest of them instead,
as ALDS does (Liebenwein et al. 2021, with operator norms).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from numbers import Integral, Real

from passes.errors import SurgeryTypeError, SurgeryValueError

__all__ = ["RUNTIMES", "Budget", "Totals"]

CRITERIA = ("mean", "max")
RUNTIMES = ("onnxruntime", "openvino", "eager", "compile", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the whole network may cost, or lose. Exactly one of ``macs``, ``params``, ``latency`` and ``max_error`` is given.

    Attributes:
        macs: multiply-accumulates of one forward pass of the example inputs, everything in the network included: a float in (0, 1] is a share
            of what the network takes, an int a number.
        params: parameters, likewise.
        max_error: the error that the network may have, in (0, 1]; MACs are then as few as it allows (parameters without example inputs).
        criterion: what of the layers' errors is made small: ``"mean"`` the root of their mean square, ``"max"`` the largest. With ``calibration``
            errors are shares of what each layer makes of the network's output, and the mean is weighted by that.
        latency: share in (0, 1) of the time that the network takes on this machine, measured (see ``surgery.latency``).
        runtime: what ``latency`` is measured in: ``"onnxruntime"`` (the default), ``"openvino"``, ``"eager"``, ``"compile"``, or
            ``"train"``, the forward and backward of a training step in eager mode.
        batch: of the inputs that ``latency`` is measured with; that of the example inputs by default.
        threads: for ``latency``; torch's current number by default.
        profile: for ``latency``, a file of times: another device's, by which alone the plan is then made, or this one's, to which is added what
            it lacks. By default this machine's own, in its cache.
    """

    macs: float | int | None = None
    params: float | int | None = None
    max_error: float | None = None
    criterion: str = "mean"
    latency: float | None = None
    runtime: str | None = None
    batch: int | None = None
    threads: int | None = None
    profile: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("macs", "params", "latency", "max_error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SurgeryValueError(f"Budget: give exactly one of macs, params, latency and max_error, got {given or 'none'}")
        if self.criterion not in CRITERIA:
            raise SurgeryValueError(f"Budget: criterion {self.criterion!r} is none of {list(CRITERIA)}")
        (name,) = given
        value = getattr(self, name)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise SurgeryTypeError(f"Budget: {name} must be a number, got {value!r}")
        self._check_conditions()
        if name == "latency":
            if not 0 < float(value) < 1:
                raise SurgeryValueError(f"Budget: latency must be a share in (0, 1) of the time that the network takes, got {value}")
        elif isinstance(value, Integral) and name != "max_error":
            if value < 1:
                raise SurgeryValueError(f"Budget: {name} as a number must be at least 1, got {value}; a share is a float in (0, 1]")
        elif not 0 < float(value) <= 1:
            raise SurgeryValueError(f"Budget: {name} must be {'' if name == 'max_error' else 'an int, or a share '}in (0, 1], got {value}")

    def _check_conditions(self) -> None:
        """What belongs to ``latency`` alone."""
        for name in ("runtime", "batch", "threads", "profile"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.latency is None:
                raise SurgeryValueError(f"Budget: {name} says how latency is measured; give it with latency only")
            if name in ("batch", "threads") and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
                raise SurgeryValueError(f"Budget: {name} must be an int of at least 1, got {value!r}")
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise SurgeryValueError(f"Budget: runtime {self.runtime!r} is none of {list(RUNTIMES)}")
        if self.profile is not None and not isinstance(self.profile, str | os.PathLike):
            raise SurgeryTypeError(f"Budget: profile must be the path of a file, got {self.profile!r}")

    @property
    def unit(self) -> str | None:
        """What is counted: ``"macs"`` or ``"params"``; None where the error is bounded or time is measured."""
        return "macs" if self.macs is not None else "params" if self.params is not None else None

    def __str__(self) -> str:
        told = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if getattr(self, field.name) not in (None, "mean")]
        return f"Budget({', '.join(told)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the network takes before the surgery; MACs are None where no example inputs were given."""

    params: int = 0
    macs: int | None = None
