"""The teacher, MobileNet-V2 for 32 × 32 images, and the students that are cut from it (paper, section 3)."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models import MobileNetV2

from kdig_utils import machine
from kdig_utils.method.checks import check_choice
from kdig_utils.method.cifar10 import MEAN, STD, ImageSet

# t: expansion, c: channels, n: blocks, s: stride of the first block (arXiv 1801.04381, table 2, fitted to CIFAR-10).
INVERTED_RESIDUALS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FEATURE_BLOCKS = 19
REMOVABLE_BLOCKS = (3, 5, 7, 9, 11, 13, 15, 17)
STEM_STRIDES = (1, 2)
# The feature block whose output attention transfer compares is number 19 // divider (paper.json, attention_transfer).
ATTENTION_DIVIDER = {3: 2, 5: 2, 7: 2, 9: 4, 11: 4, 13: 4, 15: 8, 17: 20}


Network = Callable[["Teacher | Student", Tensor, int], tuple[Tensor, Tensor]]  # model, images, tap: logits, features

CPU_AT_ONCE, MOST_AT_ONCE = 64, 2048  # images in one forward and backward pass


class Normalise(nn.Module):
    """(pixel - mean) / std per channel, as a first layer: pixels in [0, 1] go in, so no caller can forget it."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        # Not persistent: the state dict keeps torchvision's names and nothing else.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Teacher(MobileNetV2):
    """torchvision's MobileNet-V2 with the paper's setting: 2,236,682 parameters, 87.98 M multiply-accumulates.

    Takes pixels in [0, 1], shape (N, 3, 32, 32); gives logits of shape (N, 10).
    """

    def __init__(self) -> None:
        super().__init__(num_classes=10, inverted_residual_setting=[list(row) for row in INVERTED_RESIDUALS])
        self.features[0][0].stride = (1, 1)
        self.normalise = Normalise()

    def head(self, features: Tensor) -> Tensor:
        return self.classifier(nn.functional.adaptive_avg_pool2d(features, 1).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.normalise(images))


class Student(nn.Module):
    """The teacher's feature blocks without the last `k`, global average pooling, one linear layer (paper, section 3).

    Takes pixels in [0, 1], not normalised, shape (N, 3, 32, 32); gives logits of shape (N, 10).

    Args:
        stem_stride: of the first convolution. With 2 all maps have a quarter of the pixels; the weights stay.

    Raises:
        ValueError: `k` is not one of 3, 5, …, 17, or the stride neither 1 nor 2.
    """

    def __init__(self, k: int, stem_stride: int = 1) -> None:
        super().__init__()
        check_choice("k", k, REMOVABLE_BLOCKS)
        check_choice("stem_stride", stem_stride, STEM_STRIDES)
        self.k = k
        self.normalise = nn.Identity()
        self.features = Teacher().features[: FEATURE_BLOCKS - k]
        self.features[0][0].stride = (stem_stride, stem_stride)
        channels = [layer.out_channels for layer in self.features.modules() if isinstance(layer, nn.Conv2d)][-1]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels, 10))

    def head(self, features: Tensor) -> Tensor:
        return self.classifier(self.pool(features))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(self.normalise(images)))


def teacher(seed: int = 0) -> Teacher:
    """A teacher with random weights drawn from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Teacher()


def student(k: int, seed: int = 0, stem_stride: int = 1) -> Student:
    """A student without the last `k` feature blocks, with random weights drawn from `seed`; raises as `Student`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(k, stem_stride)


def attention_tap(k: int) -> int:
    """The index of the feature block whose output attention transfer compares, for a student without `k` blocks."""
    return FEATURE_BLOCKS // ATTENTION_DIVIDER[k]


def attention_taps(k: int, stem_stride: int) -> tuple[int, int]:
    """The feature blocks of student and teacher that attention transfer compares: they have maps of one size.

    In the paper it is the same block. With a stem of stride 2 the student's block 6 has the 8 × 8 of the teacher's 9.
    """
    return (attention_tap(k),) * 2 if stem_stride == 1 else (min(6, FEATURE_BLOCKS - 1 - k), attention_tap(5))


def logits_and_features(model: Teacher | Student, images: Tensor, tap: int) -> tuple[Tensor, Tensor]:
    """Logits (N, 10) and the output of feature block `tap`, (N, C, H, W), in one pass."""
    front = model.features[: tap + 1](model.normalise(images))
    return model.head(model.features[tap + 1 :](front)), front


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


class LayerCall(NamedTuple):
    """A layer in a forward pass: its name in the model, itself, and the values of one image that go in and come out."""

    name: str
    layer: nn.Module
    inputs: int
    outputs: int


def layer_calls(
    model: nn.Module, kinds: type | UnionType, input_shape: tuple[int, ...] = (3, 32, 32)
) -> list[LayerCall]:
    """Each layer of these kinds in the order in which one input of `input_shape` meets it; the model is left as it was.

    Args:
        kinds: as for `isinstance`.
    """
    calls: list[LayerCall] = []
    names = {layer: name for name, layer in model.named_modules() if issubclass(type(layer), kinds)}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in names:
            calls.append(LayerCall(names[layer], layer, inputs[0][0].numel(), output[0].numel()))

    hook, was_training = register_module_forward_hook(add), model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        hook.remove()
    return calls


def count_macs(model: nn.Module, input_shape: tuple[int, ...] = (3, 32, 32)) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one input of `input_shape`."""
    calls = layer_calls(model, nn.Conv2d | nn.Linear, input_shape)
    # The weights that meet in one output value, times the output values.
    return sum(call.layer.get_parameter("weight")[0].numel() * call.outputs for call in calls)


def kept_bytes(model: Callable[[Tensor], Tensor], input_shape: tuple[int, ...], device: torch.device) -> int:
    """Bytes that a forward pass keeps of each image for the gradient of its pixels."""
    kept = {1: 0, 2: 0}
    for count in kept:

        def weigh(value: Tensor, count: int = count) -> Tensor:
            kept[count] += value.nbytes
            return value

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(weigh, lambda value: value):
            model(torch.zeros(count, *input_shape, device=device, requires_grad=True))
    return kept[2] - kept[1]  # weights are kept once, however many images there are


def most_at_once(model: Callable[[Tensor], Tensor], input_shape: tuple[int, ...], device: torch.device) -> int:
    """Images whose gradients half of a GPU's free memory holds, from 1 to 2,048; 64 on the CPU, for its caches.

    The other half is for what the libraries work in. Ask before anything else is computed: memory that PyTorch keeps
    for later counts as taken.
    """
    if device.type != "cuda":
        return CPU_AT_ONCE
    return max(1, min(MOST_AT_ONCE, machine.free_memory(device) // (2 * kept_bytes(model, input_shape, device))))


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state dict with torchvision's names.

    Raises:
        ValueError: the state dict is that of another architecture; the message names the first differences.
    """
    expected = model.state_dict()
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise ValueError(
            f"these weights are not those of {type(model).__name__} with {count_parameters(model):,} parameters "
            f"({len(wrong)} tensors differ, first {wrong[0]}): build the architecture they were saved from"
        )
    model.load_state_dict(state)
    return model


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and values of the state dict: the identity of a trained model."""
    return state_sha256(model.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """The same of a state dict alone."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Let a GPU's convolutions, where they are in float32, not round to TF32; leaves the setting as it was."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@exact_float32()
@torch.inference_mode()
def predict(model: nn.Module, images: ImageSet) -> Tensor:
    """Logits of all `images`, (N, 10), with the model in evaluation mode."""
    model.eval()
    at_once = 500 if images.pixels.is_cuda else 50  # small batches fit into the cache of a CPU
    return torch.cat([model(images.images(slice(at, at + at_once))) for at in range(0, len(images), at_once)])


def share_correct(model: nn.Module, images: ImageSet) -> Tensor:
    """Top-1 accuracy in per cent, a tensor on the device."""
    return 100 * (predict(model, images).argmax(1) == images.labels).double().mean()


def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Top-1 accuracy in per cent."""
    return float(share_correct(model, images))
