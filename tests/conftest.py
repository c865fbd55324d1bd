def pytest_collection_modifyitems(items):
    """The slowest file first: with several workers, one of them would end with it alone."""
    items.sort(key=lambda item: item.path.name != "test_run.py")
