"""What the package and some of its extras require, one a line: for an environment that is not to compile it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from setuptools.compat.py310 import tomllib  # its own copy

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional, own = project["optional-dependencies"], re.compile(rf"{project['name']}\[(.+)\]")
    found = dict.fromkeys(project["dependencies"])
    wanted, seen = list(extras), set()
    while wanted:
        extra = wanted.pop()
        if extra in seen:
            continue
        if extra not in optional:
            raise SystemExit(f"there is no extra {extra!r}: {', '.join(optional)}")
        seen.add(extra)
        for line in optional[extra]:
            match = own.fullmatch(line)  # an extra that consists of others
            if match:
                wanted += map(str.strip, match[1].split(","))
            else:
                found[line] = None
    return list(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
