"""The steps of one run, on buffers that keep their place: called by Python, or recorded once and replayed by a GPU.

All random numbers of an epoch are drawn at its start from (seed, epoch), and a step reads where it is from a counter on
the device. So a step is the same whether Python calls it or a GPU replays a recording of it (a CUDA graph).
"""

import contextlib
import math
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kdig_utils import machine
from kdig_utils.experiments import checkpoints
from kdig_utils.experiments.checkpoints import copied, restore
from kdig_utils.experiments.reports import DIVERGED, Line, Report, TrainingDiverged, first_line
from kdig_utils.experiments.runs import Run
from kdig_utils.method.models import exact_float32, share_correct
from kdig_utils.method.overlay import EpochDraws, draw_epoch

MEASURE_EVERY = 10  # epochs between two looks at the test images: on a GPU a look takes as long as twenty steps
SHORT_RUN = 20  # epochs below which a run is measured after each
DRAWING = ThreadPoolExecutor(1, "drawing")
CHECK_EVERY = 50  # steps on the CPU between two looks at loss and clock
SAVE_EVERY_SECONDS = 60.0
STEPS_A_GRAPH = 10  # a replay costs the host as much for ten steps as for one
PIECES_AHEAD = 3  # of a run, queued on the GPU: enough to keep it busy, few enough to stop at a deadline
WARM_UP_STEPS = 3  # before a recording: libraries choose their kernels, the optimiser makes its state


class RecordingFailed(RuntimeError):
    """The steps cannot be recorded. CUDA is in no good state then: another process must go on, in another way."""


class Steps:
    """The steps of a run, on buffers that keep their place: on a GPU recorded as CUDA graphs, elsewhere called.

    Attributes:
        stream: where a GPU runs them; None on the CPU and for runs that cannot be recorded.
        bytes: memory that the run took on the GPU.
        diverged: why the run cannot go on, once its loss was not finite; the error itself would hold the recordings.
    """

    def __init__(self, run: Run, report: Report, recorded: bool = True) -> None:
        self.run, device = run, run.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        free = machine.free_memory(device) if on_gpu else 0
        run.loss_sum = run.loss_sum.to(device)
        checkpoints.resume(run, report)
        self.draws = draws_of(run, run.epoch).to(device)
        self.drawn: dict[int, Future[EpochDraws]] = {}
        self.place = torch.zeros((), dtype=torch.int64, device=device)
        self.offsets = torch.arange(run.spec.batch_size, device=device)
        self.rates = torch.zeros(math.ceil(run.n_images / run.spec.batch_size), device=device)
        self.stream = torch.cuda.Stream(device) if recorded and on_gpu and run.momenta is None else None
        self.saved = self.ticked = time.monotonic()
        self.diverged = ""
        run.model.train()
        self.graphs = {} if self.stream is None or run.finished else record(self)
        self.bytes = free - machine.free_memory(device) if on_gpu else 0

    def adopt(self, run: Run, report: Report) -> None:
        """Go on with another run that is alike on these buffers and recordings: its state is copied into place."""
        checkpoints.resume(run, report)
        live, states = self.run, list(run.optimizer.state.values())
        restore(live, run.model.state_dict(), states)
        for buffer, value in zip(live.own, run.own, strict=True):
            buffer.copy_(value)
        live.loss_sum.copy_(run.loss_sum)
        for name in ("model", "optimizer", "batch_loss", "own", "loss_sum"):
            setattr(run, name, getattr(live, name))
        self.run, self.drawn, self.diverged = run, {}, ""
        self.saved = self.ticked = time.monotonic()

    def load_epoch(self) -> None:
        """Put the numbers of the current epoch, and the place in it, into the buffers."""
        run, ahead = self.run, self.drawn.pop(self.run.epoch, None)
        now = ahead.result() if ahead is not None else draws_of(run, run.epoch)
        for buffer, values in zip(vars(self.draws).values(), vars(now).values(), strict=True):
            buffer.copy_(values, non_blocking=True)
        self.place.fill_(run.position)
        if run.rates is not None:
            self.rates.copy_(run.rates.view(-1, len(self.rates))[run.epoch])

    def draw_ahead(self) -> None:
        """Draw the numbers of the next epoch while the GPU works on this one."""
        if self.stream is not None and self.run.epochs_left > 1:
            self.drawn = {self.run.epoch + 1: DRAWING.submit(draws_of, self.run, self.run.epoch + 1)}

    def step(self, size: int) -> None:
        """One step of the optimiser on the next `size` images."""
        run, device = self.run, self.place.device.type
        batch = self.draws.rows(self.place + self.offsets[:size])
        if run.rates is not None:
            run.optimizer.param_groups[0]["lr"].copy_(self.rates.take(self.place // run.spec.batch_size))
        with torch.autocast(device, torch.bfloat16, enabled=run.uses_bfloat16):
            loss = run.batch_loss(batch)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()
        run.loss_sum += loss.detach() * size
        self.place += size

    def advance(self, steps: int, size: int) -> None:
        """`steps` steps of `size` images: a replay of their recording, or the steps themselves."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                self.graphs[steps, size].replay()
        else:
            for _step in range(steps):
                self.set_momentum()
                self.step(size)
        self.run.position += steps * size

    def set_momentum(self) -> None:
        """The momentum of the current step, where it moves."""
        if (momenta := self.run.momenta) is not None:
            done = self.run.epoch * len(self.rates) + self.run.position // self.run.spec.batch_size
            self.run.optimizer.param_groups[0]["momentum"] = momenta[done]

    def pieces(self, position: int) -> list[tuple[int, int]]:
        """The epoch from `position` on as (steps, images a step): several full batches, single ones, a smaller one."""
        size = self.run.spec.batch_size
        at_a_time = STEPS_A_GRAPH if self.stream is not None else 1
        full, last = divmod(self.run.n_images - position, size)
        several, single = divmod(full, at_a_time)
        return [(at_a_time, size)] * several + [(1, size)] * single + [(1, last)] * (last > 0)

    def epoch(self, share: int, report: Report) -> Iterator[bool]:
        """Train the rest of the epoch, giving way after each piece; `share` runs share the time."""
        self.ticked = time.monotonic()
        self.run.model.train()
        self.wait_for_others()
        with torch.cuda.stream(self.stream):  # does nothing for None
            self.load_epoch()
        self.draw_ahead()
        queued: deque[torch.cuda.Event] = deque()
        with self.noting_divergence(report):
            for steps, size in self.pieces(self.run.position):
                self.advance(steps, size)
                if self.queue is not None:
                    queued.append(self.queue.record_event())
                    if len(queued) > PIECES_AHEAD:
                        queued.popleft().synchronize()
                elif (self.run.position // self.run.spec.batch_size) % CHECK_EVERY == 0:
                    self.look(share, report)
                yield True

    def wait_for_others(self) -> None:
        """Let the stream wait for what came before on the usual one, as the measuring after the last epoch."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.run.device))

    @property
    def queue(self) -> "torch.cuda.Stream | None":
        """Where a GPU's host queues the steps, recorded or not; None on the CPU."""
        called = torch.cuda.current_stream(self.run.device) if self.run.device.type == "cuda" else None
        return self.stream or called

    @contextlib.contextmanager
    def noting_divergence(self, report: Report) -> Iterator[None]:
        """Keep the error of a run that diverges to itself, so that the runs beside it go on."""
        try:
            yield
        except TrainingDiverged as error:
            self.diverged = str(error)
            words = f"{self.run.spec.run_id} has diverged and is dropped: {error}"
            report(line_about(self.run, DIVERGED, words, reason=self.diverged))

    def look(self, share: int, report: Report) -> None:
        """Check the loss; save now and then."""
        check_finite(self.run)
        self.clock(share)
        if self.save_is_due:
            self.save()
            report(line_about(self.run, "progress", progress(self.run)))

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved > SAVE_EVERY_SECONDS

    def save(self) -> None:
        checkpoints.keep_generator(self.run)
        checkpoints.save(self.run)
        self.saved = time.monotonic()

    def clock(self, share: int) -> None:
        """Add the run's share of the time since the last look."""
        now = time.monotonic()
        self.run.seconds += (now - self.ticked) / share
        self.ticked = now


@exact_float32()
def record(steps: Steps) -> dict[tuple[int, int], "torch.cuda.CUDAGraph"]:
    """Record each kind of piece of an epoch as a CUDA graph; the run is left as it was.

    The graphs of a run are never replayed at the same time, so they share one pool of memory.

    Raises:
        RecordingFailed: it is impossible here.
        torch.OutOfMemoryError: the memory is full.
    """
    run, graphs = steps.run, {}
    model, optimizer = copied(run.model.state_dict()), [copied(state) for state in run.optimizer.state.values()]
    loss_sum = run.loss_sum.clone()
    kinds = sorted({*steps.pieces(0), (1, min(run.spec.batch_size, run.n_images))}, reverse=True)
    try:
        with torch.random.fork_rng(devices=[run.device]):
            warm_up(steps, {size for _steps, size in kinds})
            for kind in kinds:
                graphs[kind] = torch.cuda.CUDAGraph()
                pool = next(iter(graphs.values())).pool() if len(graphs) > 1 else None
                with torch.cuda.graph(graphs[kind], pool=pool, stream=steps.stream):
                    for _step in range(kind[0]):
                        steps.step(kind[1])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        name = f"{run.spec.run_id} ({run.spec.method})"
        raise RecordingFailed(f"{name} cannot be recorded, use --way called: {first_line(error)}") from error
    finally:
        restore(run, model, optimizer)
        run.loss_sum.copy_(loss_sum)
    return graphs


def warm_up(steps: Steps, sizes: set[int]) -> None:
    """A few real steps of each size: libraries choose their kernels, and the optimiser makes its state."""
    steps.wait_for_others()
    with torch.cuda.stream(steps.stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* constructed with capturable=True")  # about these very steps
        steps.load_epoch()
        for size in sorted(sizes):
            for _step in range(WARM_UP_STEPS):
                steps.place.zero_()
                steps.step(size)
    torch.cuda.synchronize(steps.run.device)


def draws_of(run: Run, epoch: int) -> EpochDraws:
    """The random numbers of one epoch of a run."""
    return draw_epoch(run.n_images, getattr(run.spec, "overlay_probability", 0.0), run.spec.seed, epoch)


def finish_epochs(whole: list[Steps], report: Report) -> None:
    """Measure the runs that are due, add a row to each curve, turn to the next epoch, save."""
    measured = [measure(steps.run) for steps in whole]  # all are under way on a GPU before the first is waited for
    accuracies = [(float(test), float(validation)) for test, validation in measured]
    for steps, (test, validation) in zip(whole, accuracies, strict=True):
        steps.clock(len(whole))
        with steps.noting_divergence(report):
            finish_epoch(steps, test, validation, report)


def finish_epoch(steps: Steps, test: float, validation: float, report: Report) -> None:
    """Add a row to the curve of a measured run, turn to the next epoch, save.

    On a GPU, where an epoch may take no longer than saving it, it is saved only now and then.
    """
    run = steps.run
    check_finite(run)
    check_weights(run)
    row = {
        "epoch": run.epoch + 1,
        "train_loss": float(run.loss_sum) / run.n_images,
        "test_accuracy": test,
        "validation_accuracy": validation,
        "seconds": run.seconds,
    }
    run.curve.append(row)
    run.epoch, run.position = run.epoch + 1, 0
    run.loss_sum.zero_()
    if run.device.type == "cpu" or steps.save_is_due:
        steps.save()
    tested = "" if math.isnan(test) else f"test {test:.2f} %, "
    where = f"{run.spec.method} k={run.spec.k} seed {run.spec.seed}, epoch {run.epoch}/{run.spec.epochs}"
    report(line_about(run, "epoch", f"{where}: loss {row['train_loss']:.3f}, {tested}{run.seconds:.0f} s"))


def measure(run: Run) -> tuple[Tensor, Tensor]:
    """Test and validation accuracy in per cent, on the device; the last epoch's, which counts, in float32.

    NaN after an epoch that is not measured: of longer runs each tenth one is, and the last.
    """
    last = run.epochs_left == 1
    if not last and run.spec.epochs >= SHORT_RUN and (run.epoch + 1) % MEASURE_EVERY:
        return torch.tensor(math.nan), torch.tensor(math.nan)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.uses_bfloat16 and not last):
        test = share_correct(run.model, run.test)
        return test, share_correct(run.model, run.validation) if run.validation else torch.tensor(math.nan)


def line_about(run: Run, kind: str, words: str, **more: object) -> Line:
    """A line about a run, with where it is: `epoch`, the finished ones, of `epochs` of so many `images`."""
    facts = {"run_id": run.spec.run_id, "method": run.spec.method, "k": run.spec.k, "seed": run.spec.seed}
    where = {"epoch": run.epoch, "epochs": run.spec.epochs, "images": run.n_images, "seconds": round(run.seconds, 1)}
    return Line(words, kind=kind, **facts, **where, **more)


def progress(run: Run) -> str:
    """One line: where the run is and how long it will take."""
    done, spec = run.epoch + run.position / run.n_images, run.spec
    left = run.seconds / done * (spec.epochs - done)
    return (
        f"{spec.method} k={spec.k} seed {spec.seed}: {done:.2f} of {spec.epochs} epochs, about {left / 60:.0f} min left"
    )


def check_finite(run: Run) -> None:
    """Raise TrainingDiverged if the loss of this epoch is not finite."""
    if not torch.isfinite(run.loss_sum):
        raise TrainingDiverged(
            f"the loss is {float(run.loss_sum)} in epoch {run.epoch + 1} before image {run.position}: "
            f"lower the learning rate ({float(run.optimizer.param_groups[0]['lr']):g}) or check the teacher's signals"
        )


def check_weights(run: Run) -> None:
    """Raise TrainingDiverged if the last step, whose loss came before it, left a tensor that is not finite."""
    values = {name: value for name, value in run.model.state_dict().items() if value.is_floating_point()}
    finite = torch.stack(torch._foreach_norm(list(values.values()), torch.inf)).isfinite()
    if not finite.all():
        name = list(values)[int(finite.int().argmin())]
        raise TrainingDiverged(f"{name} is not finite after epoch {run.epoch + 1}: lower the learning rate")
