"""Python's garbage collector took a quarter of the tests' time: exports make many objects."""

import gc


def collect_garbage_rarely() -> None:
    """Leave out what is imported already, and look at the rest seventy times less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
