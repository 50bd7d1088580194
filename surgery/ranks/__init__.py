"""How ranks are chosen: the rules, what users may write for ``ranks=``, and what each choice of ranks would cost in error."""

from __future__ import annotations

from surgery.ranks.evbmf import evbmf, evbmf_rank
from surgery.ranks.rules import Energy, Evbmf, Fraction, Rule, Stable
from surgery.ranks.surface import error_surface

__all__ = ["Energy", "Evbmf", "Fraction", "Rule", "Stable", "error_surface", "evbmf", "evbmf_rank"]
