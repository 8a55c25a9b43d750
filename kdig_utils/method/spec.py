"""A run is a spec: all that determines it, in a frozen dataclass, and its identity."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import Field, asdict, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from kdig_utils.method.checks import RANGES, Number, Text, Whole, check_choice, check_number, checked
from kdig_utils.method.losses import PARTS
from kdig_utils.method.models import REMOVABLE_BLOCKS, STEM_STRIDES
from kdig_utils.method.pairings import PAIRINGS

SCHEDULES = ("one_cycle", "cosine")  # of a teacher's learning rate
STUDENT_SCHEDULES = ("constant", "one_cycle")
INITIAL = ("random", "teacher")
ANSWERS = ("stored", "online")
PRECISIONS = ("native", "float32")
METHODS = ("student", "kd", "ig", "at", "kd_ig", "kd_at", "ig_at", "kd_ig_at")
MAIN_METHODS = ("student", "kd", "ig", "kd_ig")  # the paper's main comparison, and its sizes of the student

NO_SETTING = ("method", "seed", "data_md5", "teacher_sha256")  # fields that are no setting


class Spec:
    """What the specs of teachers and students share: an identity, and an answer to "are two runs alike?".

    Attributes:
        choices: what a field may be, if it is one of a few.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    choices: ClassVar[Mapping[str, Collection[object]]]
    method: str

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in self.choices:
                check_choice(name, value, self.choices[name])
            elif name in RANGES and value is not None:
                check_number(name, value)

    @cached_property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the spec: the run's identity, the same everywhere.

        Only values that differ from their default count: a field added later leaves the earlier runs their identity.
        """
        values = vars(self)
        chosen = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        text = json.dumps({"kind": type(self).__name__, **chosen}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def setting(self, *free: str) -> dict[str, object]:
        """What a run is trained with: the fields that its method reads, but those in `free`, and their values.

        Seed, images and teacher are no part of it: runs of one method with one setting are repetitions.
        """
        parts = self.method.split("_")
        read = {field for name, part in PARTS.items() if name in parts for field in part.reads}
        unread = {field for part in PARTS.values() for field in part.reads} - read
        left_out = {*NO_SETTING, *free, *unread}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def bare_id(self) -> str:
        """The identity that the run would have without teacher and images: that of a campaign's spec."""
        bare = {name: "" for name in ("data_md5", "teacher_sha256") if name in vars(self)}
        return replace(self, **bare).run_id


@checked
class RunSpec(Spec):
    """All that determines the training of a student; the defaults are the paper's settings.

    Attributes:
        method: `student`, or parts of `losses.PARTS` in their order; the paper's are `METHODS`.
        k: feature blocks removed from the teacher.
        seed: of initial weights, order of the images, augmentation and overlay.
        epochs: passes over the training images.
        alpha: weight of the distillation loss, in [0, 1].
        gamma: weight of the attention loss.
        overlay_probability: share of images that get their map, in [0, 1].
        pairing: what is blended onto an image, one of `pairings.PAIRINGS`: its own map (`matched`), or another image's
            signals (`shuffled`) as in the authors' released scripts, or a control.
        train_fraction: share of the training images, drawn stratified with `sample_seed`.
        validation_images: training images held out to choose on; 0 trains on all.
        teacher_sha256: the teacher whose signals are used; empty for methods that use none.
        n_steps: evaluations along the path for the IG maps.
        data_md5: the identity of the training images.
        precision: `native`, bfloat16 on a GPU that computes in it and float32 elsewhere, or `float32`.
        answers: the teacher's logits for distillation: `stored`, of the whole image, or `online`, of the very crop.
        sample_seed: of the draw of training images; None takes `seed`. Two seeds tell two sources of chance apart.
        schedule: of the learning rate: `constant`, or `one_cycle` (arXiv 1708.07120): linear up to `learning_rate` in
            the first fifth of the steps and linear down to nothing; the momenta of Adam stay as they are.
        stem_stride: of the first convolution: 1, or 2 for a student that costs a quarter (the laptop protocol).
        weight_decay: of Adam, added to the gradient.
        train_images: 0 takes all; else the first ones of each class, or, with `sample_seed`, as many drawn stratified.
        initial: weights of the feature blocks: `random`, drawn from the seed, or those of the `teacher`'s first blocks.

    Raises:
        ValueError: a value outside its range; the message names it and what is allowed.
    """

    method: Text
    k: Whole = 5
    seed: Whole = 0
    epochs: Whole = 100
    batch_size: Whole = 64
    learning_rate: Number = 1e-3
    alpha: Number = 0.01
    temperature: Number = 2.5
    gamma: Number = 0.8
    overlay_probability: Number = 0.1
    pairing: Text = "matched"
    train_fraction: Number = 1.0
    validation_images: Whole = 0
    teacher_sha256: Text = ""
    n_steps: Whole = 50
    data_md5: Text = ""
    precision: Text = "native"
    answers: Text = "stored"
    sample_seed: Whole | None = None
    schedule: Text = "constant"
    stem_stride: Whole = 1
    weight_decay: Number = 0.0
    initial: Text = "random"
    train_images: Whole = 0

    choices: ClassVar[Mapping[str, Collection[object]]] = {
        "k": REMOVABLE_BLOCKS,
        "pairing": PAIRINGS,
        "precision": PRECISIONS,
        "answers": ANSWERS,
        "schedule": STUDENT_SCHEDULES,
        "stem_stride": STEM_STRIDES,
        "initial": INITIAL,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        in_order = "_".join(part for part in PARTS if self.uses(part))
        if not self.method or self.method != in_order:
            check_choice("method", self.method, METHODS)

    def uses(self, part: str) -> bool:
        """Whether the method contains `part`, one of `losses.PARTS`."""
        return part in self.method.split("_")

    @property
    def asks_the_network(self) -> bool:
        """Whether the training needs the teacher itself, beside its stored signals."""
        return self.answers == "online" or self.initial == "teacher"

    @property
    def uses_teacher(self) -> bool:
        """Whether the method needs any teacher signal."""
        asks = any(self.uses(name) and "pairing" in part.reads for name, part in PARTS.items())
        return asks or self.initial == "teacher"


@checked
class TeacherSpec(Spec):
    """All that determines the training of a teacher by SGD with Nesterov momentum.

    Attributes:
        initial_sha256: the weights it starts from; empty for random ones drawn from `seed`.
        learning_rate: the highest of the schedule.
        schedule: `one_cycle` (arXiv 1708.07120), which moves the momentum as well, from 0.95 to 0.85 and back (arXiv
            1803.09820), or `cosine`: a linear rise in the first 5 % of the steps, half a cosine down to zero, momentum
            0.9.
        cutout: side of the square that is cut out of each training image, in pixels; 0 cuts nothing (arXiv 1708.04552).
        label_smoothing: in [0, 1).
        validation_images: training images held out to choose on; 0 trains on all.
        recipe: empty for a teacher that the package's loop trains; else how other code trained it, in one sentence. The
            other fields then say as much as they can.
    """

    seed: Whole = 0
    epochs: Whole = 200
    batch_size: Whole = 64
    learning_rate: Number = 0.05
    weight_decay: Number = 5e-4
    label_smoothing: Number = 0.05
    validation_images: Whole = 0
    initial_sha256: Text = ""
    data_md5: Text = ""
    schedule: Text = "one_cycle"
    cutout: Whole = 0
    precision: Text = "native"
    recipe: Text = ""

    method = "teacher"
    k = 0
    pairing = ""
    train_fraction = 1.0
    sample_seed: ClassVar[int | None] = None
    stem_stride = 1
    train_images = 0

    choices: ClassVar[Mapping[str, Collection[object]]] = {"precision": PRECISIONS, "schedule": SCHEDULES}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe != " ".join(self.recipe.split()):
            raise ValueError(f"recipe {self.recipe!r} is not one line of words: take out line breaks and double spaces")
