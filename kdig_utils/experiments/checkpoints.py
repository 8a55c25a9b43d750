"""Where a run goes on: its state in a file, its tensors put back in their places, its dropout's random numbers."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from kdig_utils.experiments.reports import Report
from kdig_utils.experiments.runs import Run
from kdig_utils.method import models
from kdig_utils.paths import replacing

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
    with replacing(run.checkpoint) as part:
        part.write_bytes(buffer.getbuffer())


def resume(run: Run, report: Report) -> None:
    """Put the run back where its checkpoint has it, if there is one.

    Raises:
        ValueError: the checkpoint is unreadable, or of another run or architecture.
    """
    if run.checkpoint is None or not run.checkpoint.is_file():
        return
    try:
        content = torch.load(run.checkpoint, map_location=run.device, weights_only=True)
        run_id, saved_spec = content["run_id"], content["spec"]
    except Exception as error:  # torch.load raises many types for a damaged file
        raise ValueError(
            f"the checkpoint {run.checkpoint} is damaged ({type(error).__name__}): delete it to start the run afresh"
        ) from error
    if run_id != run.spec.run_id:
        raise ValueError(
            f"the checkpoint {run.checkpoint} is of run {run_id} {saved_spec}, not of {run.spec.run_id}: "
            "resume it with its own spec, or give another checkpoint"
        )
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
