"""Many pictures of `atoms` and `contours` at once, on any device: the same bytes as one at a time.

    draw_batch(images, range(256), device="cuda")   # uint8 (256, 3, size, size) on the device, int64 (256,)

For training that is faster than the processors draw, and for export.py. A CPU draws one picture at a time all the
same: lines.py stays in its cache and skips what is not there, and is six to nine times as fast as all at once there.

On other devices the random numbers are Philox's again, in 64-bit whole numbers; the vertices are the same single
multiplications and additions as in lines.py, each rounded by IEEE 754 (nothing here may be fused or compiled); and
where polygons meet, the largest (polygon, grey) wins, which needs no order. A picture that turns out blank is drawn
again as families.py does.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hf_vit.errors import HFViTError

from ...rng import IMAGE, WORD, generator
from .contours import ATTEMPT, HEADER, Formula, atom_formula, contour_formula, picture_formula
from .families import BLANK, TRIES, draw
from .images import SyntheticImages
from .lines import FRACTION, HALF, OFFSET


FORMULAS = {"atoms": atom_formula, "contours": contour_formula}
AT_ONCE = 32  # pictures; at 224 px they take about 2 GB while they are drawn
LOW = 0xFFFFFFFF
FACTORS = 0xD2E7470EE14C6C93, 0xCA5A826395121157  # of Philox4x64, and what its key grows by in every round
KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def draw_batch(
    images: SyntheticImages, indices: Sequence[int], device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `indices` of a set: uint8 (n, 3, size, size) and labels int64 (n,), both on the device.

    Raises:
        HFViTError: the set has families other than atoms and contours, colours, or several objects.
    """
    check(images)
    device = torch.device(device)
    draw_some = draw_one_by_one if device.type == "cpu" else draw_together
    places = [images.place(index) for index in indices]
    pixels = torch.empty(len(places), images.size, images.size, dtype=torch.uint8, device=device)
    for first in range(0, len(places), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        pixels[part] = draw_some(images, places[part], device)
    labels = torch.tensor([images.label(*place) for place in places], dtype=torch.int64, device=device)
    return pixels[:, None].repeat(1, 3, 1, 1), labels


def check(images: SyntheticImages) -> None:
    """Raise HFViTError for sets that are drawn one at a time only."""
    others = [name for name in images.families if name not in FORMULAS]
    if others or images.objects > 1:
        what = f"'{others[0]}'" if others else "pictures of several objects"
        raise HFViTError(f"{what} cannot be drawn in batches; {' and '.join(FORMULAS)} can, without colours")


def draw_one_by_one(images: SyntheticImages, places: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Pictures of (class, instance): uint8 (n, size, size)."""
    pictures = (draw(*images.address(label), instance, images.size, images.seed) for label, instance in places)
    return torch.from_numpy(np.stack([picture[:, :, 0] for picture in pictures])).to(device)


def draw_together(images: SyntheticImages, places: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """The same at once, blank ones drawn again."""
    addresses = [(*images.address(label), instance) for label, instance in places]
    result = torch.zeros(len(addresses), images.size, images.size, dtype=torch.uint8, device=device)
    most = torch.full((len(addresses),), -1, dtype=torch.int64, device=device)
    todo = torch.arange(len(addresses), device=device)
    for attempt in range(TRIES):
        ink = draw_attempt([addresses[number] for number in todo.tolist()], images, attempt, device)
        total, brightest = ink.sum((1, 2), dtype=torch.int64), ink.amax((1, 2))
        filled = (total * BLANK > 255 * images.size**2) & (brightest > 127)
        better = filled | (total > most[todo])
        result[todo[better]], most[todo[better]] = ink[better], total[better]
        todo = todo[~filled]
        if not len(todo):
            break
    white = torch.tensor([family == "contours" for family, _, _ in addresses], device=device)
    return torch.where(white[:, None, None], 255 - result, result)


def draw_attempt(
    addresses: list[tuple[str, int, int]], images: SyntheticImages, attempt: int, device: torch.device
) -> torch.Tensor:
    """One attempt at pictures of (family, class, instance): ink, uint8 (n, size, size)."""
    size = images.size
    formulas = [FORMULAS[family](images.seed, label) for family, label, _ in addresses]
    blocks = max(-(-formula.words(size) // 4) for formula in formulas)
    words = random_words(blocks, formulas, addresses, images.seed, attempt, device)
    headers = [
        generator(IMAGE, images.seed, formula.family, label, instance, attempt * ATTEMPT).bit_generator.random_raw(
            HEADER
        )
        for formula, (_, label, instance) in zip(formulas, addresses)
    ]
    parts = [picture_formula(formula, header, size) for formula, header in zip(formulas, headers)]
    start, step, spread = (padded([part[row] for part in parts], device) for row in range(3))

    def column(values):
        return torch.tensor(values, device=device)[:, None]

    lines, vertices = (column([f.noise_shape(size)[axis] for f in formulas]) for axis in (0, 2))
    line = torch.arange(int(lines.max()), device=device)
    vertex = torch.arange(start.shape[2], device=device)
    greys = words.gather(1, (8 * HEADER + line).expand(len(words), -1)).to(torch.int64)
    # The byte of (line, axis, vertex): greys lie before, in whole words.
    row = torch.arange(2 * len(line), device=device)
    before = column([8 * (HEADER + formula.grey_words) for formula in formulas])
    place = (before + row * vertices)[:, :, None] + vertex
    noise = words.gather(1, place.clamp_(max=words.shape[1] - 1).flatten(1))
    noise = noise.view(len(words), len(line), 2, len(vertex))
    sums = noise.to(torch.int32).cumsum(1, dtype=torch.int32).to(torch.float32)
    # First l * step, then + start, then - spread * sum: each of them rounded, as in lines.py.
    corners = (line + 1).to(torch.float32)[:, None, None] * step[:, None]
    corners += start[:, None]
    corners -= sums.mul_(spread[:, None])
    corners = corners.to(torch.int64) - OFFSET
    spacing = column([formula.every(size) for formula in formulas])
    drawn = (line < lines) & ((lines - 1 - line) % spacing == 0)
    exists = drawn[:, :, None] & (vertex < vertices)[:, None, :]
    following = torch.where(vertex + 1 < vertices, vertex + 1, 0)
    following = following[:, None, None, :].expand(corners.shape)
    return draw_lines(corners, corners.gather(3, following), exists, greys, size)


def draw_lines(
    begin: torch.Tensor, end: torch.Tensor, exists: torch.Tensor, greys: torch.Tensor, size: int
) -> torch.Tensor:
    """As lines.draw_lines, for many pictures: uint8 (n, size, size).

    Args:
        begin, end: int64 (n, lines, 2, V), x and y in pixels. exists: bool (n, lines, V). greys: int64 (n, lines).
    """
    distance = end - begin
    points = distance.abs().amax(2)
    seen = (torch.maximum(begin, end) >= 0) & (torch.minimum(begin, end) < size)
    points *= seen.all(2) & exists
    ratio = distance * (float(1 << FRACTION) / points.clamp(min=1).to(torch.float32))[:, :, None]
    steps = ratio.to(torch.int64) << 8
    origin = (begin << 18) + HALF
    origin[:, :, 0] += greys[:, :, None]
    origin, steps = (((part[:, :, 1] << 32) | (part[:, :, 0] & LOW)).flatten() for part in (origin, steps))
    points = points.flatten()
    number = torch.repeat_interleave(torch.arange(len(points), device=points.device), points)
    along = torch.arange(len(number), device=points.device) - (points.cumsum(0) - points)[number]
    place = origin[number] + along * steps[number]
    x, y = (place << 32) >> 50, place >> 50
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    line = number // exists.shape[2]
    picture, rank = line // exists.shape[1], line % exists.shape[1] + 1
    pixel = torch.where(inside, (picture * size + y) * size + x, len(exists) * size * size)
    canvas = torch.zeros(len(exists) * size * size + 1, dtype=torch.int32, device=points.device)
    canvas.scatter_reduce_(0, pixel, ((rank << 8) | (place & 255)).to(torch.int32), "amax")
    return (canvas[:-1] & 255).to(torch.uint8).view(len(exists), size, size)


def padded(parts: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Arrays (2, v) side by side, filled up with zeros: float32 (n, 2, V)."""
    result = np.zeros((len(parts), 2, max(part.shape[1] for part in parts)), dtype=np.float32)
    for row, part in zip(result, parts):
        row[:, : part.shape[1]] = part
    return torch.from_numpy(result).to(device)


# Random numbers


def random_words(
    blocks: int, formulas: list[Formula], addresses: list[tuple[str, int, int]], seed: int, attempt: int,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """What `generator(IMAGE, seed, family, class, instance, attempt).random_raw` gives, as bytes:
    uint8 (n, 32 * blocks)."""
    counter = torch.arange(1, blocks + 1, device=device) + attempt * ATTEMPT
    words = [[formula.family, label, instance] for formula, (_, label, instance) in zip(formulas, addresses)]
    family, label, instance = torch.tensor(words, device=device).T[:, :, None].expand(3, -1, blocks)
    drawn = philox((counter.expand(family.shape), family, label, instance), (seed & WORD, IMAGE))
    return torch.stack(drawn, dim=2).flatten(1).view(torch.uint8)


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x64-10: four 64-bit words per counter, all as the int64 of the same bits."""
    first, second, third, fourth = counter
    low, high = key
    for _ in range(10):
        first_high, first_low = product(first, FACTORS[0])
        third_high, third_low = product(third, FACTORS[1])
        first, second = third_high ^ second ^ signed(low), third_low
        third, fourth = first_high ^ fourth ^ signed(high), first_low
        low, high = (low + KEY_STEPS[0]) & WORD, (high + KEY_STEPS[1]) & WORD
    return first, second, third, fourth


def product(words: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 64 bits of the 128-bit product of unsigned words, by halves of 32 bits."""
    low, high = words & LOW, (words >> 32) & LOW
    factor_low, factor_high = factor & LOW, factor >> 32
    middle = high * factor_low + ((low * factor_low >> 32) & LOW)
    other = low * factor_high + (middle & LOW)
    upper = high * factor_high + ((middle >> 32) & LOW) + ((other >> 32) & LOW)
    return upper, words * signed(factor)


def signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word
