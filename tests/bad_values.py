"""Values that are bad by construction, each with what its refusal must name: specs, images, overlays, attributions."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from kdig_utils.method import attribution, cifar10, integrated_gradients, overlay
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.signals import SignalSettings
from kdig_utils.method.spec import RunSpec, TeacherSpec

NONSENSE = st.text("ghxyz%", min_size=1, max_size=6)  # no number, no name of anything


@dataclass(frozen=True)
class Case:
    """One input: bad, harmless, or one of both, as a changed byte is.

    Attributes:
        what: the input in words; two cases with the same words are one.
        use: gives the input to the package.
        named: one of these must stand in the refusal; empty where the input is harmless.
        right: whether what came of it is exactly right; None where the input must be refused.
    """

    what: str
    use: Callable[[], object]
    named: tuple[str, ...] = ()
    right: Callable[[Any], bool] | None = None


Cases = SearchStrategy[Case]

# Numbers

WHOLE = {  # the least and the most of each field that is a whole number
    "seed": (0, 2**32 - 1), "epochs": (1, 10**6), "batch_size": (2, 10**6), "validation_images": (0, 10**6),
    "n_steps": (1, 10**6), "sample_seed": (0, 2**32 - 1), "train_images": (0, 10**6), "cutout": (0, 32),
}  # fmt: skip
REAL = {  # the least and the most of a number, and whether they belong to the range
    "learning_rate": (0.0, math.inf, False, False), "temperature": (0.0, math.inf, False, False),
    "alpha": (0.0, 1.0, True, True), "overlay_probability": (0.0, 1.0, True, True),
    "gamma": (0.0, math.inf, True, False), "weight_decay": (0.0, math.inf, True, False),
    "train_fraction": (0.0, 1.0, False, True), "label_smoothing": (0.0, 1.0, True, False),
}  # fmt: skip
NAMES = {
    "method": {"student", "kd", "ig", "at", "kd_ig", "kd_at", "ig_at", "kd_ig_at"},
    "pairing": {"matched", "index-matched", "shuffled", "random", "edges", "gradient", "uniform",
                "mixup-grey", "black"},
    "precision": {"native", "float32"}, "answers": {"stored", "online"}, "initial": {"random", "teacher"},
}  # fmt: skip
SCHEDULE = {RunSpec: {"constant", "one_cycle"}, TeacherSpec: {"one_cycle", "cosine"}}
FREE = ("teacher_sha256", "data_md5", "initial_sha256", "recipe")
HUGE = st.sampled_from([10**400, Fraction(10**400)])  # more than a float holds
NO_NUMBER = (
    HUGE |
    NONSENSE | st.booleans() | st.binary(max_size=4) | st.lists(st.integers(), max_size=2) | st.complex_numbers()
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2) | st.integers().map(str)
    | st.builds(lambda kind, x: kind(x), st.sampled_from([torch.tensor, np.array, Decimal]), st.integers(0, 9))
)  # fmt: skip
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def outside(low: float, high: float) -> SearchStrategy[int | float]:
    """Numbers that are no whole ones from `low` to `high`."""
    broken = st.floats(low, min(high, 1e9)).filter(lambda x: x != int(x))
    return st.integers(max_value=int(low) - 1) | st.integers(min_value=int(high) + 1) | broken | NOT_FINITE


def beyond(low: float, high: float, with_low: bool, with_high: bool) -> SearchStrategy[float]:
    """Real numbers that are not between `low` and `high`, nor those of the two that do not belong to the range."""
    below = st.floats(max_value=low, exclude_max=with_low, allow_infinity=False)
    above = st.floats(min_value=high, exclude_min=with_high and math.isfinite(high))
    return below | above | NOT_FINITE.filter(lambda x: x != high or not with_high)


def inside(name: str) -> SearchStrategy[int | float]:
    """Numbers of the field's range, its ends included."""
    if name in WHOLE:
        return st.integers(*WHOLE[name]) | st.sampled_from(WHOLE[name])
    low, high, with_low, with_high = REAL[name]
    most = min(high, 1e300)
    return st.floats(low, most, exclude_min=not with_low, exclude_max=not with_high and math.isfinite(high))


def wrong_numbers(name: str) -> SearchStrategy[object]:
    numbers = outside(*WHOLE[name]) if name in WHOLE else beyond(*REAL[name])
    others = NO_NUMBER | (st.nothing() if name == "sample_seed" else st.none())
    return st.integers(0, 3).flatmap(lambda one: others if one == 3 else numbers)


# Specs

SPECS: dict[type, dict[str, Any]] = {RunSpec: {"method": "kd_ig"}, TeacherSpec: {}}


@st.composite
def specs(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(list(SPECS)))
    fields = [field.name for field in dataclasses.fields(kind)]
    good = SPECS[kind]
    way = draw(st.sampled_from(["value"] * 12 + ["harmless"] * 3 + ["unknown", "absent", "too many"]))
    if way == "unknown":
        name = draw(NONSENSE)
        return Case(f"{kind.__name__}(..., {name}=1)", lambda: kind(**good, **{name: 1}), (name,))
    if way == "absent":
        name = draw(st.sampled_from([field for field in fields if field != "method"]))
        return Case(f"RunSpec({name}=1)", lambda: RunSpec(**{name: 1}), ("method", name))
    if way == "too many":
        more = draw(st.lists(st.integers(), min_size=40, max_size=60))
        return Case(f"{kind.__name__}{tuple(more)}", lambda: kind(*more), tuple(fields))
    name = draw(st.sampled_from([field for field in fields if field in WHOLE or field in REAL or way == "value"]))
    if way == "harmless":
        value = draw(inside(name))
        same = draw(st.sampled_from([type(value), float, np.float64, Fraction] + [np.int64] * (name in WHOLE)))(value)
        right = kind(**good, **{name: value})
        return Case(
            f"{kind.__name__}({name}={same!r})",
            lambda: kind(**good, **{name: same}),
            right=lambda made: made == right and made.run_id == right.run_id and getattr(made, name) == value,
        )
    value = draw(wrong_field(kind, name))
    return Case(f"{kind.__name__}({name}={value!r})", lambda: kind(**{**good, name: value}), (name,))


def wrong_field(kind: type, name: str) -> SearchStrategy[object]:
    if name in WHOLE or name in REAL:
        return wrong_numbers(name)
    no_text = st.integers() | st.floats() | st.booleans() | st.binary(max_size=3) | st.none()
    if name in ("k", "stem_stride"):
        return (
            st.integers().filter(lambda n: n not in ((1, 2) if name == "stem_stride" else range(3, 18, 2))) | NO_NUMBER
        )
    if name in FREE:
        long = st.integers(10_001, 12_000).map("x".__mul__)
        lines = st.sampled_from(["  ", "\n", " \t", "\r"]).map("Adam{}30 epochs".format)
        return no_text | long | (lines if name == "recipe" else st.nothing())
    names = SCHEDULE[kind] if name == "schedule" else NAMES[name]
    near = st.sampled_from(sorted(names)).flatmap(lambda it: st.sampled_from([it.upper(), it + " ", it[:-1], it * 2]))
    return (near | st.text(max_size=8)).filter(lambda text: text not in names) | no_text


@st.composite
def signal_settings(draw: st.DrawFn) -> Case:
    no_name = NO_NUMBER.filter(lambda value: not isinstance(value, list | dict)) | st.none() | st.integers()
    value: SearchStrategy[object] = {
        "n_steps": wrong_numbers("n_steps"),
        "method": no_name,
        "baseline": no_name,
        "storage": no_name,
        "tap": st.integers(max_value=-1) | st.integers(min_value=19) | st.sampled_from([0.5, "9", None, math.nan]),
        "error": beyond(0.0, 1.0, False, False) | NO_NUMBER,
    }
    name = draw(st.sampled_from(sorted(value)))
    wrong = draw(value[name])
    given = {name: wrong, **({"method": "secant"} if name == "n_steps" and draw(st.booleans()) else {})}
    return Case(f"SignalSettings({given!r})", lambda: SignalSettings(**given), (name,))


# Images

SIDE = {"pixels": 32}
FEW = ImageSet(
    "six images", torch.arange(6 * 3072).remainder(251).view(6, 3, 32, 32).byte(), torch.arange(6), torch.arange(6)
)
DRAWS = overlay.draw_epoch(6, 0.5, 0, 0)
MAPS = torch.rand(6, 32, 32, generator=torch.Generator().manual_seed(0))


@st.composite
def images(draw: st.DrawFn) -> Case:
    """Image sets, draws of them and overlays; a number that is none lies at a place of its own."""
    return draw(st.one_of(image_sets(), drawn_images(), overlays()))


@st.composite
def image_sets(draw: st.DrawFn) -> Case:
    parts = {"pixels": FEW.pixels, "labels": FEW.labels, "indices": FEW.indices}
    name = draw(st.sampled_from(sorted(parts)))
    wrong, told = draw(st.sampled_from(["type", "shape", "count"] + ["label"] * (name == "labels"))), name
    if wrong == "type":
        kinds = [torch.float32, torch.float64, torch.int32, torch.bool, torch.float16]
        kind = draw(st.sampled_from(kinds))
        parts[name], told = parts[name].to(kind), str(kind)
    elif wrong == "shape":
        tail = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda t: t != [3, 32, 32])))
        parts[name], told = torch.zeros(6, *tail, dtype=parts[name].dtype), str((6, *tail))
    elif wrong == "count":
        count = draw(st.integers(0, 40).filter(lambda n: n != 6))
        parts[name], told = parts[name][:1].repeat(count, *[1] * (parts[name].dim() - 1)), str(count)
    else:
        label = draw(st.integers(-(2**40), -1) | st.integers(10, 2**40))
        parts[name] = parts[name].index_fill(0, torch.tensor(draw(st.integers(0, 5))), label)
        told = str(label)
    return Case(f"ImageSet, {name}: {wrong} {told}", lambda: ImageSet("few", **parts), (told,))


@st.composite
def drawn_images(draw: st.DrawFn) -> Case:
    way = draw(st.sampled_from(["class", "split", "count", "probability", "baseline", "colours", "map"]))
    name, count = draw(NONSENSE), draw(st.integers(-1000, 1000).filter(lambda n: n % 6 or not 0 <= n <= 6))
    load = draw(st.sampled_from([cifar10.load, cifar10.load_sample]))
    chance = draw(wrong_numbers("overlay_probability"))
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=6).filter(lambda shape: len(shape) != 4)))
    use, value = {
        "class": (lambda: cifar10.class_index(name), name),
        "split": (lambda: load(name), f"unknown split '{name}'"),
        "count": (lambda: cifar10.stratified_split(FEW.labels, count, 0), str(count)),
        "probability": (lambda: overlay.draw_epoch(6, chance, 0, 0), "overlay_probability"),
        "colours": (lambda: integrated_gradients.baseline("mean_colour", torch.zeros(shape)), str(shape)),
        "map": (lambda: integrated_gradients.attribution_map(torch.zeros(shape)), str(shape)),
        "baseline": (lambda: integrated_gradients.baseline(name, FEW.images()), name),
    }[way]
    return Case(f"{way} {chance if way == 'probability' else value}", use, (value,))


@st.composite
def overlays(draw: st.DrawFn) -> Case:
    given = {"images": FEW.images(), "maps": MAPS, "batch": DRAWS, "pairing": "matched"}
    way = draw(st.sampled_from(["value"] * 4 + ["shape", "type", "pairing", "draws", "harmless"]))
    name = draw(st.sampled_from(["images", "maps"]))
    told = name
    if way == "value":
        high = 1.0 if name == "images" else math.inf
        value = draw(
            beyond(0.0, high, True, name == "images").filter(
                lambda x: not np.isfinite(x) or (1e-37 < abs(x) < 3e38 and np.float32(x) != 1)
            )
        )
        given[name] = changed(given[name], draw(st.integers(0, 6 * 1024 - 1)), value)
        told = f"{name}[...] = {value}"
    elif way == "shape":
        shape = draw(
            st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(
                lambda s: s not in ([6, 3, 32, 32], [6, 32, 32])
            )
        )
        given[name], told = torch.zeros(shape), f"{name} {tuple(shape)}"
    elif way == "type":
        kind = draw(st.sampled_from([torch.uint8, torch.int64, torch.bool]))
        given["images"], told = given["images"].to(kind), f"images {kind}"
    elif way == "pairing":
        given["pairing"] = told = draw(NONSENSE)
    elif way == "draws":
        part = draw(st.sampled_from(sorted(vars(DRAWS))))
        count = draw(st.integers(0, 5))
        given["batch"], told = replace(DRAWS, **{part: getattr(DRAWS, part)[:count]}), f"draws, {count} {part}"
    else:
        unit = 2.0 ** draw(st.integers(-20, 20))
        expected = overlay.overlay(**given)
        given["maps"] = MAPS * unit
        return Case(
            f"maps times {unit}",
            lambda: overlay.overlay(**given),
            right=lambda made: torch.allclose(made, expected, atol=1e-5),
        )
    return Case(f"overlay, {told}", lambda: overlay.overlay(**given), (name, "images", "draws", told))


def changed(values: Tensor, place: int, value: float) -> Tensor:
    """The values with another one at one place."""
    flat = values.flatten().clone()
    flat[place] = value
    return flat.view_as(values)


# Attributions


def network(*more: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    return nn.Sequential(*layers).eval()


class Told(nn.Module):
    """A network whose outputs are changed."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.change = network(), change

    def forward(self, inputs: Tensor) -> Any:
        return self.change(self.inner(inputs))


INPUTS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SECOND = network()(INPUTS).detach()[1]
BAD_NETWORKS: dict[str, tuple[nn.Module, str]] = {
    "two outputs": (Told(lambda y: (y, y)), "tuple"),
    "a dictionary": (Told(lambda y: {"logits": y}), "dict"),
    "one number": (Told(lambda y: y.sum()), "shape ()"),
    "no classes": (Told(lambda y: y[:, 0]), "classes)"),
    "NaN": (Told(lambda y: y * math.nan), "the first input"),
    "NaN for the second input": (Told(lambda y: torch.where((y - SECOND).abs() < 1e-5, math.nan, y)), "outputs hold"),
    "infinity": (Told(lambda y: y.clamp(max=0) / 0), "NaN"),
    "chance": (Told(lambda y: y + torch.rand_like(y)), "two outputs"),
    "the rest of the batch": (Told(lambda y: y - y.mean(0)), "batch"),
    "dropout that trains": (network(nn.Dropout(0.3)).train(), "Dropout"),
    "batch norm that trains": (network(nn.BatchNorm2d(4)).train(), "BatchNorm2d"),
}
ONLY_BY_ATTRIBUTE = {
    "chance",
    "the rest of the batch",
    "NaN",
    "NaN for the second input",
}  # integrated_gradients asks each point once
MODEL = network()
NUMBERS = {  # of the two functions, what their settings may not be
    "error": beyond(0.0, 1.0, False, False), "max_steps": outside(4, 10**6), "internal_batch_size": outside(1, 2**63),
    "n_steps": outside(1, 10**6),
}  # fmt: skip


@st.composite
def attributions(draw: st.DrawFn) -> Case:
    function = draw(st.sampled_from([attribution.attribute, integrated_gradients.integrated_gradients]))
    own = {"error", "max_steps"} if function is attribution.attribute else {"n_steps"}
    given: dict[str, Any] = {"inputs": INPUTS, "target": 3}
    ways = (
        ["number"] * 3
        + ["value"] * 2
        + ["type", "shape", "empty", "target", "targets", "baselines", "model", "trapezoid", "harmless"]
    )
    way, model, named = draw(st.sampled_from(ways)), MODEL, ("inputs",)
    if way == "number":
        name = draw(
            st.sampled_from(sorted({*own, "internal_batch_size"} | ({"method"} - own if "n_steps" in own else set())))
        )
        given[name] = draw(NONSENSE if name == "method" else NUMBERS[name] | NO_NUMBER | st.none())
        named, told = (name,), f"{name}={given[name]!r}"
    elif way == "value":
        name, value = draw(st.sampled_from(["inputs", "baselines"])), draw(NOT_FINITE)
        place = draw(st.integers(0, INPUTS.numel() - 1))
        given[name], named, told = changed(INPUTS, place, value), (name,), f"{name}[{place}] = {value}"
    elif way == "type":
        kind = draw(st.sampled_from([torch.uint8, torch.int64, torch.bool, torch.float64, torch.float16]))
        given["inputs"], named, told = INPUTS.to(kind), (str(kind),), str(kind)
    elif way == "shape":
        shape = draw(
            st.lists(st.integers(1, 12), max_size=5).filter(lambda s: s[1:2] != [3] or len(s) < 3 or min(s[2:]) < 3)
        )
        shape = shape if len(shape) not in (3,) or shape[0] != 3 else [4, *shape[1:]]
        given["inputs"], named, told = (
            torch.rand(shape),
            ("inputs of shape", str(tuple(shape))),
            f"inputs {tuple(shape)}",
        )
    elif way == "empty":
        given["inputs"], named, told = INPUTS[:0], ("(0, 3, 8, 8)",), "no inputs"
    elif way == "target":
        given["target"] = draw(st.integers(10, 2**40) | st.integers(-(2**40), -1) | st.floats() | NONSENSE | st.none())
        named, told = ("target",), f"target={given['target']!r}"
    elif way == "targets":
        count = draw(st.integers(3, 9) | st.just(0))
        given["target"], named, told = torch.zeros(count).long(), (f"({count},)",), f"{count} targets"
    elif way == "baselines":
        shape = draw(st.lists(st.integers(9, 12), min_size=1, max_size=4))
        given["baselines"], named, told = torch.zeros(shape), (str(tuple(shape)),), f"baselines {tuple(shape)}"
    elif way == "trapezoid" and "n_steps" in own:
        given |= {"method": "riemann_trapezoid", "n_steps": 1}
        named, told = ("n_steps",), f"one step of a trapezoid, target {draw(st.integers(0, 9))}"
    elif way == "model":
        seen = set(BAD_NETWORKS) if own == {"error", "max_steps"} else set(BAD_NETWORKS) - ONLY_BY_ATTRIBUTE
        told = draw(st.sampled_from(sorted(seen)))
        model, named = BAD_NETWORKS[told][0], (BAD_NETWORKS[told][1],)
    else:
        return draw(same_attributions())
    return Case(f"{function.__name__}, {told}", lambda: function(model, **given), named)


@st.composite
def same_attributions(draw: st.DrawFn) -> Case:
    """What stands for one target or one baseline in another form gives the same attributions."""
    target, level = draw(st.integers(0, 9)), draw(st.floats(0, 1, width=32))
    n_steps = draw(st.sampled_from([3, 3.0, np.int64(3)]))
    form = draw(st.sampled_from([torch.tensor(target), torch.full((2,), target), torch.tensor([target]).int()]))
    baselines = draw(st.sampled_from([level, torch.tensor(level), torch.full((3, 1, 1), level)]))
    use = integrated_gradients.integrated_gradients
    right = use(MODEL, INPUTS, torch.full_like(INPUTS, level), torch.full((2,), target), n_steps=3)
    return Case(
        f"target {form!r}, baselines {baselines!r}, n_steps {n_steps!r}",
        lambda: use(MODEL, INPUTS, baselines, form, n_steps=n_steps),
        right=lambda made: torch.equal(made, right),
    )
