"""Training runs for ``train_cifar.py``, ``train_imagenet.py`` and ``train_all.py``.

What is run: ``recipe.py``, ``scenario.py``; on what: ``data.py``; how: ``engine.py``, ``checkpoint.py``, ``command.py``.
"""
