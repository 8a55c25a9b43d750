"""A run is a spec: all that determines it, in a frozen dataclass, and its identity."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace

from kdig_utils.method import losses, models, overlay, pairings

SCHEDULES = ("one_cycle", "cosine")  # of a teacher's learning rate
STUDENT_SCHEDULES = ("constant", "one_cycle")
ANSWERS = ("stored", "online")
PRECISIONS = ("native", "float32")
METHODS = ("student", "kd", "ig", "at", "kd_ig", "kd_at", "ig_at", "kd_ig_at")
MAIN_METHODS = ("student", "kd", "ig", "kd_ig")  # the paper's main comparison, and its sizes of the student


# Fields that are no setting, and those that set something only in methods with one of these parts.
NO_SETTING = ("method", "seed", "data_md5", "teacher_sha256")
READ_BY = {
    "alpha": ("kd",),
    "temperature": ("kd",),
    "answers": ("kd",),
    "overlay_probability": ("ig",),
    "n_steps": ("ig",),
    "gamma": ("at",),
    "pairing": ("kd", "ig", "at"),
}


class Spec:
    """What the specs of teachers and students share: an identity, and an answer to "are two runs alike?"."""

    @property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the spec: the run's identity, the same everywhere.

        Only values that differ from their default count: a field added later leaves the earlier runs their identity.
        """
        defaults = {field.name: field.default for field in fields(self)}
        chosen = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        text = json.dumps({"kind": type(self).__name__, **chosen}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def setting(self, *free: str) -> dict[str, object]:
        """What a run is trained with: the fields that its method reads, but those in `free`, and their values.

        Seed, images and teacher are no part of it: runs of one method with one setting are repetitions.
        """
        parts = set(self.method.split("_"))
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in (*NO_SETTING, *free) and (name not in READ_BY or parts & set(READ_BY[name]))
        }

    @property
    def bare_id(self) -> str:
        """The identity that the run would have without teacher and images: that of a campaign's spec."""
        bare = {"data_md5": "", **({"teacher_sha256": ""} if hasattr(self, "teacher_sha256") else {})}
        return replace(self, **bare).run_id


@dataclass(frozen=True)
class RunSpec(Spec):
    """All that determines the training of a student; the defaults are the paper's settings.

    Attributes:
        method: one of `METHODS`.
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

    Raises:
        ValueError: a value outside its range; the message names it and what is allowed.
    """

    method: str
    k: int = 5
    seed: int = 0
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    alpha: float = 0.01
    temperature: float = 2.5
    gamma: float = 0.8
    overlay_probability: float = 0.1
    pairing: str = "matched"
    train_fraction: float = 1.0
    validation_images: int = 0
    teacher_sha256: str = ""
    n_steps: int = 50
    data_md5: str = ""
    precision: str = "native"
    answers: str = "stored"
    sample_seed: int | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.k not in models.REMOVABLE_BLOCKS:
            raise ValueError(
                f"k = {self.k!r} is out of range: choose one of {', '.join(map(str, models.REMOVABLE_BLOCKS))}"
            )
        losses.check_temperature(self.temperature)
        losses.check_alpha(self.alpha)
        overlay.check_probability(self.overlay_probability)
        pairings.check_pairing(self.pairing)
        losses.check_gamma(self.gamma)
        check_schedule(self.epochs, self.batch_size, self.learning_rate)
        check_validation(self.validation_images)
        check_precision(self.precision)
        if self.schedule not in STUDENT_SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(STUDENT_SCHEDULES)}")
        if self.answers not in ANSWERS:
            raise ValueError(f"unknown answers {self.answers!r}: choose one of {', '.join(ANSWERS)}")
        if self.n_steps < 1:
            raise ValueError(f"n_steps = {self.n_steps} is too few: the paper uses 50")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(
                f"train_fraction {self.train_fraction} is outside (0, 1]: give the share of images to train on"
            )

    def uses(self, part: str) -> bool:
        """Whether the method contains `part`: `kd`, `ig` or `at`."""
        return part in self.method.split("_")

    @property
    def uses_teacher(self) -> bool:
        """Whether the method needs any teacher signal."""
        return self.method != "student"


@dataclass(frozen=True)
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

    seed: int = 0
    epochs: int = 200
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    validation_images: int = 0
    initial_sha256: str = ""
    data_md5: str = ""
    schedule: str = "one_cycle"
    cutout: int = 0
    precision: str = "native"
    recipe: str = ""

    method = "teacher"
    k = 0
    pairing = ""
    train_fraction = 1.0

    def __post_init__(self) -> None:
        check_schedule(self.epochs, self.batch_size, self.learning_rate)
        check_validation(self.validation_images)
        check_precision(self.precision)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.cutout <= 32:
            raise ValueError(f"cutout = {self.cutout} is no side of a square in an image of 32 pixels: give 0 to 32")
        if self.recipe != " ".join(self.recipe.split()):
            raise ValueError(f"recipe {self.recipe!r} is not one line of words: take out line breaks and double spaces")


def check_schedule(epochs: int, batch_size: int, learning_rate: float) -> None:
    """Raise ValueError unless epochs ≥ 1, batch size ≥ 2 (batch norm needs two images) and learning rate > 0."""
    if epochs < 1:
        raise ValueError(f"epochs = {epochs} trains nothing: give at least 1")
    if batch_size < 2:
        raise ValueError(f"batch size {batch_size} is too small for batch norm: give at least 2")
    if not learning_rate > 0:
        raise ValueError(f"learning rate {learning_rate} is not above 0: the paper uses 0.001")


def check_precision(precision: str) -> None:
    """Raise ValueError unless the precision is known."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")


def check_validation(images: int) -> None:
    """Raise ValueError unless the number of held-out images is not negative."""
    if images < 0:
        raise ValueError(f"validation_images = {images} is negative: give 0 to train on all images")
