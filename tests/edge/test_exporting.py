"""Files for the edge, checked against PyTorch on real images."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdig_utils import machine
from kdig_utils.method import artifacts, cifar10, models, released

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from kdig_utils.edge import exporting, roofline, runtimes, serving  # noqa: E402

RELEASED = Path(__file__).parents[3] / "shared" / "reference" / "students"


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate(
        [session.run(None, {"images": part})[0] for part in np.array_split(images, max(1, len(images) // 100))]
    )


@pytest.fixture(scope="module")
def test_images() -> cifar10.ImageSet:
    return cifar10.load_sample("test").subset(torch.arange(200))


@pytest.fixture(scope="module", params=["teacher", "kd_ig_k5"])
def exported(request, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    network = artifacts.load(request.param)
    exporting.export_onnx(network, folder / "fp32.onnx")
    exporting.quantise_onnx(folder / "fp32.onnx", folder / "float_input.onnx")
    exporting.quantise_onnx(folder / "fp32.onnx", folder / "int8.onnx", takes_bytes=True)
    return network, folder


def test_float32_files_compute_what_pytorch_computes(exported, test_images):
    network, folder = exported
    with torch.inference_mode():
        ours = network(test_images.images()).numpy()
    found = logits(folder / "fp32.onnx", test_images.images().numpy())
    assert np.abs(found - ours).max() < 1e-3
    assert (found.argmax(1) == ours.argmax(1)).all()


def test_eight_bits_keep_the_predictions(exported, test_images):
    _network, folder = exported
    exact = logits(folder / "fp32.onnx", test_images.images().numpy()).argmax(1)
    found = logits(folder / "int8.onnx", test_images.pixels.numpy()).argmax(1)
    assert (found == exact).mean() > 0.96


def test_bytes_give_the_same_logits_as_floats(exported, test_images):
    _network, folder = exported
    from_floats = logits(folder / "float_input.onnx", test_images.images().numpy())
    assert np.abs(logits(folder / "int8.onnx", test_images.pixels.numpy()) - from_floats).max() < 1e-4


def test_the_deployed_student_is_smaller_than_700_kilobytes(exported):
    network, folder = exported
    size = (folder / "int8.onnx").stat().st_size
    parameters = models.count_parameters(network)
    assert parameters < size < 1.25 * parameters
    if isinstance(network, models.Student):
        assert size < 700_000


def test_any_batch_size_is_taken(exported, test_images):
    _network, folder = exported
    together = logits(folder / "fp32.onnx", test_images.images()[:10].numpy())
    single = np.concatenate([logits(folder / "fp32.onnx", image[None].numpy()) for image in test_images.images()[:3]])
    assert np.allclose(together[:3], single, atol=1e-4)


def test_calibration_uses_training_images():
    chosen = exporting.calibration_images()
    train = cifar10.load_sample("train").images()
    assert chosen.shape == (exporting.CALIBRATION_IMAGES, 3, 32, 32)
    assert all((train == image).flatten(1).all(1).any() for image in chosen[:5])


def test_the_layers_have_the_work_of_the_network():
    student = models.student(5)
    table = roofline.layers(student)
    assert table["macs"].sum() == models.count_macs(student)
    weights = sum(layer.weight.numel() for layer in student.modules() if hasattr(layer, "groups"))
    assert table.query("kind != 'linear'")["weights"].sum() > weights
    assert set(table["kind"]) == {"convolution", "depthwise", "pointwise", "linear"}


def test_the_roofline_is_the_larger_of_work_and_traffic():
    table = roofline.layers(models.student(17))
    fast_memory = roofline.Peak(fp32=1e9, int8=4e9, bandwidth=1e30)
    found = roofline.predicted(table, "fp32", 1, fast_memory)
    assert (
        found["predicted_ms"] == pytest.approx(found["predicted_macs_ms"]) == pytest.approx(table["macs"].sum() / 1e6)
    )
    fast_maths = roofline.Peak(fp32=1e30, int8=1e30, bandwidth=1e9)
    moved = 4 * (table["weights"] + 64 * table["activations"]).sum()
    assert roofline.predicted(table, "fp32", 64, fast_maths)["predicted_ms"] == pytest.approx(moved / 1e6)
    assert roofline.predicted(table, "int8", 64, fast_maths)["predicted_ms"] == pytest.approx(moved / 4e6)


@pytest.mark.slow
@pytest.mark.skipif(not RELEASED.is_dir(), reason="the authors' released students are not at hand")
def test_a_student_at_92_percent_loses_at_most_a_fifth_of_a_point(tmp_path):
    try:
        official = cifar10.load("test")
    except FileNotFoundError:
        pytest.skip("the official test images are not at hand: set KDIG_DATA")
    (weights,) = RELEASED.glob("*KD_IG_T2.5*92.28.pt")
    network = released.load(weights, 5)
    exporting.export_onnx_int8(network, tmp_path / "int8.onnx")
    right = logits(tmp_path / "int8.onnx", official.pixels.numpy()).argmax(1) == official.labels.numpy()
    assert 100 * right.mean() >= 92.28 - 0.2


def test_a_quantisation_that_fails_leaves_the_log_as_it_was(tmp_path):
    with pytest.raises(Exception, match=r"none\.onnx"):
        exporting.quantise_onnx(tmp_path / "none.onnx", tmp_path / "int8.onnx")
    assert logging.root.manager.disable == logging.NOTSET


def test_without_onnx_the_other_formats_can_still_be_written():
    hidden = "import sys; sys.modules.update(onnx=None, onnxruntime=None); from kdig_utils.edge import runtimes"
    subprocess.run([sys.executable, "-c", hidden], check=True, env=machine.process_environment())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_agree_with_pytorch(exported, test_images, tmp_path, runtime):
    pytest.importorskip(runtime)
    network, folder = exported
    np.save(tmp_path / "pixels.npy", test_images.pixels.numpy())
    with torch.inference_mode():
        expected = network(test_images.images(slice(21))).numpy()
    server, opener = serving.Server(), runtimes.name_of(runtimes.RUNTIMES[runtime].open)
    facts = server.open(opener, [runtime], str(folder / "fp32.onnx"), 0, str(tmp_path / "pixels.npy"))
    assert facts["load_ms"] > 0
    server.ready(8, 1, server.cpus)
    assert np.abs(np.array(server.logits(21)) - expected).max() < 1e-3


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_executorch_says_what_pytorch_says(tmp_path, test_images, name):
    pytest.importorskip("executorch")
    network, file = models.student(17).eval(), runtimes.RUNTIMES["executorch"].files[name]
    with torch.inference_mode():
        expected = network(test_images.images(slice(2)))
    file.write(network, tmp_path / file.name)
    images, call = serving.open_executorch(tmp_path / file.name, 17, 1, 2)
    serving.fill(images, test_images.pixels[:2].numpy())
    assert torch.allclose(call(), expected, atol=1e-4 if name == "fp32" else 0.5)
