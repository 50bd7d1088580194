"""Surgery while a network is being trained: what happens to its optimizer, when to cut, and what keeps accuracy and time.

One file a concern: ``chain_map`` (the mathematics), ``optimizer`` and ``followers`` (who lives through a cut), ``schedule`` (when),
``step_time``, ``settling``, ``balance``, ``decay``, ``batch_norm``, ``warm_up`` (what helps), ``distributed``, ``lightning``, ``hugging_face``.
"""
