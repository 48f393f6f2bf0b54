"""The pages: links and file names in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")) if ":" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_what_contributors_are_asked_to_edit_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:pdd_cli|tests)/[\w/]+\.py)`", text)) - {"pdd_cli/engines/NAME_engine.py"}
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).is_file()] == []
    for name, path in (("_candidates", "engines/select"), ("EngineChoice", "settings/base"), ("_OWN", "iqa/metrics"),
                       ("FORMATS", "imaging/formats"), ("FormatChoice", "settings/upscale"),
                       ("DatasetName", "iqa/datasets"), ("find_dataset", "iqa/datasets")):  # fmt: skip
        assert f"`{name}`" in text
        assert re.search(rf"\b{name}\b", (ROOT / f"pdd_cli/{path}.py").read_text(encoding="utf-8"))


def test_the_hosted_workflow_installs_extras_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    extras = re.search(r"\[([\w,]+)\]", " ".join(commands)).group(1).split(",")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
