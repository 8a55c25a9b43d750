"""Attribution called in many ways: each call ends in the number that NumPy gives, or is refused in words."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdig_utils.method.attribution import attribute
from kdig_utils.method.integrated_gradients import attribution_map, baseline, integrated_gradients
from kdig_utils.method.losses import attention_loss, distillation_loss
from kdig_utils.method.overlay import draw_epoch, overlay

WEIGHT = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Squares(nn.Module):
    """Logits are weighted sums of squares: the attribution of feature i is w_i (x_i² - b_i²), exactly."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.to(dtype))

    def forward(self, images: Tensor) -> Tensor:
        return images.square().flatten(1) @ self.weight


RIGHT = {"shape": (4, 3, 2, 2), "dtype": torch.float32, "target": 2, "start": 0.0, "n_steps": 3, "graph": False}
OTHERS = {
    "shape": [(1, 3, 2, 2), (0, 3, 2, 2), (4, 12), (4, 1, 2, 2), (3, 2, 2), (4, 3, 3, 3), ()],
    "dtype": [torch.float64, torch.float16, torch.int64, torch.uint8, torch.complex64],
    "target": [0, -1, 3, 1.5, True, None, "1", [1], [0, 1, 2, 2], [[0], [1], [2], [2]], [0, 1], [2.0, 0, 1, 1],
               np.array([2, 0, 1, 1], np.uint8), torch.tensor([2, 0, 1, 1]), torch.eye(4)[:, :3]],
    "start": [0.5, None, "0", float("nan"), torch.full((3, 2, 2), 0.25), torch.zeros(5, 3, 2, 2)],
    "n_steps": [1, 50, 0, -1, 2.5, float("nan")],
    "graph": [True],
}  # fmt: skip
CALLS = st.lists(st.sampled_from([(name, value) for name, values in OTHERS.items() for value in values]), max_size=2)


def test_generated_calls_give_the_exact_attributions_or_words() -> None:
    outcomes: Counter[str] = Counter()

    @given(CALLS, st.sampled_from([integrated_gradients, attribute]))
    @settings(max_examples=400, deadline=None, derandomize=True)
    def holds(others: list[tuple[str, object]], explain: Callable) -> None:
        call = RIGHT | dict(others)
        images = (4 * torch.rand(call["shape"], generator=torch.Generator().manual_seed(1))).to(call["dtype"])
        images.requires_grad_(call["graph"] and images.is_floating_point())
        options = {"n_steps": call["n_steps"]} if explain is integrated_gradients else {"error": 1e-3, "max_steps": 8}
        try:
            found = explain(Squares(), images, call["start"], call["target"], **options)
        except ValueError as refused:
            found, said = None, str(refused)
        outcomes["refused" if found is None else "right"] += 1
        if found is None:
            assert ": " in said  # what is wrong, and what to do
            return
        found = found if isinstance(found, Tensor) else found.attributions
        assert not found.requires_grad
        assert found.shape == images.shape
        x, b = images.detach().double().numpy(), np.asarray(call["start"], dtype=float)
        weights = WEIGHT.numpy().T[np.broadcast_to(np.asarray(call["target"]), len(x))].reshape(x.shape)
        np.testing.assert_allclose(found.double().numpy(), weights * (x**2 - b**2), rtol=1e-3, atol=1e-4)

    holds()
    print(f"generated attribution calls: {dict(outcomes)}")
    assert min(outcomes["right"], outcomes["refused"]) > 50


GREY, COLOUR = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8)
NETWORK = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
FLAWS = {
    "grey images": (NETWORK, GREY, "does not take inputs of shape"),
    "another dtype": (NETWORK, COLOUR.double(), "float64"),
    "bytes": (NETWORK, (255 * COLOUR).byte(), "uint8: give floating point"),
    "an empty batch": (NETWORK, COLOUR[:0], "give at least one"),
    "no batch": (NETWORK, COLOUR[0], "in a batch"),
    "a tuple": (lambda x: (NETWORK(x), x), COLOUR, "tuple.*wrap it"),
    "no classes": (lambda x: NETWORK(x).sum(1), COLOUR, r"shape \(\d+,\).*classes\)"),
}


@pytest.mark.parametrize("explain", [integrated_gradients, attribute])
@pytest.mark.parametrize("flaw", FLAWS)
def test_what_a_model_does_not_take_is_said_in_words(explain: Callable, flaw: str) -> None:
    model, images, message = FLAWS[flaw]
    NETWORK.eval()
    with pytest.raises(ValueError, match=message):
        explain(model, images, target=1)


@pytest.mark.parametrize("explain", [integrated_gradients, attribute])
def test_a_model_that_trains_is_refused_and_left_as_it_is(explain: Callable) -> None:
    NETWORK.train()
    before = {name: values.clone() for name, values in NETWORK.state_dict().items()}
    with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
        explain(NETWORK, COLOUR, target=1)
    assert NETWORK.training
    assert all(torch.equal(values, before[name]) for name, values in NETWORK.state_dict().items())
    plain = Squares().train()  # nothing in it depends on the mode
    assert torch.isfinite(integrated_gradients(plain, COLOUR[:, :, :2, :2], target=1)).all()


def test_a_map_is_made_of_a_batch_and_the_mean_colour_of_three_channels() -> None:
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        attribution_map(COLOUR[0])
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\).*mean"):
        baseline("mean_colour", GREY)
    assert (baseline("mean_colour", GREY, mean=(0.5,)) == 0.5).all()


IMAGES, MAPS = torch.rand(2, 3, 32, 32), 5 * torch.rand(2, 32, 32)


@pytest.mark.parametrize(
    ("images", "maps", "message"),
    [
        (IMAGES, -MAPS, r"maps go from -[45].*not negative"),
        (IMAGES, MAPS * torch.nan, "maps go from nan to nan"),
        (IMAGES, MAPS / 0, "maps go from inf"),
        (255 * IMAGES, MAPS, r"images go from .* to 25\d.*\[0, 1\]"),
        (IMAGES - 0.5, MAPS, "images go from -0"),
        ((255 * IMAGES).byte(), MAPS, "uint8.*/ 255"),
        (IMAGES, MAPS[:1], r"\(1, 32, 32\)"),
        (IMAGES, MAPS[:, None], r"\(2, 1, 32, 32\)"),
        (IMAGES[..., :31], MAPS, r"\(2, 3, 32, 31\)"),
    ],
)
def test_an_overlay_of_wrong_values_is_refused(images: Tensor, maps: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(images, maps, draw_epoch(2, 1.0, 0, 0))
    with pytest.raises(ValueError, match=r"draws \(N,\).*\(5,\)"):
        overlay(IMAGES, MAPS, draw_epoch(5, 1.0, 0, 0))


def test_the_unit_and_the_type_of_a_map_change_nothing() -> None:
    draws, counts = draw_epoch(2, 1.0, 0, 0), (9 * MAPS).round()
    expected = overlay(IMAGES, counts, draws)
    for same in (counts.long(), counts.double(), counts.half(), 1000 * counts, counts / 1000):
        torch.testing.assert_close(overlay(IMAGES, same, draws).float(), expected, rtol=0, atol=1e-5)
    assert overlay(IMAGES[:0], MAPS[:0], draw_epoch(0, 1.0, 0, 0)).shape == (0, 3, 32, 32)


def test_logits_or_attention_of_other_shapes_are_not_repeated_in_silence() -> None:
    with pytest.raises(ValueError, match=r"\(4, 10\).*\(4, 1\)"):
        distillation_loss(torch.rand(4, 10), torch.rand(4, 1), 2.0)
    with pytest.raises(ValueError, match=r"\(4, 16\).*\(1, 16\)"):
        attention_loss(torch.rand(4, 8, 4, 4), torch.rand(1, 16))
