"""What times depend on beside the networks."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from surgery.cost.calls import ON_PROCESSORS

__all__ = ["environment"]

LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # to older instructions than the processor has


def environment(runtimes: Sequence[str] = ()) -> dict[str, str]:
    """Versions, processor, device. A processor that is held to older instructions has the variables that do so in brackets."""
    limits = ", ".join(f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name))
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor() + (f" ({limits})" if limits else ""),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in ON_PROCESSORS:
        if name in runtimes:
            found[name] = import_module(name).__version__
    if torch.cuda.is_available():
        found["cuda_device"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
