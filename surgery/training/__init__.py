"""Surgery while a network is being trained: what happens to its optimizer, when to cut, and what keeps accuracy and time.

One file a concern: ``chain_map`` (the mathematics), ``optimizer`` and ``followers`` (who lives through a cut), ``schedule`` (when; ``deeper`` for
what was cut before, ``resuming`` for a run that was cut off), ``step_time``, ``settling``, ``balance``, ``decay``, ``batch_norm``, ``warm_up``,
``shorter_steps`` (what helps), ``distributed``, ``lightning``, ``hugging_face``.
"""
