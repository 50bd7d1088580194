"""Times of layers and chains: kept in a profile, measured where it lacks them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from passes.chain import is_channels_last
from passes.errors import SurgeryError, SurgeryValueError
from passes.factorization import Factorization
from passes.kinds import kind_of
from passes.site import Site
from surgery.cost import sizes_of
from surgery.cost.calls import ON_PROCESSORS, check_installed
from surgery.cost.chains import Setup, timed_in
from surgery.cost.profile import Entry, Profile, TimedShape, cache_file, write_shapes
from surgery.cost.timing import describe, time_shapes
from surgery.options import Options

__all__ = ["Times", "profile_of", "timed_chain", "timed_layer"]


@dataclass(slots=True)
class Times:
    """Times of shapes, from a profile; what it lacks is measured, or an error where it is another device's."""

    setup: Setup
    profile: Profile
    file: Path
    foreign: bool = False
    cached: bool = False  # the file is ours, not one that the user named

    @classmethod
    def of(cls, setup: Setup, path: str | os.PathLike[str] | None) -> Times:
        """Those in the file at ``path``, or in the cache where that is None.

        Raises:
            SurgeryValueError: the file is no profile, or one of a processor where the network is on an accelerator.
        """
        if setup.runtime in ON_PROCESSORS:
            setup = replace(setup, device="cpu")
        need_here = describe(setup)
        if path is None:
            file = cache_file(need_here)
            try:
                profile = Profile.load(file)
            except (SurgeryError, OSError):  # absent, or damaged: measured anew
                profile = Profile(need_here)
            if profile.device != need_here:
                profile = Profile(need_here)
            return cls(setup, profile, file, cached=True)
        file = Path(path)
        profile = Profile.load(file) if file.exists() else Profile({})  # of a device that has timed nothing yet
        if profile.device.get("device") == "cpu" and torch.device(setup.device).type != "cpu":
            told = (
                f"its times are of 'cpu', the network is on {need_here['device']!r}; move the network and example_inputs there, or name another file"
            )
            raise SurgeryValueError(f"ranks: the profile {file}: {told}")
        return cls(setup, profile, file, profile.device != need_here)

    def __getitem__(self, shape: TimedShape) -> Entry:
        return self.profile.entries[shape.key]

    def __contains__(self, shape: TimedShape) -> bool:
        return shape.key in self.profile.entries

    def measure(self, shapes: Sequence[TimedShape], *, anew: bool = False) -> None:
        """Time what is not there yet, or (``anew``) all of these, and keep it. Another device's times stay as they are."""
        wanted = [shape for shape in dict.fromkeys(shapes) if anew or shape not in self]
        if not wanted or self.foreign:
            return
        found, reference = time_shapes(wanted, self.setup)
        with suppress(SurgeryError, OSError):  # what another process has found meanwhile stays, and so does what could not be written
            known, self.profile = self.profile, Profile.load(self.file)
            own = {key: entry for key, entry in known.entries.items() if key not in self.profile.entries}
            if own and known.reference is not None:
                self.profile.add(own, known.reference)
        self.profile.add(found, reference)
        with suppress(OSError) if self.cached else nullcontext():  # a cache that cannot be written costs time only
            if self.cached:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            self.profile.save(self.file)

    def lacks(self, shapes: Sequence[TimedShape]) -> SurgeryValueError:
        """The error that names what another device has to time, in a file."""
        file = self.file.with_suffix(".missing.json")
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self]
        try:
            write_shapes(missing, file)
            how = f"--runtime {self.setup.runtime} --threads {self.setup.threads}"
            kind = torch.device(self.setup.device).type
            how += "" if kind == "cpu" else f" --device {kind}"
            there_and_back = f"{shlex.quote(str(file))} --out {shlex.quote(str(self.file))}"
            told = f"they are listed in {file}: run `surgery profile {there_and_back} {how}` on that device"
        except OSError as error:
            told = f"their list could not be written to {file} ({error}); give a profile in a folder that can be written"
        there = "" if self.file.exists() else " (which is not there yet)"
        return SurgeryValueError(f"ranks: the profile {self.file}{there} lacks {len(missing)} shapes, the first is {missing[0].key!r}; {told}")


def profile_of(shapes: Sequence[TimedShape], path: Path, runtime: str, threads: int | None = None, device: str = "cpu") -> Profile:
    """Time a list of shapes on this machine and add them to the profile at ``path``, or make it.

    Raises:
        SurgeryValueError: the file is of another device, or none; there is no such device here, or the runtime is not timed on it.
        MissingExtra: the runtime is not installed.
    """
    Options(device=device)
    if runtime in ON_PROCESSORS and torch.device(device).type != "cpu":
        raise SurgeryValueError(f"device: {runtime} is timed on the processor, got {device!r}; leave it out, or time in eager mode")
    setup = Setup(runtime=timed_in(runtime), threads=threads or torch.get_num_threads(), device=device)
    check_installed(runtime)
    times = Times(setup, Profile.load(path) if path.exists() else Profile(describe(setup)), path)
    if times.profile.device != describe(setup):
        raise SurgeryValueError(f"{path}: it is a profile of {times.profile.device}, this is {describe(setup)}; give another file")
    times.measure(shapes)
    return times.profile


def timed_layer(site: Site, runtime: str) -> list[TimedShape]:
    """Every call of a layer, and of those it stands for."""
    return [TimedShape((each.geometry,), size, *_format(each, runtime)) for each in (site, *site.others) for size in sizes_of(each)]


def timed_chain(site: Site, factorization: Factorization, runtime: str) -> list[TimedShape]:
    found = []
    for each in (site, *site.others):
        layers = tuple(shape.geometry for shape in kind_of(factorization).shapes(each.geometry, factorization, True))
        found += [TimedShape(layers, size, *_format(each, runtime)) for size in sizes_of(each)]
    return found


def _format(site: Site, runtime: str) -> tuple[str, bool]:
    dtype = str(site.dtype).removeprefix("torch.")
    return dtype, runtime not in ON_PROCESSORS and is_channels_last(site.weight)
