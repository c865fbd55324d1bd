import shutil

import pytest

from tests.io import samples


@pytest.fixture(scope="session")
def cluster():
    distributed = pytest.importorskip("distributed", reason="Dask is an extra: pip install distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.fixture
def source(tmp_path):
    """A folder with the image of a page; `samples.add` puts an XML file beside it."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(samples.RESOURCES / "page" / "page.png", folder)
    return folder
