"""How ranks are chosen: the rules, and what users may write for ``ranks=``."""

from __future__ import annotations

from surgery.ranks.evbmf import evbmf, evbmf_rank
from surgery.ranks.rules import Energy, Evbmf, Fraction, Rule, Stable

__all__ = ["Energy", "Evbmf", "Fraction", "Rule", "Stable", "evbmf", "evbmf_rank"]
