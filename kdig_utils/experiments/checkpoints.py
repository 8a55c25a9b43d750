"""Where a run goes on: its state in a file, its tensors put back in their places, its dropout's random numbers."""

import contextlib
import hashlib
import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdig_utils.experiments.reports import Report, first_line
from kdig_utils.experiments.runs import Run
from kdig_utils.method import models
from kdig_utils.paths import replacing

HASHED = b"kdig checkpoint, SHA-256 "  # then the hash, a line break and what torch.save wrote
MOVING = ("epoch", "position", "loss_sum", "seconds", "curve")  # fields of a run, beside its network and optimiser


def save(run: Run) -> None:
    """Write everything that a resume needs; a reader sees the old checkpoint or the new one."""
    if run.checkpoint is None:
        return
    content = {
        "run_id": run.spec.run_id,
        "spec": asdict(run.spec),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": {run.device.type: run.generator},
        **{name: getattr(run, name) for name in MOVING},
    }
    buffer = io.BytesIO()  # torch.save to a full disk gives no OSError, writing bytes does
    torch.save(content, buffer)
    with replacing(run.checkpoint) as part, part.open("wb") as file:
        file.writelines([HASHED, hashlib.sha256(buffer.getbuffer()).hexdigest().encode(), b"\n", buffer.getbuffer()])


def read(checkpoint: Path | bytes, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a checkpoint, or its bytes, holds: `run_id`, `spec`, `model`, `optimizer`, `generator` and `MOVING`.

    Raises:
        ValueError: it is damaged, or none at all.
    """
    try:
        data = checkpoint.read_bytes() if isinstance(checkpoint, Path) else checkpoint
        head, _line_break, hashed = data.partition(b"\n") if data.startswith(HASHED) else (b"", b"", b"")
        if head and hashlib.sha256(hashed).hexdigest().encode() != head.removeprefix(HASHED):
            raise ValueError("its SHA-256 is another")
        # Those of earlier versions have checksums alone.
        if not head and (record := zipfile.ZipFile(io.BytesIO(data)).testzip()):
            raise ValueError(f"{record} has another checksum")
        content = torch.load(io.BytesIO(hashed or data), map_location=device, weights_only=True)
        return {name: content[name] for name in ("run_id", "spec", "model", "optimizer", "generator", *MOVING)}
    except Exception as error:  # torch.load raises many types for a damaged file
        name = checkpoint if isinstance(checkpoint, Path) else "in the pack"
        raise ValueError(
            f"the checkpoint {name} is damaged ({first_line(error)}): delete it to start the run afresh"
        ) from error


def resume(run: Run, report: Report) -> None:
    """Put the run back where its checkpoint has it, if there is one.

    Raises:
        ValueError: the checkpoint is unreadable, of another run or architecture, or no training ends so.
    """
    if run.checkpoint is None or not run.checkpoint.is_file():
        return
    content = read(run.checkpoint, run.device)
    if content["run_id"] != run.spec.run_id:
        raise ValueError(
            f"the checkpoint {run.checkpoint} is of run {content['run_id']} {content['spec']}, not of "
            f"{run.spec.run_id}: resume it with its own spec, or give another checkpoint"
        )
    if wrong := untrue(run, content):
        raise ValueError(f"the checkpoint {run.checkpoint} has {wrong}: delete it to start the run afresh")
    models.load_state(run.model, content["model"])
    run.optimizer.load_state_dict(content["optimizer"])
    for group in run.optimizer.param_groups:
        if "capturable" in group:  # belongs to the device, not to the checkpoint, which may come from another one
            group["capturable"] = run.device.type == "cuda"
    state = content["generator"].get(run.device.type)
    run.generator = state.cpu() if state is not None else None
    for name in MOVING:
        setattr(run, name, content[name])
    report(f"{run.spec.run_id} goes on at epoch {run.epoch + 1}, image {run.position} of {run.n_images}")


def untrue(run: Run, content: dict[str, Any]) -> str:
    """What no training of this run can have left behind; empty if there is nothing of the kind."""
    epoch, position, curve = (content[name] for name in ("epoch", "position", "curve"))
    if not (0 <= epoch <= run.spec.epochs and 0 <= position <= run.n_images):
        return f"image {position} of {run.n_images} after {epoch} of {run.spec.epochs} epochs"
    if [row["epoch"] for row in curve] != list(range(1, epoch + 1)):
        return f"a curve of {len(curve)} epochs after {epoch}"
    accuracies = [row[name] for row in curve for name in ("test_accuracy", "validation_accuracy")]
    if not all(math.isfinite(row["train_loss"]) for row in curve) or any(x < 0 or x > 100 for x in accuracies):
        return "a curve with values that are none"
    steps = epoch * math.ceil(run.n_images / run.spec.batch_size) + math.ceil(position / run.spec.batch_size)
    states = list(content["optimizer"]["state"].values())
    made = {int(state.get("step", steps)) for state in states}  # of SGD only whether there is a momentum
    if made != {steps} and (steps or made):
        return f"an optimiser after {min(made, default=0)} steps where there should be {steps}"
    return ""


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, copied."""
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def restore(run: Run, model: dict[str, Tensor], optimizer: list[dict[str, Tensor]]) -> None:
    """Put weights and optimiser back, each tensor in its place; an optimiser that had no state gets zeros."""
    for name, value in run.model.state_dict().items():
        value.copy_(model[name])
    for number, state in enumerate(run.optimizer.state.values()):
        before = optimizer[number] if optimizer else {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.copy_(before.get(name, torch.zeros_like(value)))


@contextlib.contextmanager
def own_generator(run: Run) -> Iterator[None]:
    """Let dropout draw from the run's own generator, and leave the global one as it was."""
    cuda = run.device.type == "cuda"
    with torch.random.fork_rng(devices=[run.device] if cuda else []):
        if run.generator is None:
            torch.manual_seed(run.spec.seed)
        elif cuda:
            torch.cuda.set_rng_state(run.generator, run.device)
        else:
            torch.set_rng_state(run.generator)
        yield
        keep_generator(run)


def keep_generator(run: Run) -> None:
    """Note the state of the generator that dropout draws from, for a checkpoint or the next round."""
    run.generator = torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else torch.get_rng_state()
