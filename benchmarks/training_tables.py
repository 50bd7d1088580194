"""Tables 1 to 4 and figures 3 to 6 of the paper from runs of ``train_cifar.py``, ``train_imagenet.py`` and ``train_all.py``.

    python benchmarks/training_tables.py RUNS [--out benchmarks/results/training]

For each network in RUNS: the logs, without checkpoints, and report and plan of each run, ``table.md`` and ``summary.json`` with the paper's numbers
beside ours, and ``figure.png``. Tables are of complete runs, figures of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

from training.checkpoint import LOG, PLAN, REPORT, RUN
from training.figures import draw
from training.tables import logged, summary, table

from surgery import SurgeryValueError

RESULTS = Path(__file__).parent / "results" / "training"


def publish(runs: Path, out: Path) -> None:
    """Everything that is told of the runs in one folder, into another, which may be the same.

    Raises:
        SurgeryValueError: two of them would come to stand in one place.
    """
    several = [name for name, count in Counter((run.network, run.folder.name) for run in logged(runs)).items() if count > 1]
    if several:
        raise SurgeryValueError(f"runs: {runs} holds more than one run {several[0][1]} of {several[0][0]}; give folders of their own, one at a time")
    for network, group in itertools.groupby(logged(runs), key=lambda run: run.network):
        mine = list(group)
        for run in mine:
            place = out / network / run.folder.name
            place.mkdir(parents=True, exist_ok=True)
            for name in (RUN, LOG, REPORT, PLAN):
                if (run.folder / name).exists() and run.folder.resolve() != place.resolve():
                    shutil.copyfile(run.folder / name, place / name)
        rows = summary(mine)
        (out / network / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
        (out / network / "table.md").write_text(table(network, rows))
        draw(mine, out / network / "figure.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not logged(options.runs):
        parser.error(f"{options.runs} holds no runs")
    try:
        publish(options.runs, options.out)
    except SurgeryValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
