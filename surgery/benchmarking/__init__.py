"""What ``surgery.benchmark`` is made of, a file a concern: how samples are taken, what each runtime is, what is told of it."""
