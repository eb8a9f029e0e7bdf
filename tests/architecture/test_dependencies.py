"""Versions with known faults cannot be installed, and the pins are versions that the ranges allow."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
REFUSED = {
    "lightning": ["2.5.0", "2.6.1", "2.6.2", "2.6.3", "2.6.5"],
    "torch": ["2.5.1", "2.9.1"],
    "transformers": ["5.2.0", "5.4.0", "5.8.0"],
    "pillow": ["11.3.0", "12.1.0", "12.2.0", "12.3.0"],
    "pyarrow": ["23.0.0"],
    "jinja2": ["3.1.5"],
    "ray": ["2.51.0", "2.54.0", "2.55.1"],
    "aiohttp": ["3.13.2", "3.14.2"],
}
"""By package, the last versions with the faults of the table in CONTRIBUTING.md."""


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("package", REFUSED)
def test_versions_with_known_faults_are_refused(package):
    ranges = [requirement.specifier for requirement in requirements() if requirement.name == package]
    assert ranges
    assert [version for version in REFUSED[package] if any(version in allowed for allowed in ranges)] == []
    assert f"\n| {package} " in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_pins_are_versions_that_the_ranges_allow():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    wrong = [
        f"{requirement} is pinned to {pins.get(requirement.name.lower())}"
        for requirement in requirements()
        if requirement.name.lower() in pins and pins[requirement.name.lower()] not in requirement.specifier
    ]
    assert wrong == []
