"""The pages for contributors lead somewhere, and the changes that CONTRIBUTING.md shows work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdig_utils import __main__ as command_line
from kdig_utils.method.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
FILE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|yml|toml|txt|ipynb|cfg)|(?:[\w.-]+/)+)`")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
NEW = {"notebooks/18_name.ipynb", "losses.py"}  # an example, and a name without its folder
ROUTINE = """
import dataclasses, torch
from kdig_utils.method import cifar10, losses, models, training
from kdig_utils.method.overlay import draw_epoch
from kdig_utils.method.pairings import control_maps
from kdig_utils.method.spec import RunSpec

images = cifar10.load_sample("train").subset(torch.arange(8))
batch = draw_epoch(8, 0.0, seed=0, epoch=0)
"""
CONTROL = """
maps = torch.rand(8, 32, 32)
turned = control_maps("inverted", maps, images, torch.arange(8), seed=0)
assert torch.equal(turned, 1 - maps)
assert torch.equal(control_maps("matched", maps, images, torch.arange(8), seed=0), maps)
print(RunSpec("ig").run_id, RunSpec("ig", pairing="inverted").run_id)
"""
PART = """
model, plain = models.student(5, seed=0).eval(), RunSpec("student", batch_size=8)
def loss(spec):
    return training.student_loss(model, images, None, batch, spec)
logits, _features = models.logits_and_features(
    model, training.crop_and_flip(images.images(batch.order), batch.shifts, batch.flips), models.attention_tap(5)
)
entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
paid = loss(dataclasses.replace(plain, method="sure")) - loss(plain)
assert torch.allclose(paid, -0.1 * entropy, atol=1e-6), (paid, entropy)
assert not RunSpec("sure").uses_teacher and RunSpec("kd_sure").uses_teacher
print(RunSpec("ig").run_id, RunSpec("ig_sure").run_id)
"""


@pytest.mark.parametrize(("place", "holds"), [(0, CONTROL), (1, PART)], ids=["control", "method"])
def test_a_change_that_the_guide_shows_works_and_leaves_each_run_its_identity(
    place: int, holds: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "kdig_utils", tmp_path / "kdig_utils", ignore=shutil.ignore_patterns("__pycache__"))
    change = re.findall(r"```diff\n(.+?)```", GUIDE, re.DOTALL)[place]
    applied = subprocess.run(["git", "apply"], input=change, text=True, cwd=tmp_path, capture_output=True)
    assert applied.returncode == 0, f"the guide's change no longer fits the code: {applied.stderr}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "KDIG_ROOT": str(ROOT)}
    words = [sys.executable, "-c", ROUTINE + holds]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    plain, changed = ran.stdout.split()
    assert plain == RunSpec("ig").run_id != changed


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_page_for_contributors_names_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = set(re.findall(r"\]\(((?!https?:)[^)#]+)[^)]*\)", text))
    named = links | set(FILE.findall(text)) - NEW
    assert named
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_commands_of_the_guide_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command with its options is one of the command line, each `make TARGET` is one of the Makefile."""
    commands = re.findall(r"python -m kdig_utils ([a-z-]+)([^#`\n]*)", GUIDE)
    assert commands
    for command, words in commands:
        with pytest.raises(SystemExit) as ended:
            command_line.main([command, "--help"])
        assert ended.value.code == 0, command
        shown = capsys.readouterr().out
        assert not [option for option in re.findall(r"--[a-z-]+", words) if option not in shown], command
    makefile = (ROOT / "Makefile").read_text()
    assert not [target for target in re.findall(r"\bmake ([a-z-]+)", GUIDE) if f"\n{target}:" not in makefile]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_template_is_a_form(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    assert len({field["id"] for field in form["body"] if field["type"] != "markdown"}) >= 2
    kinds = {"markdown", "input", "textarea", "dropdown", "checkboxes"}
    assert {field["type"] for field in form["body"]} <= kinds
