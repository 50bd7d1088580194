"""``surgery profile``: times of a list of shapes on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

from surgery.cli.arguments import Commands, count, option
from surgery.cli.targets import check_file
from surgery.ranks.budget import RUNTIMES


def add(commands: Commands) -> None:
    text = "Time a list of shapes on this device, for plans made elsewhere (Budget(latency=..., profile=OUT) names the list)."
    profile = commands.add_parser("profile", help=text, description=text)
    profile.add_argument("shapes", metavar="SHAPES", type=Path, help="the list that a plan with an incomplete profile wrote")
    profile.add_argument("--out", metavar="FILE", type=Path, required=True, help="the profile: made, or added to")
    profile.add_argument("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="what to time in (default: %(default)s)")
    profile.add_argument("--threads", type=count, help="how many threads (default: torch's)")
    profile.add_argument("--device", type=option("device", str), default="cpu", help="where, for example cuda (default: %(default)s)")
    profile.add_argument("--json", action="store_true", help="print JSON for machines instead of a line")
    profile.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> None:
    from surgery.cost.profile import read_shapes
    from surgery.latency import profile_of

    check_file("--out", options.out)
    found = profile_of(read_shapes(options.shapes), options.out, options.runtime, options.threads, options.device)
    print(found.to_json() if options.json else f"{options.out}: {len(found.entries)} times in {found.device['runtime']}")
