import json

import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.core.recipe import ModelConfig
from htr_pipeline.core.text import Charset
from htr_pipeline.io.starting_point import StartingPoint

pytest.importorskip("keras")


def saved(folder, charset, num_classes):
    from htr_pipeline.core.model import build_model

    build_model(ModelConfig(size="XS"), num_classes, 32, seed=1).save(folder / "model.keras")
    (folder / "charset.json").write_text(charset, encoding="utf-8")
    return StartingPoint.find(str(folder))


def test_network_and_charset_of_a_folder_are_read(tmp_path):
    start = saved(tmp_path, Charset("abc").to_json(), 4)
    assert start.charset() == Charset("abc")
    assert start.model().outputs[0].shape[-1] == 4
    before = start.content_hash()
    (tmp_path / "charset.json").write_text(Charset("abd").to_json(), encoding="utf-8")
    assert start.content_hash() != before


def test_files_that_do_not_belong_together_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.keras has 4 classes, and .*charset\.json makes 3"):
        saved(tmp_path, Charset("ab").to_json(), 4).model()


@pytest.mark.parametrize("charset", ["no json", json.dumps(["a"]), json.dumps({})])
def test_a_broken_charset_is_named(tmp_path, charset):
    with pytest.raises(UserError, match=r"charset\.json: this is no charset"):
        saved(tmp_path, charset, 4).charset()
