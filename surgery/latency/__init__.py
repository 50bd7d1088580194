"""Latency in plans: candidate chains are timed, the ranks of all layers chosen by those times, the whole network timed, and the plan corrected.

What a cut saves is the difference of two times measured side by side, its layer's and its chain's; what both pay in isolation (entering and leaving
the runtime's memory layout) cancels. The network's time is foretold as its own measured time less what all cuts save.

``times`` holds the times of layers and chains, ``table`` what lies between those that are measured, ``families`` the sorts of plans to compare,
``race`` times whole networks (``onnx_cut`` makes their files), ``replan`` chooses and corrects, ``solving`` does all of it for one budget, and
``stopwatch`` is what the rest of the package asks.
"""

from surgery.latency.race import with_noise
from surgery.latency.solving import Terms
from surgery.latency.stopwatch import Stopwatch
from surgery.latency.times import profile_of

__all__ = ["Stopwatch", "Terms", "profile_of", "with_noise"]
