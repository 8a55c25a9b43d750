"""What the package requires, read from requirements.txt, which is its one source. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def groups(text: str) -> dict[str, list[str]]:
    """The requirements in the text of a requirements file, by the heading `# [group]` that they stand under."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        requirement = line.split(" #")[0].strip()
        if heading := re.match(r"# \[(\w+)\]", line):
            group = found.setdefault(heading[1], [])
        elif requirement and not requirement.startswith(("#", "-")):
            group.append(requirement)
    return found


if __name__ == "__main__":
    extras = groups((Path(__file__).parent / "requirements.txt").read_text())
    setup(install_requires=extras.pop("package"), extras_require=extras)
