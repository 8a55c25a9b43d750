"""Training: resumable bit for bit, the same run from the same seed, and losses composed as the paper says."""

import dataclasses
import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdig_utils.experiments import checkpoints, runs, steps
from kdig_utils.experiments.runs import Trained, student_run, teacher_run
from kdig_utils.experiments.side_by_side import fit
from kdig_utils.method import models, overlay, training
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec

ROOT = Path(__file__).resolve().parents[2]
IMAGES, K = 60, 17  # 17 blocks removed: the smallest student, so that a run takes a second
LONGEST_WAIT = 240  # seconds for another process to import torch on a busy machine


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def train(sample_train: ImageSet) -> ImageSet:
    return sample_train.subset(torch.arange(IMAGES))


@pytest.fixture(scope="module")
def held_out(sample_test: ImageSet) -> ImageSet:
    return sample_test.subset(torch.arange(40))


@pytest.fixture(scope="module")
def signals(train: ImageSet, random_signals) -> TeacherSignals:
    return random_signals(train)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the loss and save after every step."""
    monkeypatch.setattr(steps, "CHECK_EVERY", 1)
    monkeypatch.setattr(steps, "SAVE_EVERY_SECONDS", 0.0)


def small(method: str = "kd_ig_at", **changed: object) -> RunSpec:
    return RunSpec(method, **{"k": K, "epochs": 2, "batch_size": 16, "overlay_probability": 0.5, **changed})


def same(first: Trained, second: Trained) -> bool:
    """Bit for bit: weights, statistics, and every number of the curve but the seconds."""
    curves = (trained.curve.drop(columns="seconds") for trained in (first, second))
    return models.weights_sha256(first.model) == models.weights_sha256(second.model) and next(curves).equals(
        next(curves)
    )


def trained(
    spec: RunSpec, *images_signals_checkpoint: object, report: Callable[[str], None] = lambda line: None
) -> Trained:
    """The run of a student, trained to its end; the arguments are those of `student_run`."""
    return fit(student_run(spec, *images_signals_checkpoint), report)


def trained_teacher(
    spec: TeacherSpec, *images_initial_checkpoint: object, report: Callable[[str], None] = lambda line: None
) -> Trained:
    return fit(teacher_run(spec, *images_initial_checkpoint), report)


def stop_after(lines: int):
    seen = []

    def report(line: str) -> None:
        seen.append(line)
        if len(seen) == lines:
            raise Stop

    return report


def test_a_shorter_run_of_a_student_is_the_beginning_of_a_longer_one(train: ImageSet, held_out: ImageSet) -> None:
    """The learning rate is constant and the draws depend on seed and epoch alone, so epochs can be added later."""
    short, long = (trained(small("student", epochs=n), train, held_out).curve for n in (1, 2))
    assert short.drop(columns="seconds").equals(long.drop(columns="seconds").head(1))


# The loop to read


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
@pytest.mark.parametrize("method", ["student", "kd", "ig", "kd_ig_at"])
def test_the_loop_to_read_and_the_engine_train_the_same_bit_for_bit(
    train: ImageSet, held_out: ImageSet, signals: TeacherSignals, method: str, schedule: str
) -> None:
    spec = small(method, schedule=schedule, pairing="shuffled", seed=3)
    assert IMAGES % spec.batch_size  # the last batch is a smaller one
    model, epoch_losses = training.train_student(spec, train, signals)
    engine = trained(spec, train, held_out, signals)
    assert models.weights_sha256(model) == models.weights_sha256(engine.model)
    assert epoch_losses == engine.curve["train_loss"].tolist()
    assert not model.training


def test_the_loop_to_read_and_the_engine_start_a_smaller_student_from_the_same_teacher(
    sample_train: ImageSet, held_out: ImageSet, random_signals
) -> None:
    own = {"stem_stride": 2, "initial": "teacher", "weight_decay": 0.01, "train_images": 40, "pairing": "black"}
    spec, teacher = small("ig", k=9, epochs=1, **own), models.teacher(1).eval()
    signals = random_signals(sample_train)
    model, _losses = training.train_student(spec, sample_train, signals, teacher)
    engine = fit(student_run(spec, sample_train, held_out, signals, teacher=teacher))
    assert models.weights_sha256(model) == models.weights_sha256(engine.model)
    start = training.initial_student(spec, teacher).features.state_dict()
    assert all(torch.equal(value, teacher.features.state_dict()[name]) for name, value in start.items())


def test_the_loop_to_read_takes_the_same_share_of_the_images_and_asks_the_teacher_about_the_same_crops(
    sample_train: ImageSet, held_out: ImageSet, random_signals
) -> None:
    spec = small("kd", answers="online", train_fraction=0.05, validation_images=100, epochs=1)
    signals, teacher = random_signals(sample_train), models.teacher(1).eval()
    model, _losses = training.train_student(spec, sample_train, signals, teacher)
    engine = fit(student_run(spec, sample_train, held_out, signals, teacher=teacher))
    assert models.weights_sha256(model) == models.weights_sha256(engine.model)


# The compiled network


def test_a_network_that_cannot_be_compiled_is_called_as_it_is(train: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler: the runs are the same, and the log says why they are slower."""
    asked, lines = [], []

    def no_compiler(_function: object, **_options: object) -> object:
        def fail(*_arguments: object) -> None:
            asked.append(1)
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    network = runs.compiled_network(lines.append)
    run = student_run(small("student"), train, train, network=network)
    plain = student_run(small("student"), train, train)
    assert models.weights_sha256(fit(run).model) == models.weights_sha256(fit(plain).model)
    assert len(asked) == len(lines) == 1  # what failed once is not tried again
    assert "no working C++ compiler" in lines[0]


def test_only_full_batches_go_through_the_compiled_network(train: ImageSet) -> None:
    """The last, smaller batch of an epoch would have to be compiled for itself."""
    sizes = []

    def network(model: models.Student, images: Tensor, tap: int) -> tuple[Tensor, Tensor]:
        sizes.append(len(images))
        return models.logits_and_features(model, images, tap)

    spec = small("student", epochs=2)
    fit(student_run(spec, train, train, network=network))
    assert len(train) % spec.batch_size  # there is a smaller one
    assert sizes == [spec.batch_size] * (2 * (len(train) // spec.batch_size))


def test_one_compiled_network_serves_all_methods(
    train: ImageSet, monkeypatch: pytest.MonkeyPatch, random_signals
) -> None:
    """Captured by PyTorch's own compiler front end, without the back end that takes a minute: the same losses."""
    compile_, signals = torch.compile, random_signals(train)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    network = runs.compiled_network(pytest.fail)
    batch = overlay.draw_epoch(len(train), 0.5, 0, 0).batch(0, small().batch_size)
    for method in METHODS:
        arguments = (models.student(K), train, signals, batch, small(method))
        found = training.student_loss(*arguments, network=network)
        assert torch.allclose(found, training.student_loss(*arguments), rtol=1e-5)


# Resume


@pytest.mark.parametrize("method", ["student", "kd_ig_at"])
def test_stopped_anywhere_and_resumed_ends_bit_for_bit(
    train: ImageSet, held_out: ImageSet, signals: TeacherSignals, tmp_path: Path, often: None, method: str
) -> None:
    spec = small(method)
    whole = trained(spec, train, held_out, signals)
    for lines in range(1, 10):  # 4 steps and 1 line at the end of each of 2 epochs
        checkpoint = tmp_path / f"{lines}.pt"
        with pytest.raises(Stop):
            trained(spec, train, held_out, signals, checkpoint, report=stop_after(lines))
        lines_of_resume = []
        resumed = trained(spec, train, held_out, signals, checkpoint, report=lines_of_resume.append)
        assert "goes on" in lines_of_resume[0]
        assert same(whole, resumed), f"stopped after {lines} reports"
    print("9 places to stop, seed 0")


def test_stopped_again_and_again_ends_bit_for_bit(
    train: ImageSet, held_out: ImageSet, signals: TeacherSignals, tmp_path: Path, often: None
) -> None:
    spec, stops = small(), 0
    while True:
        try:
            resumed = trained(spec, train, held_out, signals, tmp_path / "c.pt", report=stop_after(2))
            break
        except Stop:
            stops += 1
    assert stops >= 3
    assert same(trained(spec, train, held_out, signals), resumed)


def test_teacher_stopped_and_resumed_ends_bit_for_bit(
    train: ImageSet, held_out: ImageSet, tmp_path: Path, often: None
) -> None:
    """Dropout, momentum and the one-cycle schedule go on as if nothing had happened."""
    few, initial = train.subset(torch.arange(24)), models.teacher(5)
    spec = TeacherSpec(epochs=2, batch_size=8, initial_sha256=models.weights_sha256(initial))
    whole = trained_teacher(spec, few, held_out, initial)
    with pytest.raises(Stop):
        trained_teacher(spec, few, held_out, initial, tmp_path / "t.pt", report=stop_after(2))
    assert same(whole, trained_teacher(spec, few, held_out, initial, tmp_path / "t.pt"))


def test_finished_run_that_is_called_again_only_loads(
    train: ImageSet, held_out: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small("student")
    first = trained(spec, train, held_out, None, tmp_path / "c.pt")
    monkeypatch.setattr(steps.Steps, "step", lambda *_arguments: pytest.fail("trained again"))
    assert same(first, trained(spec, train, held_out, None, tmp_path / "c.pt"))


CHILD = """
    import sys, time, torch
    from pathlib import Path
    from kdig_utils.experiments import runs, side_by_side, steps
    from kdig_utils.method import cifar10, models
    from kdig_utils.method.spec import RunSpec
    torch.set_num_threads({threads})
    steps.CHECK_EVERY, steps.SAVE_EVERY_SECONDS = 1, 0.0
    train = cifar10.load_sample("train").subset(torch.arange({images}))
    test = cifar10.load_sample("test").subset(torch.arange(40))
    spec = RunSpec("student", k={k}, epochs=2, batch_size=16, overlay_probability=0.5, seed=int(sys.argv[1]))
    def report(line):
        print(line, flush=True)
        time.sleep(float(sys.argv[3]))
    trained = side_by_side.fit(runs.student_run(spec, train, test, None, Path(sys.argv[2])), report)
    print(models.weights_sha256(trained.model), flush=True)
"""


def child(checkpoint: Path, seed: int = 0, pause: float = 0.0) -> subprocess.Popen:
    code = textwrap.dedent(CHILD).format(threads=torch.get_num_threads(), images=IMAGES, k=K)
    command = [sys.executable, "-c", code, str(seed), str(checkpoint), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(7 + seed)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def test_killed_process_and_another_process_end_bit_for_bit(
    train: ImageSet, held_out: ImageSet, tmp_path: Path
) -> None:
    """One process runs through, one is killed mid-epoch and resumed here; this process ends the same without a stop."""
    whole = trained(small("student"), train, held_out)
    other, victim = child(tmp_path / "other.pt"), child(tmp_path / "victim.pt", pause=3.0)
    try:
        for _line in range(2):
            assert victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(LONGEST_WAIT) == -signal.SIGKILL
        resumed = trained(small("student"), train, held_out, None, tmp_path / "victim.pt")
        output, _errors = other.communicate(timeout=LONGEST_WAIT)
    finally:
        for process in (other, victim):
            process.kill()
            process.stdout.close()
            process.wait(LONGEST_WAIT)
    assert same(whole, resumed)
    assert output.split()[-1] == models.weights_sha256(whole.model)


# Seeds


def test_same_seed_is_the_same_run_and_another_is_another(
    train: ImageSet, held_out: ImageSet, signals: TeacherSignals
) -> None:
    first, again, other = (trained(small(seed=seed), train, held_out, signals) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_a_run_depends_on_no_global_generator_and_leaves_it(train: ImageSet, held_out: ImageSet) -> None:
    few, spec = train.subset(torch.arange(16)), TeacherSpec(epochs=1, batch_size=8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained_teacher(spec, few, held_out)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, trained_teacher(spec, few, held_out))


# A loss that is not finite


def test_huge_learning_rate_stops_with_its_value(train: ImageSet, held_out: ImageSet, often: None) -> None:
    with pytest.raises(steps.TrainingDiverged, match=r"the loss is (nan|inf) in epoch \d.*learning rate \(1e\+30\)"):
        trained(small("student", learning_rate=1e30, epochs=5), train, held_out)


def test_nan_map_stops_the_run_and_the_last_checkpoint_goes_on(
    train: ImageSet, held_out: ImageSet, signals: TeacherSignals, tmp_path: Path
) -> None:
    spec = small("ig")
    first, second = (overlay.draw_epoch(IMAGES, 0.5, spec.seed, epoch) for epoch in (0, 1))
    only_later = set(second.order[second.overlaid].tolist()) - set(first.order[first.overlaid].tolist())
    maps = signals.maps.clone()
    maps[min(only_later)] = float("nan")
    with pytest.raises(steps.TrainingDiverged, match=r"the loss is nan in epoch 2.*check the teacher's signals"):
        trained(spec, train, held_out, dataclasses.replace(signals, maps=maps), tmp_path / "c.pt")
    repaired = trained(spec, train, held_out, signals, tmp_path / "c.pt")
    assert same(repaired, trained(spec, train, held_out, signals))


def test_weights_that_burst_in_the_last_step_do_not_count_as_trained(
    train: ImageSet, held_out: ImageSet, tmp_path: Path
) -> None:
    """The last loss was finite, the step after it was not survived."""
    spec = small("student", epochs=1, batch_size=IMAGES, learning_rate=1e38)
    with pytest.raises(steps.TrainingDiverged):
        trained(spec, train, held_out, None, tmp_path / "c.pt")


# Signals, checkpoints and weights that do not fit


def test_a_run_refuses_signals_of_other_images(train: ImageSet, held_out: ImageSet, random_signals) -> None:
    others = random_signals(train.subset(torch.arange(IMAGES // 2)))
    with pytest.raises(ValueError, match="signals are those of other images"):
        student_run(small("kd"), train, held_out, others)


def test_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(
    train: ImageSet, held_out: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, spec = tmp_path / "c.pt", small("student")
    finished = []

    def full(source: object, target: object) -> None:
        finished.append(target)
        if len(finished) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"cannot write c\.pt in .*disk is full: free some space"):
            trained(spec, train, held_out, None, checkpoint)
    lines = []
    assert same(
        trained(spec, train, held_out, None, checkpoint, report=lines.append),
        trained(spec, train, held_out),
    )
    assert "goes on at epoch 2" in lines[0]
    assert not list(tmp_path.glob(".*.part"))


def test_checkpoint_of_another_run_is_refused_and_kept(train: ImageSet, held_out: ImageSet, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.pt"
    mine = small("student")
    trained(mine, train, held_out, None, checkpoint)
    before = checkpoint.read_bytes()
    other = small("student", seed=9)
    with pytest.raises(ValueError, match=f"is of run {mine.run_id} .*not of {other.run_id}") as caught:
        trained(other, train, held_out, None, checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("content", ["truncated", "empty", "garbage", "not a checkpoint"])
def test_damaged_checkpoint_is_named_with_a_remedy(
    train: ImageSet, held_out: ImageSet, tmp_path: Path, content: str
) -> None:
    checkpoint, spec = tmp_path / "c.pt", small("student", epochs=1)
    trained(spec, train, held_out, None, checkpoint)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": bytes(5000)}.get(content, whole)
    )
    if content == "not a checkpoint":
        torch.save({"weights": torch.zeros(1)}, checkpoint)
    with pytest.raises(ValueError, match=r"is damaged.*delete it to start the run afresh") as caught:
        trained(spec, train, held_out, None, checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_checkpoint_with_code_in_it_is_not_executed(train: ImageSet, held_out: ImageSet, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    (tmp_path / "c.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="is damaged"):
        trained(small("student"), train, held_out, None, tmp_path / "c.pt")
    assert not marker.exists()


def test_teacher_that_starts_from_other_weights_is_refused(train: ImageSet, held_out: ImageSet) -> None:
    with pytest.raises(ValueError, match="starts from weights 0123456789ab, got none"):
        trained_teacher(TeacherSpec(initial_sha256="0123456789ab"), train, held_out)
    with pytest.raises(ValueError, match="starts from weights none, got "):
        trained_teacher(TeacherSpec(), train, held_out, models.teacher())


# What comes out


def test_curve_has_a_row_an_epoch_in_per_cent(train: ImageSet, held_out: ImageSet) -> None:
    even = train.subset(torch.cat([torch.nonzero(train.labels == label).flatten()[:2] for label in range(10)]))
    run = trained(small("student", epochs=3, validation_images=10), even, held_out)
    curve = run.curve
    assert curve["epoch"].tolist() == [1, 2, 3]
    assert not run.model.training
    assert (
        curve[["test_accuracy", "validation_accuracy"]]
        .isin([100 * i / n for n in (10, 40) for i in range(n + 1)])
        .all(axis=None)
    )
    assert curve["seconds"].is_monotonic_increasing
    assert curve["train_loss"].between(0, 10).all()
    assert curve["test_accuracy"].iloc[-1] == models.accuracy(run.model, held_out)


@pytest.fixture(scope="module")
def half_way(
    train: ImageSet, held_out: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunSpec, bytes, dict]:
    """A run after one of its two epochs: its spec, its checkpoint, and what is in it."""
    path, spec = tmp_path_factory.mktemp("half_way") / "c.pt", small("student", epochs=2)

    def stop(_line: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        trained(spec, train, held_out, None, path, report=stop)
    return spec, path.read_bytes(), checkpoints.read(path)


def test_a_flipped_bit_in_a_checkpoint_is_refused_wherever_it_is(half_way: tuple[RunSpec, bytes, dict]) -> None:
    content, generator = half_way[1], random.Random(0)
    places = [*range(0, 100, 7), *(generator.randrange(len(content)) for _place in range(60)), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.read(bytes(damaged))
    print(f"{len(places)} flipped bits of {8 * len(content):,}, seed 0")


def test_a_checkpoint_from_before_is_read_unless_its_checksums_tell(half_way: tuple[RunSpec, bytes, dict]) -> None:
    """They have no hash; torch.save's own checksums are of the tensors, not of the padding between them."""
    _spec, content, right = half_way
    old = content.partition(b"\n")[2]
    assert str(checkpoints.read(old)["curve"]) == str(right["curve"])
    weights = next(value for name, value in right["model"].items() if name.endswith("running_var"))
    damaged = bytearray(old)
    damaged[old.index(weights.numpy().tobytes())] ^= 1
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.read(bytes(damaged))


@pytest.mark.parametrize(
    ("invented", "told"),
    [
        ({"epoch": 3}, "3 of 2 epochs"),
        ({"epoch": -1}, "-1 of 2 epochs"),
        ({"position": 10**6}, "image 1000000"),
        ({"epoch": 2}, "a curve of 1 epochs after 2"),
        ({"epoch": 0, "curve": []}, "an optimiser after"),
        ({"epoch": 2, "curve": "twice"}, "an optimiser after"),
        ({"optimizer": "untrained"}, "an optimiser after 0 steps"),
        ({"curve": "wrong"}, "values that are none"),
    ],
)
def test_a_checkpoint_that_no_training_made_is_refused(
    train: ImageSet,
    held_out: ImageSet,
    tmp_path: Path,
    half_way: tuple[RunSpec, bytes, dict],
    invented: dict,
    told: str,
) -> None:
    spec, _content, right = half_way
    (row,) = right["curve"]
    words = {
        "twice": [row, {**row, "epoch": 2, "test_accuracy": 99.9}],
        "wrong": [{**row, "test_accuracy": 999.0}],
        "untrained": {**right["optimizer"], "state": {}},
    }
    content = {**right, **{name: words.get(str(value), value) for name, value in invented.items()}}
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=rf"{told}.*delete it"):
        trained(spec, train, held_out, None, tmp_path / "c.pt")
    torch.save(right, tmp_path / "c.pt")
    assert same(trained(spec, train, held_out, None, tmp_path / "c.pt"), trained(spec, train, held_out))
