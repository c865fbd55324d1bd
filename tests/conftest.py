SLOWEST = ("test_run.py", "test_training.py", "test_distribution.py", "test_loss.py")


def pytest_collection_modifyitems(items):
    """The slowest files first: with several workers, one of them would end with such a file alone."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
