"""A wheel that was built works alone, without the source tree."""

import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("cargo") is None, reason="building needs cargo")
def test_a_wheel_works_alone(tmp_path):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command, **options):
        result = subprocess.run(command, capture_output=True, text=True, timeout=800, **{"env": clean, **options})
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "-w", str(tmp_path / "dist"), ROOT)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", str(wheel))
    program = tmp_path / "program.py"
    program.write_text(
        "import ray\n"
        "ray.init('local', num_cpus=1, object_store_memory=80 << 20)\n"
        "@ray.remote\ndef f(x): return x + 1\n"
        "print(ray.get(f.remote(1)), ray.__file__)\n"
    )
    output = run(python, str(program), cwd="/")
    assert output.startswith("2 ") and str(tmp_path / "venv") in output
    assert "ray, version" in run(str(tmp_path / "venv" / "bin" / "ray"), "--version", cwd="/")
