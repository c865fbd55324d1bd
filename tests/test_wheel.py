"""What a wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_holds_the_package_with_all_its_files_and_the_starter(tmp_path):
    source = tmp_path / "source"
    package = source / "src" / "htr_pipeline"
    shutil.copytree(ROOT / "src" / "htr_pipeline", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    (package / "starter" / "model.keras").write_bytes(b"a model")
    code = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheels").glob("*.whl")
    expected = {path.relative_to(source / "src").as_posix() for path in package.rglob("*") if path.is_file()}
    assert not expected - set(zipfile.ZipFile(wheel).namelist())
