"""The loop that trains: one run or many side by side, the same for a notebook, a CPU and a full GPU.

All random numbers of an epoch are drawn at its start from (seed, epoch) into buffers that keep their place, and a step
reads where it is from a counter on the device. So a step is the same whether Python calls it or a GPU replays a
recording of it (a CUDA graph), and a run ends as it would have ended alone: bit for bit on the CPU, and on a GPU as
far as its libraries add up in the same order.
"""

import contextlib
import copy
import io
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from kdig_utils import machine
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.models import exact_float32, share_correct
from kdig_utils.method.overlay import EpochDraws, draw_epoch
from kdig_utils.method.spec import RunSpec, TeacherSpec
from kdig_utils.paths import replacing

Report = Callable[[str], None]
MEASURE_EVERY = 10  # epochs between two looks at the test images: on a GPU a look takes as long as twenty steps
SHORT_RUN = 20  # epochs below which a run is measured after each
DRAWING = ThreadPoolExecutor(1, "drawing")
CHECK_EVERY = 50  # steps on the CPU between two looks at loss and clock
SAVE_EVERY_SECONDS = 60.0
STEPS_A_GRAPH = 10  # a replay costs the host as much for ten steps as for one
PIECES_AHEAD = 3  # of a run, queued on the GPU: enough to keep it busy, few enough to stop at a deadline
WARM_UP_STEPS = 3  # before a recording: libraries choose their kernels, the optimiser makes its state
SIDE_BY_SIDE = {"cpu": 1, "cuda": 4}  # runs at once, if nobody says otherwise
CAUTION = 1.1  # another run starts if all would end even this much slower: none is to be put aside soon after
MEMORY_MARGIN = 1.2  # another run starts if the free memory is this many times what the largest one took,
MEMORY_RESERVE = 1_500_000_000  # and this many bytes, which the evaluation of a network takes


class Way(NamedTuple):
    """How runs are trained; it changes how long they take, and what they are no more than rounding does.

    Attributes:
        at_once: runs side by side; they take turns, on a GPU each on a stream of its own.
        recorded: whether a GPU replays recordings of the steps; else Python calls each step.
        compiled: whether the network of a full batch is compiled (`torch.compile`).
        benchmark: whether cuDNN times its kernels and takes the fastest.
    """

    at_once: int = 1
    recorded: bool = True
    compiled: bool = False
    benchmark: bool = True


class RecordingFailed(RuntimeError):
    """The steps cannot be recorded. CUDA is in no good state then: another process must go on, in another way."""


# By the name that the command line knows, the likely fastest on a GPU first; a CPU never records.
WAYS = {
    "compiled": Way(compiled=True),
    "recorded": Way(),
    "unbenchmarked": Way(benchmark=False),
    "called": Way(recorded=False),
}


class TrainingDiverged(RuntimeError):
    """The loss is not finite; the last checkpoint was made before that."""


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        model: in evaluation mode, on the device of the training.
        curve: one row an epoch: epoch, train_loss, test_accuracy, validation_accuracy (per cent; NaN in epochs after
            which it was not measured), seconds.
    """

    model: nn.Module
    curve: pd.DataFrame


@dataclass(frozen=True)
class Evaluation:
    """The image sets that a run is measured on, on its device."""

    test: ImageSet
    validation: ImageSet | None = None


@dataclass
class Run:
    """A run under way: what is trained, by which loss, and everything that moves.

    Attributes:
        batch_loss: the loss of a batch of draws, without Python decisions on tensor values.
        n_images: images in an epoch.
        checkpoint: where the run is saved and resumed from; None keeps it in memory alone.
        rates: learning rate of each step, (steps,), on the device; None leaves the optimiser's own. The optimiser's
            rate must then be a tensor.
        momenta: momentum of each step; None leaves the optimiser's own. Such a run is not recorded as a graph.
        epoch: finished epochs.
        position: images of the current epoch that are done.
        loss_sum: sum of the losses of those images, on the device.
        seconds: time spent training and measuring; runs side by side share it.
        curve: one entry a finished epoch.
        generator: state of the random numbers of dropout.
        alike: runs that are equal in this can use one recording after another; None can use no other's.
        own: tensors that `batch_loss` reads and that belong to this run alone.
    """

    spec: RunSpec | TeacherSpec
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_loss: Callable[[EpochDraws], Tensor]
    n_images: int
    evaluation: Evaluation
    checkpoint: Path | None = None
    rates: Tensor | None = None
    momenta: list[float] | None = None
    epoch: int = 0
    position: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    generator: Tensor | None = None
    alike: Hashable = None
    own: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def finished(self) -> bool:
        return self.epoch >= self.spec.epochs

    @property
    def trained(self) -> Trained:
        """The network in evaluation mode and the learning curve so far."""
        return Trained(self.model.eval(), pd.DataFrame(self.curve))


def fit(run: Run, report: Report = lambda line: None) -> Trained:
    """Train one run to its end, or go on from its checkpoint.

    Raises:
        TrainingDiverged: the loss is not finite.
        ValueError: the checkpoint is damaged or of another run.
    """
    (finished,) = train_together([run], report=report)
    return finished.trained


def train_together(
    runs: Iterable[Run],
    way: Way = Way(),
    deadline: float = math.inf,
    report: Report = lambda line: None,
) -> Iterator[Run]:
    """Train runs side by side, each as if it were alone, and yield each one when it is finished.

    A run is made (`next` of `runs`) when there is a place for it. It starts beside others only if, from the speed
    measured so far, all of them will end before `deadline`; alone it always starts, so that no minute is lost. What
    does not end is saved in its checkpoint. A run that diverges is dropped, and the error comes when the others are
    done. Where the GPU's memory is full, half as many runs are trained side by side from then on.

    Args:
        deadline: on the clock of `time.monotonic`.

    Raises:
        TrainingDiverged: losses were not finite; the message names their runs. All others are handed over before.
        ValueError: a checkpoint is damaged or of another run, or a run with dropout is to share the generator.
    """
    waiting, active, pace, diverged = Waiting(iter(runs)), [], Pace(deadline), []
    places, slots = way.at_once, Slots(way, report)
    while True:
        with saved_if_it_fails(active):
            while len(active) < places and slots.have_room(active) and (run := waiting.next(active, pace)) is not None:
                try:
                    steps = slots.steps(run)
                except torch.OutOfMemoryError:
                    places = fewer_places(places, report)
                    waiting.put_back(run)
                    continue
                if run.finished:
                    yield slots.handed_over(steps)
                else:
                    active.append(steps)
                    check_generators(active)
        if not active:
            break
        pace.round_of(active, lambda now: train_round(now, deadline, report))
        diverged += [f"run {steps.run.spec.run_id}: {steps.diverged}" for steps in active if steps.diverged]
        active = [steps for steps in active if not steps.diverged]
        for steps in [steps for steps in active if steps.run.finished]:
            active.remove(steps)
            yield slots.handed_over(steps)
        active = put_aside(active, pace, waiting, report)
    if diverged:
        raise TrainingDiverged("; ".join(diverged))


@contextlib.contextmanager
def saved_if_it_fails(active: list["Steps"]) -> Iterator[None]:
    """Save the runs under way, all between two epochs, if another one cannot be made: nothing of theirs is lost."""
    try:
        yield
    except Exception:
        for steps in active:
            with contextlib.suppress(RuntimeError):  # of a GPU that can do nothing any more
                save_checkpoint(steps.run)
        raise


class Waiting:
    """The runs that have no place yet: those that were put aside, the most advanced first, then the new ones."""

    def __init__(self, new: Iterator[Run]) -> None:
        self.new = new
        self.aside: list[Run] = []

    def next(self, active: list["Steps"], pace: "Pace") -> Run | None:
        """The next run that may start beside the active ones; None if there is none, or no time."""
        if pace.left <= 0 or (run := self._first()) is None:
            return None
        if not active or pace.another_ends(active, run):
            return run
        self.put_back(run)
        return None

    def put_back(self, run: Run) -> None:
        self.aside.append(run)

    def _first(self) -> Run | None:
        if not self.aside:
            return next(self.new, None)
        self.aside.sort(key=lambda run: run.epoch / run.spec.epochs)
        return self.aside.pop()


class Slots:
    """Recordings of finished runs, kept for runs that are alike: to record anew takes as long as a thousand steps."""

    def __init__(self, way: Way, report: Report) -> None:
        self.way, self.report = way, report
        self.free: list[Steps] = []

    def have_room(self, active: list["Steps"]) -> bool:
        """Whether the memory holds one more run; the recordings that nobody uses make way for it."""
        if has_room([*active, *self.free]):
            return True
        self.free.clear()
        return has_room(active)

    def steps(self, run: Run) -> "Steps":
        """The steps of a run: on the recording of a finished one, if one is alike, else new ones."""
        for slot in self.free:
            if slot.run.alike == run.alike:
                self.free.remove(slot)
                slot.adopt(run, self.report)
                return slot
        return Steps(run, self.report, self.way.recorded)

    def handed_over(self, steps: "Steps") -> Run:
        """The finished run, with a network that no later run on the same recording will change."""
        if not steps.graphs or steps.run.alike is None:
            return steps.run
        self.free.append(steps)
        return replace(steps.run, model=copy.deepcopy(steps.run.model))


def fewer_places(places: int, report: Report) -> int:
    """Half as many places, now that the memory is full; the runs under way keep theirs until they end.

    Raises:
        torch.OutOfMemoryError: not even one run fits.
    """
    if places == 1:
        raise torch.OutOfMemoryError("the GPU's memory does not hold one run: stop what else runs on it")
    report(f"out of memory with {places} runs side by side: {places // 2} from now on")
    return places // 2


class Pace:
    """How long an epoch takes, measured, and what will therefore end before the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.seconds = 0.0  # an epoch of one run, its share of a round
        self.rounds = 0

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def round_of(self, active: list["Steps"], train: Callable[[list["Steps"]], None]) -> None:
        """Measure one round, an epoch of each active run; the first one, in which kernels are loaded, tells nothing."""
        started, begun = time.monotonic(), sum(steps.run.epoch for steps in active)
        train(active)
        epochs = sum(steps.run.epoch for steps in active) - begun
        if epochs and self.rounds:
            self.seconds = (time.monotonic() - started) / epochs
        self.rounds += 1

    def ending(self, active: list["Steps"]) -> int:
        """How many of the active runs, the most advanced first, will end in time; each slows down the others."""
        if not active or not math.isfinite(self.deadline):
            return len(active)
        epochs = max(epochs_left(steps.run) for steps in active)
        return min(len(active), int(self.left / max(epochs * self.seconds, 1e-9)))

    def another_ends(self, active: list["Steps"], run: Run) -> bool:
        """Whether `run` has the time to end beside the active ones."""
        epochs = max(epochs_left(each) for each in (run, *(steps.run for steps in active)))
        return self.left > 0 and CAUTION * (len(active) + 1) * epochs * self.seconds <= self.left


def epochs_left(run: Run) -> int:
    return run.spec.epochs - run.epoch


def put_aside(active: list["Steps"], pace: Pace, waiting: Waiting, report: Report) -> list["Steps"]:
    """Save the runs that will not end in time, the least advanced first, so that the others do; keep at least one.

    Those that are put aside go on when the others are done.
    """
    kept = sorted(active, key=lambda steps: steps.run.epoch - steps.run.spec.epochs, reverse=True)
    place = 0 if pace.left <= 0 else max(1, pace.ending(kept))
    for steps in kept[place:]:
        save_checkpoint(steps.run)
        waiting.put_back(steps.run)
        report(f"{steps.run.spec.run_id} is put aside after {steps.run.epoch} of {steps.run.spec.epochs} epochs")
    return [steps for steps in active if steps in kept[:place]]


def has_room(active: list["Steps"]) -> bool:
    """Whether the GPU has the memory for one more run like the largest active one; always true elsewhere."""
    if not active or active[0].stream is None:
        return True
    torch.cuda.empty_cache()  # the pools of finished runs count as taken until then
    free = machine.free_memory(active[0].run.device)
    return free > MEMORY_MARGIN * max(steps.bytes for steps in active) + MEMORY_RESERVE


def check_generators(active: list["Steps"]) -> None:
    """Raise ValueError if a run with dropout, which draws from the one global generator, has another beside it."""
    if len(active) > 1 and any(isinstance(m, nn.Dropout) for steps in active for m in steps.run.model.modules()):
        raise ValueError("a run with dropout shares its random numbers with the runs beside it: train it alone")


@exact_float32()
def train_round(active: list["Steps"], deadline: float, report: Report) -> None:
    """The rest of the current epoch of every run, in turns; measured at its end, unless the deadline came first."""
    device = active[0].run.device
    with own_generator(active[0].run):
        turns = [steps.epoch(share=len(active), report=report) for steps in active]
        while turns and time.monotonic() < deadline:
            turns = [turn for turn in turns if next(turn, None) is not None]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for steps in active:
            steps.clock(len(active))
        finish_epochs([steps for steps in active if steps.run.position == steps.run.n_images], report)


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


class Steps:
    """The steps of a run, on buffers that keep their place: on a GPU recorded as CUDA graphs, elsewhere called.

    Attributes:
        stream: where a GPU runs them; None on the CPU and for runs that cannot be recorded.
        bytes: memory that the run took on the GPU.
        diverged: why the run cannot go on, once its loss was not finite; the error itself would hold the recordings.
    """

    def __init__(self, run: Run, report: Report, recorded: bool = True) -> None:
        self.run, device = run, run.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        free = machine.free_memory(device) if device.type == "cuda" else 0
        run.loss_sum = run.loss_sum.to(device)
        resume(run, report)
        self.draws = draws_of(run, run.epoch).to(device)
        self.drawn: dict[int, Future[EpochDraws]] = {}
        self.place = torch.zeros((), dtype=torch.int64, device=device)
        self.offsets = torch.arange(run.spec.batch_size, device=device)
        self.rates = torch.zeros(math.ceil(run.n_images / run.spec.batch_size), device=device)
        can_record = recorded and device.type == "cuda" and run.momenta is None
        self.stream = torch.cuda.Stream(device) if can_record else None
        self.saved = self.ticked = time.monotonic()
        self.diverged = ""
        run.model.train()
        self.graphs = {} if self.stream is None or run.finished else record(self)
        self.bytes = free - machine.free_memory(device) if device.type == "cuda" else 0

    def adopt(self, run: Run, report: Report) -> None:
        """Go on with another run that is alike on these buffers and recordings: its state is copied into place."""
        resume(run, report)
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
        ahead = self.drawn.pop(self.run.epoch, None)
        now = ahead.result() if ahead is not None else draws_of(self.run, self.run.epoch)
        for buffer, values in zip(vars(self.draws).values(), vars(now).values(), strict=True):
            buffer.copy_(values, non_blocking=True)
        self.place.fill_(self.run.position)
        if self.run.rates is not None:
            self.rates.copy_(self.run.rates[self.run.epoch * len(self.rates) :][: len(self.rates)])

    def draw_ahead(self) -> None:
        """Draw the numbers of the next epoch while the GPU works on this one."""
        if self.stream is not None and epochs_left(self.run) > 1:
            self.drawn = {self.run.epoch + 1: DRAWING.submit(draws_of, self.run, self.run.epoch + 1)}

    def step(self, size: int) -> None:
        """One step of the optimiser on the next `size` images."""
        run, device = self.run, self.place.device.type
        batch = self.draws.rows(self.place + self.offsets[:size])
        if run.rates is not None:
            run.optimizer.param_groups[0]["lr"].copy_(self.rates.take(self.place // run.spec.batch_size))
        with torch.autocast(device, torch.bfloat16, enabled=uses_bfloat16(run)):
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
        if self.stream is not None:  # what was measured after the last epoch is done before this one begins
            self.stream.wait_stream(torch.cuda.current_stream(self.run.device))
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
            report(f"{self.run.spec.run_id} has diverged and is dropped: {error}")

    def look(self, share: int, report: Report) -> None:
        """Check the loss; save now and then."""
        check_finite(self.run)
        self.clock(share)
        if self.save_is_due:
            self.save()
            report(progress(self.run))

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved > SAVE_EVERY_SECONDS

    def save(self) -> None:
        keep_generator(self.run)
        save_checkpoint(self.run)
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
    steps.stream.wait_stream(torch.cuda.current_stream(steps.run.device))
    with torch.cuda.stream(steps.stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* constructed with capturable=True")  # about these very steps
        steps.load_epoch()
        for size in sorted(sizes):
            for _step in range(WARM_UP_STEPS):
                steps.place.zero_()
                steps.step(size)
    torch.cuda.synchronize(steps.run.device)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, copied."""
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def resume(run: Run, report: Report) -> None:
    """Put the run back where its checkpoint has it, if there is one."""
    if run.checkpoint is not None and run.checkpoint.is_file():
        load_checkpoint(run)
        report(f"{run.spec.run_id} goes on at epoch {run.epoch + 1}, image {run.position} of {run.n_images}")


def draws_of(run: Run, epoch: int) -> EpochDraws:
    """The random numbers of one epoch of a run."""
    return draw_epoch(run.n_images, getattr(run.spec, "overlay_probability", 0.0), run.spec.seed, epoch)


def first_line(error: Exception) -> str:
    """What an error says, in one line for a log."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


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


def uses_bfloat16(run: Run) -> bool:
    """Whether forward passes run in bfloat16: on a GPU that computes in it, unless the spec asks for float32."""
    return (
        run.device.type == "cuda"
        and run.spec.precision == "native"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


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
    report(
        f"{run.spec.method} k={run.spec.k} seed {run.spec.seed}, epoch {run.epoch}/{run.spec.epochs}: "
        f"loss {row['train_loss']:.3f}, {tested}{run.seconds:.0f} s"
    )


def measure(run: Run) -> tuple[Tensor, Tensor]:
    """Test and validation accuracy in per cent, on the device; the last epoch's, which counts, in float32.

    NaN after an epoch that is not measured: of longer runs each tenth one is, and the last.
    """
    last = epochs_left(run) == 1
    if not last and run.spec.epochs >= SHORT_RUN and (run.epoch + 1) % MEASURE_EVERY:
        return torch.tensor(math.nan), torch.tensor(math.nan)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=uses_bfloat16(run) and not last):
        test = share_correct(run.model, run.evaluation.test)
        held_out = run.evaluation.validation
        return test, share_correct(run.model, held_out) if held_out else torch.tensor(math.nan)


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


def save_checkpoint(run: Run) -> None:
    """Write everything that a resume needs; a reader sees the old checkpoint or the new one."""
    if run.checkpoint is None:
        return
    content = {
        "run_id": run.spec.run_id,
        "spec": asdict(run.spec),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": {run.device.type: run.generator},
        **{name: getattr(run, name) for name in ("epoch", "position", "loss_sum", "seconds", "curve")},
    }
    buffer = io.BytesIO()  # torch.save to a full disk gives no OSError, writing bytes does
    torch.save(content, buffer)
    with replacing(run.checkpoint) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(run: Run) -> None:
    """Put the run back as it was saved.

    Raises:
        ValueError: the checkpoint is unreadable, or of another run or architecture.
    """
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
    for name in ("epoch", "position", "loss_sum", "seconds", "curve"):
        setattr(run, name, content[name])
