"""mypy over the package under its import names, which differ from the names of its folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typecheck"


def main() -> int:
    package = TREE / "fused_transformer"
    shutil.rmtree(TREE, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (*(ROOT / "transformer").iterdir(), ROOT / "kernels"):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    config = f"--config-file={ROOT / 'pyproject.toml'}"
    command = [sys.executable, "-m", "mypy", config, f"--cache-dir={ROOT / '.mypy_cache'}", "-p", "fused_transformer"]
    return subprocess.run(command, cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
