"""What the documents promise in code."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from htr_pipeline.core.ctc.decoding import beam_search
from htr_pipeline.core.ctc.language_model import CharacterNGram
from htr_pipeline.core.text import Charset

ROOT = Path(__file__).parents[1]
DECODING = Path(__file__).parents[1] / "docs" / "decoding.md"


def test_network_output_and_arpa_file_are_decoded_in_five_lines(tmp_path, monkeypatch, capsys):
    snippet = re.search(r"```python\n(.*?)```", DECODING.read_text(encoding="utf-8"), re.S)[1]
    assert len(snippet.splitlines()) == 5
    charset, text = Charset(" adeno"), "a done deed"
    log_probs = np.full((2, 2 * len(text), charset.num_classes), np.log(0.01))
    for frame, character in enumerate(text):
        log_probs[:, 2 * frame, charset.encode(character)[0]] = np.log(0.95)
        log_probs[:, 2 * frame + 1, charset.blank_index] = np.log(0.95)
    monkeypatch.chdir(tmp_path)
    np.save("log_probs.npy", log_probs)
    Path("charset.json").write_text(charset.to_json(), encoding="utf-8")
    CharacterNGram.train([text, "no need"], 3).to_arpa("fr.arpa")
    exec(
        snippet,
        {"np": np, "Path": Path, "Charset": Charset, "CharacterNGram": CharacterNGram, "beam_search": beam_search},
    )
    assert capsys.readouterr().out == f"{[text, text]}\n"


def test_make_clean_leaves_the_sources(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["data/README.md", "data/01_raw/mine/line.png", "data/01_raw/mine.tsv"]
    removed = [
        "data/01_raw/demo/a.png",
        "data/02_intermediate/manifest.parquet",
        "data/08_reporting/report.html",
        "mlflow.db",
    ]
    for name in kept + removed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = (path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(left) == sorted(["Makefile", *kept])
