"""A rank rule of one's own, with a promise: no layer's error is above what was asked for. Compared with an error budget that asks the same.

    python examples/extend.py [MODEL] [--error 0.3]

The promise is that of the truncated higher-order SVD: the squared error is at most what the two channel modes leave out, added up (De Lathauwer
et al. 2000, property 10). The rule gives each mode half of it. How to add kinds and passes too: docs/extending.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import surgery
from passes.linalg import Spectrum
from passes.site import Site
from surgery.cli import add_model_arguments, guarded, open_model


@dataclass(frozen=True, slots=True)
class AtMost:
    """The smallest rank of each mode which leaves out no more than its part of ``error`` squared; |W - W'|_F / |W|_F is then at most ``error``."""

    error: float

    def __call__(self, site: Site, spectra: Sequence[Spectrum]) -> list[int] | surgery.Keep:
        if any(float(s.values[0]) <= 0 for s in spectra):
            return surgery.Keep("its weight is zero")
        return [self._rank(s, self.error**2 / len(spectra)) for s in spectra]

    def _rank(self, spectrum: Spectrum, share: float) -> int:
        left_out = spectrum.values.square().flip(0).cumsum(0)  # by the last, the last two, ...
        return spectrum.full - int((left_out <= share * left_out[-1]).sum())


def run(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    for name, ranks in (("every layer", AtMost(options.error)), ("the network", surgery.Budget(max_error=options.error))):
        net = surgery.decompose(model, ranks, example_inputs=inputs)
        found = surgery.report(net)
        errors = [row.error for row in found.layers if row.error is not None]
        told = f"{found.speedup:.2f}x fewer MACs, {len(errors)} layers cut"
        print(f"error of {name} at most {options.error}: {told}, largest error of a layer {max(errors, default=0.0):.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, default="surgery:resnet20")
    parser.add_argument("--error", type=float, default=0.3, help="default: %(default)s")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
