"""What Elhoushi et al. 2019 published: tables 1 to 4, by network and scenario."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["TABLES", "Published"]


@dataclass(frozen=True, slots=True)
class Published:
    """A row: accuracies in percent, the best and the final one (of ResNet-50 final top-1 and top-5), parameters, hours with fine-tuning."""

    first: float
    second: float
    parameters: float
    hours: float


TABLES: Mapping[str, Mapping[str, Published]] = {
    "vgg19": {
        "original": Published(93.55, 93.56, 20e6, 4.77),  # as printed: the best is below the final one
        "decompose-10": Published(91.69, 91.39, 749e3, 2.32),
        "decompose-20": Published(92.10, 91.89, 1.33e6, 2.75),
        "decompose-30": Published(91.85, 91.78, 1.69e6, 2.95),
        "decompose-40": Published(92.57, 92.43, 1.75e6, 3.04),
        "decompose-50": Published(92.51, 92.49, 1.73e6, 2.41),
        "decompose-10-reconstruct-190": Published(91.69, 91.53, 749e3, 2.45),
        "after-40": Published(91.52, 91.36, 1.33e6, 4.77 + 0.49),
    },
    "densenet40": {
        "original": Published(94.00, 93.78, 1.06e6, 11.13),
        "decompose-20": Published(92.00, 91.82, 270e3, 8.62),
        "decompose-20-reconstruct-150": Published(92.00, 91.96, 1.06e6, 8.83),
        "after-40": Published(91.49, 91.46, 441e3, 11.13 + 2.17),
    },
    "resnet56": {
        "original": Published(91.83, 91.69, 853e3, 4.39),
        "decompose-10": Published(92.16, 91.97, 508e3, 4.06),
        "decompose-20": Published(92.27, 92.07, 520e3, 4.10),
        "decompose-30": Published(91.66, 91.51, 556e3, 4.15),
        "decompose-40": Published(91.67, 91.50, 550e3, 4.14),
        "decompose-50": Published(91.65, 91.15, 550e3, 4.15),  # printed as 550e6
        "decompose-10-reconstruct-190": Published(92.16, 91.92, 853e3, 4.07),
        "after-40": Published(92.32, 92.22, 547e3, 4.39 + 0.85),
    },
    "resnet50": {
        "original": Published(75.65, 92.85, 25.6e6, 185.4),
        "decompose-30": Published(75.34, 92.68, 17.6e6, 179.2),
        "after-20": Published(69.26, 89.38, 8.2e6, 185.4 + 20.56),
    },
}
