"""How long an epoch's batches take to make: torchvision's transforms image by image, against whole batches of bytes.

Both give cropped and flipped float32 batches of 64 from the images of the repository, without worker processes, in
turn in one process. Prints the table and writes `benchmarks/results/batches.json`.

    python benchmarks/batches.py
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from kdig_utils.method.cifar10 import ImageSet, load_sample
from kdig_utils.method.overlay import crop_and_flip, draw_epoch

BATCH_SIZE = 64
ROUNDS = 7
RESULTS = Path(__file__).parent / "results" / "batches.json"


class Transformed(Dataset):
    """The usual way: one PIL image after the other through torchvision's transforms."""

    def __init__(self, images: ImageSet) -> None:
        self.images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images.pixels]
        self.transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def whole_batches(images: ImageSet, epoch: int) -> Iterator[Tensor]:
    """The book's way: all random numbers first, then one indexing operation a batch."""
    draws = draw_epoch(len(images), 0.0, seed=0, epoch=epoch)
    for start in range(0, len(images), BATCH_SIZE):
        batch = draws.batch(start, BATCH_SIZE)
        yield crop_and_flip(images.images(batch.order), batch.shifts, batch.flips)


def seconds(epoch: Callable[[], Iterator[Tensor]]) -> float:
    """Seconds to go through one epoch of batches."""
    started = time.perf_counter()
    for _batch in epoch():
        pass
    return time.perf_counter() - started


def main() -> None:
    images = load_sample("train")
    loader = DataLoader(Transformed(images), BATCH_SIZE, shuffle=True)
    ways = {"torchvision, image by image": lambda: loader, "whole batches": lambda: whole_batches(images, 0)}
    for epoch in ways.values():  # warm-up
        seconds(epoch)
    rounds = [{name: seconds(epoch) for name, epoch in ways.items()} for _ in range(ROUNDS)]
    baseline = next(iter(ways))
    rows = [
        {
            "way": name,
            "images_per_second": round(len(images) / statistics.median(r[name] for r in rounds)),
            "ratio": round(statistics.median(r[baseline] / r[name] for r in rounds), 1),
            "rounds": ROUNDS,
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }
        for name in ways
    ]
    for row in rows:
        print(f"{row['way']:30} {row['images_per_second']:>9,} images/s   {row['ratio']:>6.1f} x")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
