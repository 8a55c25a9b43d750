"""The loop: a run ends the same alone, beside others, cut off, or recorded; and a budget is kept."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdig_utils.experiments import checkpoints, side_by_side
from kdig_utils.experiments import steps as steps_module
from kdig_utils.experiments.runs import Run, Trained, student_run, teacher_run
from kdig_utils.experiments.side_by_side import Pace, Waiting, Way, fit, train_together
from kdig_utils.experiments.steps import RecordingFailed, Steps, TrainingDiverged
from kdig_utils.method import models, training
from kdig_utils.method.cifar10 import ImageSet, first_of_each_class
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec, TeacherSpec

IMAGES = 50
Make = Callable[..., Run]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(scope="module")
def train(sample_train: ImageSet) -> ImageSet:
    return sample_train.subset(first_of_each_class(sample_train.labels, IMAGES // 10))


@pytest.fixture(scope="module")
def held_out(sample_test: ImageSet) -> ImageSet:
    return sample_test.subset(torch.arange(40))


@pytest.fixture(scope="module")
def student(train: ImageSet, held_out: ImageSet) -> Make:
    """A student's run on these images, ready to be trained."""
    return lambda spec, signals=None, checkpoint=None, **options: student_run(
        spec, train, held_out, signals, checkpoint, **options
    )


def small(method: str = "student", **changed: object) -> RunSpec:
    return RunSpec(method, **{"k": 17, "epochs": 2, "batch_size": 16, **changed})


DIFFERENT = (
    small(seed=1),
    small("student", seed=2, epochs=3),
    small("student", seed=3, k=15, epochs=1),
    small("student", seed=4, train_fraction=0.8, learning_rate=1e-2),
)


COSINE = TeacherSpec(epochs=2, batch_size=4, schedule="cosine", cutout=8)  # without momenta, so it is recorded


def same(first: Trained, second: Trained) -> bool:
    """Bit for bit: weights, statistics, and every number of the curve but the seconds."""
    curves = [trained.curve.drop(columns="seconds") for trained in (first, second)]
    return models.weights_sha256(first.model) == models.weights_sha256(second.model) and curves[0].equals(curves[1])


# Side by side


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_each_run_ends_beside_others_as_it_ends_alone(student: Make, at_once: int) -> None:
    """Bit for bit, with other methods' k, epochs, learning rates and numbers of images beside it."""
    alone = {spec.run_id: fit(student(spec)) for spec in DIFFERENT}
    together = list(train_together((student(spec) for spec in DIFFERENT), Way(at_once)))
    assert {run.spec.run_id for run in together} == set(alone)
    assert all(same(run.trained, alone[run.spec.run_id]) for run in together)
    print(f"{len(together)} runs, {at_once} at once")


def test_a_run_is_handed_over_before_another_one_starts(student: Make) -> None:
    made = []

    def runs() -> Iterator[Run]:
        for spec in DIFFERENT:
            made.append(spec.run_id)
            yield student(spec)

    for finished, _run in enumerate(train_together(runs(), way=Way(2)), start=1):
        assert len(made) <= finished + 1
    assert len(made) == len(DIFFERENT)


def test_runs_side_by_side_share_the_time(student: Make) -> None:
    started = time.monotonic()
    runs = list(train_together((student(small(seed=seed)) for seed in range(3)), way=Way(3)))
    assert 0 < sum(run.seconds for run in runs) < time.monotonic() - started


def test_runs_with_dropout_are_refused_beside_others(train: ImageSet, held_out: ImageSet) -> None:
    """They draw from the one global generator, so each would end otherwise than alone."""
    runs = (teacher_run(TeacherSpec(seed=seed, epochs=1), train, held_out) for seed in range(2))
    with pytest.raises(ValueError, match=r"dropout shares its random numbers.*train it alone"):
        list(train_together(runs, way=Way(2)))


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("n_images", [16, IMAGES])  # seen in the weights after the only step, or in the loss
def test_a_run_that_diverges_is_dropped_and_named_when_the_others_are_done(
    train: ImageSet, held_out: ImageSet, at_once: int, n_images: int
) -> None:
    few, wild = train.subset(torch.arange(n_images)), small(seed=1, learning_rate=1e39, epochs=1)
    specs, lines = [small(), wild, small(seed=2)], []
    runs = train_together((student_run(spec, few, held_out) for spec in specs), Way(at_once), report=lines.append)
    ended = [next(runs), next(runs)]
    with pytest.raises(TrainingDiverged, match=rf"^run {wild.run_id}: [^;]*lower the learning rate[^;]*$"):
        next(runs)
    assert {run.spec.seed for run in ended} == {0, 2}
    assert all(same(run.trained, fit(student_run(run.spec, few, held_out))) for run in ended)
    assert sum("has diverged and is dropped" in line for line in lines) == 1


def test_a_run_that_diverged_keeps_its_last_good_checkpoint(student: Make, tmp_path: Path) -> None:
    run = student(small(), None, tmp_path / "c.pt")

    def spoil(line: str) -> None:
        if "epoch 1/2" in line:
            run.loss_sum.fill_(math.nan)

    with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 2"):
        list(train_together([run], report=spoil))
    assert same(fit(student(small(), None, tmp_path / "c.pt")), fit(student(small())))


# The time


def test_a_runs_seconds_hold_its_measuring(student: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = steps_module.measure

    def slow(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.1)
        return measure(run)

    monkeypatch.setattr(steps_module, "measure", slow)
    runs = list(train_together((student(small(seed=s, epochs=1)) for s in (0, 1)), way=Way(2)))
    assert [run.seconds for run in runs] == pytest.approx([run.curve[-1]["seconds"] for run in runs])
    assert sum(run.seconds for run in runs) > 0.2


# The budget


def test_nothing_starts_after_the_deadline(student: Make) -> None:
    assert not list(train_together(iter([student(small())]), deadline=time.monotonic() - 1))


def test_runs_cut_off_by_the_deadline_go_on_bit_for_bit(student: Make, tmp_path: Path) -> None:
    specs = [small(seed=seed, epochs=4) for seed in range(2)]

    def runs() -> Iterator[Run]:
        return (student(spec, None, tmp_path / f"{spec.run_id}.pt") for spec in specs)

    turns, finished = 0, []
    while len(finished) < 2:
        turns += 1
        cut = time.monotonic() + 0.15 * 1.05**turns  # later and later, for a machine that is busy
        finished = list(train_together(runs(), way=Way(2), deadline=cut))
        assert turns < 100
    assert turns > 1
    for run in finished:
        assert same(run.trained, fit(student(run.spec)))
    print(f"{turns} calls of 0.15 s and more")


def paced(seconds_left: float, an_epoch: float) -> Pace:
    pace = Pace(time.monotonic() + seconds_left)
    pace.seconds = an_epoch
    return pace


def waiting(student: Make, done: list[int]) -> list[Steps]:
    runs = [student(small(seed=seed, epochs=10)) for seed in range(len(done))]
    for run, epoch in zip(runs, done, strict=True):
        run.epoch = epoch
    return [Steps(run, print) for run in runs]


def test_runs_that_would_not_end_make_way_for_those_that_do(student: Make) -> None:
    """Four runs of ten seconds an epoch, eight epochs left, 170 seconds: two end, the two most advanced."""
    steps, queue = waiting(student, [2, 5, 4, 3]), Waiting(iter([]))
    kept = side_by_side.put_aside(steps, paced(170, an_epoch=10), queue, print)
    assert [each.run.epoch for each in kept] == [5, 4]
    assert queue.next([], paced(170, an_epoch=10)).epoch == 3  # the most advanced of those put aside goes on first
    assert side_by_side.put_aside(kept, paced(1, an_epoch=10), queue, print)[0].run.epoch == 5  # one always goes on
    assert side_by_side.put_aside(steps, Pace(math.inf), queue, print) == steps


def test_another_run_starts_only_if_all_end_beside_each_other(student: Make) -> None:
    """It takes ten epochs of ten seconds, slows down each run beside it, and a tenth is kept in hand."""
    (active,) = waiting(student, [0])
    run = student(small(seed=9, epochs=10))
    assert paced(225, an_epoch=10).another_ends([active], run)
    assert not paced(215, an_epoch=10).another_ends([active], run)
    longer = student(small(seed=9, epochs=20))
    assert not paced(400, an_epoch=10).another_ends([active], longer)
    assert Pace(time.monotonic() + 1).another_ends([active], run)  # nothing is known yet


def test_a_run_alone_starts_although_it_will_not_end(student: Make, tmp_path: Path) -> None:
    """No minute is lost: what it has done by the deadline is in its checkpoint."""
    run = student(small(epochs=1000), None, tmp_path / "c.pt")
    assert not list(train_together([run], deadline=time.monotonic() + 2))
    saved = checkpoints.read(tmp_path / "c.pt")
    assert saved["epoch"] + saved["position"] > 0


def test_a_run_put_aside_goes_on_when_the_others_are_done(student: Make) -> None:
    """Bit for bit as one that was never put aside."""
    run, queue = student(small(epochs=3)), Waiting(iter([]))
    steps = Steps(run, print)
    side_by_side.train_round([steps], math.inf, print)
    queue.aside.append(run)
    assert queue.next([], Pace(math.inf)) is run
    assert queue.next([], Pace(math.inf)) is None
    assert same(fit(run), fit(student(small(epochs=3))))


def test_the_first_round_tells_no_speed(student: Make) -> None:
    """Kernels are loaded and compiled in it."""
    steps, pace = waiting(student, [0]), Pace(math.inf)

    def train_for(seconds: float) -> None:
        time.sleep(seconds)
        steps[0].run.epoch += 1

    for seconds in (0.5, 0.01):
        pace.round_of(steps, lambda _active, seconds=seconds: train_for(seconds))
    assert 0.01 <= pace.seconds < 0.4


# The memory


def memory_for(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only so many runs be made at once."""
    made = Steps.__init__

    def limited(steps: Steps, run: Run, report: object, recorded: bool = True) -> None:
        if sum(1 for each in ALIVE if not each.finished) >= count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ALIVE.append(run)
        made(steps, run, report, recorded)

    ALIVE.clear()
    monkeypatch.setattr(Steps, "__init__", limited)


ALIVE: list[Run] = []


def test_out_of_memory_halves_what_runs_side_by_side_and_loses_no_run(
    student: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {seed: fit(student(small(seed=seed))) for seed in range(6)}
    memory_for(3, monkeypatch)
    lines: list[str] = []
    runs = (student(small(seed=seed)) for seed in range(6))
    ended = list(train_together(runs, Way(4), report=lines.append))
    assert all(same(run.trained, alone[run.spec.seed]) for run in ended)
    assert len(ended) == 6
    assert sum("2 from now on" in line for line in lines) == 1


def test_memory_that_holds_no_run_is_said(student: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="does not hold one run"):
        list(train_together([student(small())], Way(4)))


# Steps


class NoReadsOfTheDevice(TorchDispatchMode):
    """What a stream that captures refuses: an operation whose outcome the host waits for."""

    def __torch_dispatch__(
        self, function: torch._ops.OpOverload, _types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


def signals_of(images: ImageSet, side: int) -> TeacherSignals:
    n, generator = len(images), torch.Generator().manual_seed(0)
    return TeacherSignals(
        torch.randn(n, 10, generator=generator),
        torch.rand(n, 32, 32, generator=generator).half(),
        torch.rand(n, side * side, generator=generator),
        torch.zeros(n),
        {"teacher_sha256": "", "indices": images.indices.tolist(), "settings": {"tap": models.attention_tap(17)}},
    )


KINDS = ("student", "every signal", "answers online", "teacher by cosine")


def run_of(kind: str, train: ImageSet, held_out: ImageSet, device: str = "cpu") -> Run:
    if kind == "teacher by cosine":
        return teacher_run(COSINE, train, held_out, device=device)
    specs = {"student": small(), "every signal": small("kd_ig_at"), "answers online": small("kd", answers="online")}
    teacher = models.teacher(0).eval().to(device)
    return student_run(specs[kind], train, held_out, signals_of(train, side=32), device=device, teacher=teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_back_from_the_device(train: ImageSet, held_out: ImageSet, kind: str) -> None:
    """Else it could not be recorded: the host would need a number that is not computed while a stream captures."""
    steps = Steps(run_of(kind, train, held_out), print)
    steps.load_epoch()
    steps.step(4)
    with NoReadsOfTheDevice():
        steps.step(4)
    with pytest.raises(AssertionError, match="waits for the device"), NoReadsOfTheDevice():
        _rate = steps.rates[steps.place]  # what such a line would be


def test_a_recorded_teacher_follows_its_schedule(train: ImageSet, held_out: ImageSet) -> None:
    """The rate that each step takes on the device is that of the schedule, number by number."""
    few = train.subset(torch.arange(12))
    run = teacher_run(COSINE, few, held_out)
    steps, rates = Steps(run, print), []
    for run.epoch in range(2):
        steps.load_epoch()
        for _step in range(3):
            steps.step(4)
            rates.append(float(run.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx(training.schedule(COSINE, 3)[0])


def test_tf32_is_off_while_a_run_is_trained_and_as_it_was_afterwards(student: Make) -> None:
    seen = []
    run = student(small(epochs=1))
    run.model.register_forward_hook(lambda *_arguments: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    fit(run)
    assert set(seen) == {False}  # in training and in measuring
    assert torch.backends.cudnn.allow_tf32 == before


@settings(max_examples=200, deadline=None, derandomize=True)
@given(n=st.integers(1, 5000), batch=st.integers(2, 300), done=st.integers(0, 20), recorded=st.booleans())
def test_pieces_cover_the_rest_of_an_epoch_once(n: int, batch: int, done: int, recorded: bool) -> None:
    position = min(done * batch, n // batch * batch)
    steps = Steps.__new__(Steps)
    steps.run = Run(small(batch_size=batch), nn.Linear(1, 1), None, None, n, None)
    steps.stream = object() if recorded else None
    pieces = steps.pieces(position)
    assert sum(count * size for count, size in pieces) == n - position
    assert all(size == batch for _count, size in pieces[:-1])
    assert len(set(pieces)) <= 3  # as many recordings are made


def test_warming_up_leaves_no_trace(student: Make) -> None:
    """Steps on the live network move weights, statistics and optimiser; put back, the run ends as if without them."""
    whole = fit(student(small()))
    run = student(small())
    steps = Steps(run, print)
    model, optimizer = checkpoints.copied(run.model.state_dict()), []
    steps.load_epoch()
    for _step in range(3):
        steps.step(16)
    assert not torch.equal(run.model.state_dict()["features.0.1.running_mean"], model["features.0.1.running_mean"])
    checkpoints.restore(run, model, optimizer)
    run.loss_sum.zero_()
    assert same(fit(run), whole)


class FakeGraph:
    """What a recording does, without a GPU: `replay` makes the steps that were made while it was recorded."""

    recording = None

    def __init__(self) -> None:
        self.calls = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        for steps, size in self.calls:
            STEP(steps, size)


STEP = Steps.step


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU play a GPU that records: streams do nothing, a recording notes the calls of `step`."""

    def noted(steps: Steps, size: int) -> None:
        if FakeGraph.recording is not None:
            FakeGraph.recording.calls.append((steps, size))
            steps.place.zero_()
        STEP(steps, size)  # a real recording computes nothing, so this is the harder case

    @contextlib.contextmanager
    def graph(recorded: FakeGraph, pool: object, stream: object) -> Iterator[None]:
        FakeGraph.recording = recorded
        yield
        FakeGraph.recording = None

    def recording_steps(steps: Steps, run: Run, report: object, recorded: bool = True) -> None:
        INIT(steps, run, report)
        steps.stream = FakeStream() if recorded else None
        steps.graphs = {} if run.finished or not recorded else steps_module.record(steps)

    monkeypatch.setattr(Steps, "__init__", recording_steps)
    monkeypatch.setattr(Steps, "step", noted)
    for name, fake in {
        "CUDAGraph": FakeGraph, "graph": graph, "synchronize": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda device: None,
        "mem_get_info": lambda device: (10**12, 10**12), "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Steps, "bytes", 0, raising=False)
    monkeypatch.setattr(torch.random, "fork_rng", FORK_ON_CPU)


@contextlib.contextmanager
def FORK_ON_CPU(devices: object = ()) -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


INIT = Steps.__init__


class FakeStream:
    def wait_stream(self, other: object) -> None:
        pass

    def record_event(self) -> "FakeStream":
        return self

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("n_images", [50, 48, 10])
def test_replayed_run_ends_as_a_called_one(
    train: ImageSet, held_out: ImageSet, request: pytest.FixtureRequest, n_images: int
) -> None:
    """With the recording machinery of a GPU, played by the CPU: warm-up, recordings of every kind, restoration."""
    few = train.subset(torch.arange(n_images))
    specs = [small(seed=seed, batch_size=4) for seed in range(2)]
    called = [fit(student_run(spec, few, held_out)) for spec in specs]
    request.getfixturevalue("fake_gpu")
    replayed = list(train_together((student_run(spec, few, held_out) for spec in specs), way=Way(2)))
    assert all(same(run.trained, alone) for run, alone in zip(replayed, called, strict=True))


def test_replayed_teacher_ends_as_a_called_one(
    train: ImageSet, held_out: ImageSet, request: pytest.FixtureRequest
) -> None:
    """Its learning rate and the random numbers of its dropout move under the recording."""
    few = train.subset(torch.arange(18))
    called = fit(teacher_run(COSINE, few, held_out))
    request.getfixturevalue("fake_gpu")
    assert same(fit(teacher_run(COSINE, few, held_out)), called)


ONE_CYCLE = {"schedule": "one_cycle", "epochs": 3, "learning_rate": 4e-3}


@pytest.mark.parametrize("changed", [{}, ONE_CYCLE], ids=["constant", "one_cycle"])
@pytest.mark.parametrize(("method", "pairing"), [("student", "matched"), ("kd_ig", "matched"), ("kd_ig", "shuffled")])
def test_a_recording_used_again_gives_the_run_that_a_new_one_gives(
    student: Make, train: ImageSet, request: pytest.FixtureRequest, changed: dict, method: str, pairing: str
) -> None:
    """Weights, optimiser, statistics, the run's own shuffled signals and its rates: all are copied into place."""
    specs = [small(method, seed=seed, batch_size=4, pairing=pairing, **changed) for seed in range(3)]
    signals = signals_of(train, side=32)
    called = [fit(student(spec, signals)) for spec in specs]
    request.getfixturevalue("fake_gpu")
    recordings = count_recordings(request.getfixturevalue("monkeypatch"))
    replayed = list(train_together(student(spec, signals) for spec in specs))
    assert all(same(run.trained, alone) for run, alone in zip(replayed, called, strict=True))  # the first ones too
    assert len(recordings) == 1


def count_recordings(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    made, record = [], steps_module.record

    def noted(steps: Steps) -> dict:
        made.append(steps.run)
        return record(steps)

    monkeypatch.setattr(steps_module, "record", noted)
    return made


def test_unlike_runs_share_no_recording(
    student: Make, train: ImageSet, fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings, signals = count_recordings(monkeypatch), signals_of(train, side=32)
    specs = [
        small(), small(learning_rate=2e-3), small("kd"), small("kd", pairing="shuffled"), small("kd", alpha=0.5),
        small(batch_size=8), small(train_fraction=0.8), small(seed=1, train_fraction=0.8),
    ]  # fmt: skip
    ended = list(train_together(student(spec, signals) for spec in specs))
    assert len(ended) == len(recordings) == len(specs)


def test_a_run_resumed_on_a_recording_of_another_ends_as_if_alone(
    student: Make, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    first, second = small(batch_size=4), small(seed=1, batch_size=4)
    called = fit(student(second))
    with pytest.raises(InterruptedError):
        fit(student(second, None, tmp_path / "c.pt"), report=stop)
    request.getfixturevalue("fake_gpu")
    runs = [student(first), student(second, None, tmp_path / "c.pt")]
    assert same(list(train_together(iter(runs)))[1].trained, called)


def test_a_recording_that_fails_loses_nothing_and_names_the_other_way(
    student: Make, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """CUDA can do nothing more then: what runs beside it is saved, and called elsewhere it ends as if nothing was.

    Warm-up steps have moved the network of the one that failed by then: it is put back.
    """
    specs = [small(seed=seed, batch_size=4) for seed in range(2)]
    called = [fit(student(spec)) for spec in specs]
    request.getfixturevalue("fake_gpu")
    recorded = iter([FakeGraph] * 3)  # the pieces of the first run

    def graph() -> FakeGraph:
        if kind := next(recorded, None):
            return kind()
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    request.getfixturevalue("monkeypatch").setattr(torch.cuda, "CUDAGraph", graph)
    runs = [student(spec, None, tmp_path / f"{spec.seed}.pt") for spec in specs]
    before = models.weights_sha256(runs[1].model)
    with pytest.raises(RecordingFailed, match=r"--way called: .*not permitted when stream is capturing$"):
        list(train_together(iter(runs), Way(2)))
    assert models.weights_sha256(runs[1].model) == before
    assert (tmp_path / "0.pt").is_file()
    again = (student(spec, None, tmp_path / f"{spec.seed}.pt") for spec in specs)
    ended = list(train_together(again, Way(2, recorded=False)))
    assert all(same(run.trained, alone) for run, alone in zip(ended, called, strict=True))


@pytest.mark.parametrize(("epochs", "measured"), [(3, [1, 2, 3]), (20, [10, 20]), (25, [10, 20, 25])])
def test_a_long_run_is_measured_after_each_tenth_epoch_and_the_last(
    train: ImageSet, held_out: ImageSet, epochs: int, measured: list[int]
) -> None:
    curve = fit(student_run(small(epochs=epochs), train.subset(torch.arange(16)), held_out)).curve
    assert curve["epoch"].tolist() == list(range(1, epochs + 1))
    assert curve.dropna(subset="test_accuracy")["epoch"].tolist() == measured
    assert curve["train_loss"].notna().all()


def test_one_cycle_of_a_student_is_pytorchs_own(student: Make) -> None:
    """Linear up in the first fifth of the steps, linear down; each step finds its rate on the device."""
    run = student(small(epochs=5, batch_size=10, schedule="one_cycle", learning_rate=4e-3))
    seen = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(float(optimizer.param_groups[0]["lr"])))
    fit(run)
    top = seen.index(max(seen))
    assert len(seen) == 25
    assert max(seen) == pytest.approx(4e-3, rel=1e-6)
    assert top == 4
    rises, falls = (torch.tensor(part).diff() for part in (seen[: top + 1], seen[top:]))
    assert rises.min() == pytest.approx(float(rises.max()), rel=1e-3)
    assert falls.min() == pytest.approx(float(falls.max()), rel=1e-3)
    assert seen[-1] < 1e-6


@pytest.mark.slow
@NEEDS_GPU
def test_recorded_teacher_on_a_gpu_learns_as_the_one_it_calls(train: ImageSet, held_out: ImageSet) -> None:
    """Without dropout, whose random numbers are a GPU's own; one is recorded, the other one called step by step."""
    spec, losses = dataclasses.replace(COSINE, precision="float32", learning_rate=0.01), []
    for momenta in (None, [0.9] * 1000):
        run = teacher_run(spec, train, held_out, device="cuda")
        run.momenta, run.model.classifier[0].p = momenta, 0.0
        losses.append(fit(run).curve["train_loss"].to_numpy())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
@NEEDS_GPU
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_can_be_recorded_on_a_gpu(train: ImageSet, held_out: ImageSet, kind: str) -> None:
    trained = fit(run_of(kind, train, held_out, "cuda"))
    assert trained.curve["train_loss"].notna().all()


@pytest.mark.slow
@NEEDS_GPU
def test_recorded_on_a_gpu_it_ends_near_the_cpu(student: Make) -> None:
    """The same draws, the same losses, another arithmetic."""
    spec = small(precision="float32", batch_size=4)  # twelve full batches: a recording of ten steps, single ones
    alone = fit(student(spec))
    on_gpu = fit(student(spec, device="cuda"))
    assert on_gpu.curve["train_loss"].to_numpy() == pytest.approx(alone.curve["train_loss"].to_numpy(), rel=1e-3)


@pytest.mark.slow
@NEEDS_GPU
def test_recorded_side_by_side_on_a_gpu_each_ends_near_itself_alone(student: Make) -> None:
    specs = [small(seed=seed, precision="float32", batch_size=4) for seed in range(3)]
    alone = [fit(student(spec, device="cuda")).curve["train_loss"].tolist() for spec in specs]
    runs = list(train_together((student(spec, device="cuda") for spec in specs), way=Way(3)))
    for run, losses in zip(sorted(runs, key=lambda run: run.spec.seed), alone, strict=True):
        assert run.trained.curve["train_loss"].tolist() == pytest.approx(losses, rel=1e-3)


# The teacher's schedule


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_learning_rate_rises_to_the_highest_and_falls_to_nearly_nothing(name: str) -> None:
    rates, momenta = training.schedule(TeacherSpec(epochs=10, learning_rate=0.1, schedule=name), steps_an_epoch=20)
    top = rates.index(max(rates))
    assert len(rates) == 200
    assert max(rates) == pytest.approx(0.1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 1e-3 * max(rates)
    assert (momenta is None) == (name == "cosine")


def test_teacher_by_cosine_learns_and_resumes(train: ImageSet, held_out: ImageSet, tmp_path: Path) -> None:
    few = train.subset(torch.arange(16))
    spec = TeacherSpec(epochs=2, batch_size=8, schedule="cosine", cutout=8)
    whole = fit(teacher_run(spec, few, held_out))
    first = teacher_run(spec, few, held_out, None, tmp_path / "t.pt")
    with pytest.raises(InterruptedError):
        fit(first, report=stop)
    resumed = fit(teacher_run(spec, few, held_out, None, tmp_path / "t.pt"))
    assert same(whole, resumed)


def stop(_line: str) -> None:
    raise InterruptedError
