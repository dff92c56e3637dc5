"""The painter of the inside of the mouth: it redraws the opening of a picture from another picture of the same clip.

    python -m training.painter --data work/data --weights work/weights
    python -m training.painter --low --data work/data --weights work/weights

It needs no sound. The opening of the picture to redraw is blanked, so that the old mouth cannot leak. After a while a small
patch discriminator (Isola et al., 2017) with the hinge loss and spectral normalisation (Miyato et al., 2018) asks for sharpness.

Then it learns to make of the rows of the crop that it is shown where they hold the opening what it made of all of them
(distillation, Hinton et al., 2015).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from beavervision.media import F32, U8
from beavervision.models.beaver import PAINT_SIZE, painted_rows
from beavervision.models.mesh import INNER_LIP, IndexArray, fit_pose
from beavervision.models.nets.beaver import DECISION, PainterNet
from training.clips import CROP_PX, CROP_UNIT_PX, Row, read_index, read_points, unpack_points
from training.machine import CPU, Machine, add_options, machine_of
from training.pack import read_crops

WIDTH, HEIGHT = PAINT_SIZE
_LEFT, _TOP = (CROP_PX - WIDTH) // 2, (CROP_PX - HEIGHT) // 2
_MIN_FACE_PX = 85.0
_MAX_YAW_DEG = 40.0
_OPEN, _REFERENCE_OPEN = 0.025, 0.03  # inner gap in eye distances
_FAR = 8  # pictures between a picture and its reference, at least
_LOWER_MIDDLE = slice(14, 17)  # of INNER_LIP: the middle of the lower lip


@dataclass(frozen=True, slots=True, eq=False)
class Mouths:
    """The mouths of one clip: crops (t, 80, 96, 3), inner lips (t, 20, 2) in crop pixels, inner gap (t,), picture number (t,).

    opened and references are indices of mouths to redraw and of those to redraw them from.
    """

    row: Row
    crops: U8
    lips: F32
    number: IndexArray
    opened: IndexArray
    references: IndexArray

    @property
    def share(self) -> float:
        """How often to train on this clip: longer and larger ones more often."""
        return float(min(len(self.opened), 150) ** 0.5 * np.clip(self.row.face_px / 130, 0.5, 2.5))


def load_mouths(row: Row, data: Path) -> Mouths | None:
    """None where the face is too small or the mouth too seldom open."""
    if row.face_px < _MIN_FACE_PX:
        return None
    with np.load(data / f"{row.name}.npz") as raw:
        presence, points = raw["presence"], read_points(raw["points"])
    crops, lips, number = [], [], []
    for i, crop in enumerate(read_crops(data / f"{row.name}.mp4")):
        if presence[i] < 0.6:
            continue
        face = unpack_points(points[i])
        if abs(fit_pose(face).yaw_deg) > _MAX_YAW_DEG:
            continue
        crops.append(crop[_TOP : _TOP + HEIGHT, _LEFT : _LEFT + WIDTH])
        lips.append(face[INNER_LIP, :2] * CROP_UNIT_PX + CROP_PX / 2 - [_LEFT, _TOP])
        number.append(i)
    if not crops:
        return None
    inner = np.array(lips, np.float32)
    gap = (inner[:, 11:20][:, ::-1][:, 2:7, 1] - inner[:, 1:10][:, 2:7, 1]).mean(axis=1) / CROP_UNIT_PX
    opened = np.flatnonzero(gap > _OPEN)
    references = np.flatnonzero(gap >= max(float(np.quantile(gap, 0.5)), _REFERENCE_OPEN))
    if len(opened) < 5 or len(references) < 3:
        return None
    widest_last = references[np.argsort(gap[references])]
    return Mouths(row, np.array(crops), inner, np.array(number), opened, widest_last)


def opening(lips: F32, grow_px: float = 0.0) -> F32:
    """Coverage (80, 96), 0 to 1, of the inner lips (20, 2) moved outwards by `grow_px`."""
    outward = lips - lips.mean(axis=0)
    lips = lips + grow_px * outward / (np.linalg.norm(outward, axis=1, keepdims=True) + 1e-6)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [np.round(lips * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    return np.asarray(mask, np.float32) / np.float32(255)


class View:
    """A crop, its opening and the middle of its lower lip, turned and moved together."""

    def __init__(self, mouths: Mouths, index: int, grow_px: float = 0.0) -> None:
        self.rgb = mouths.crops[index].astype(np.float32) / 255
        self.hole = opening(mouths.lips[index], grow_px)
        self.lower = mouths.lips[index][_LOWER_MIDDLE].mean(axis=0)

    def flip(self) -> None:
        self.rgb, self.hole = self.rgb[:, ::-1], self.hole[:, ::-1]
        self.lower = np.array([WIDTH - self.lower[0], self.lower[1]], np.float32)

    def move(self, matrix: F32) -> None:
        rgb = cv2.warpAffine(np.ascontiguousarray(self.rgb), matrix, PAINT_SIZE, borderMode=cv2.BORDER_REFLECT)
        hole = cv2.warpAffine(np.ascontiguousarray(self.hole), matrix, PAINT_SIZE)
        self.rgb, self.hole = np.asarray(rgb, np.float32), np.asarray(hole, np.float32)
        self.lower = matrix[:, :2] @ self.lower + matrix[:, 2]

    def light(self, gamma: float, gain: F32) -> None:
        self.rgb = np.asarray(np.clip(self.rgb, 0, 1) ** gamma * gain, np.float32)

    def soften(self, share: float) -> None:
        size = (int(WIDTH * share), int(HEIGHT * share))
        small = cv2.resize(np.ascontiguousarray(self.rgb), size, interpolation=cv2.INTER_AREA)
        self.rgb = np.asarray(cv2.resize(small, PAINT_SIZE), np.float32)

    def clear(self) -> None:
        self.rgb, self.hole = np.zeros_like(self.rgb), np.zeros_like(self.hole)


def painter_input(view: View, reference: View) -> F32:
    """(12, 80, 96), as :class:`beavervision.models.nets.beaver.PainterNet` takes it."""
    blank = cv2.dilate(np.ascontiguousarray(view.hole), np.ones((3, 3), np.uint8))[..., None] > 0.01
    crop = np.where(blank, np.float32(0), view.rgb)
    shift = view.lower - reference.lower if reference.hole.any() else np.zeros(2)
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    rgb, hole = np.ascontiguousarray(reference.rgb), np.ascontiguousarray(reference.hole)
    on_jaw = cv2.warpAffine(rgb, matrix, PAINT_SIZE, borderMode=cv2.BORDER_REPLICATE)
    hole_on_jaw = cv2.warpAffine(hole, matrix, PAINT_SIZE)
    parts = (crop, view.hole[..., None], rgb, hole[..., None], on_jaw, hole_on_jaw[..., None])
    return np.concatenate(parts, axis=2).transpose(2, 0, 1).astype(np.float32)


def example(mouths: Mouths, rng: np.random.Generator) -> tuple[F32, F32]:
    """A random input (12, 80, 96) and what to draw (3, 80, 96), augmented."""
    i = int(rng.choice(mouths.opened))
    far = mouths.references[np.abs(mouths.number[mouths.references] - mouths.number[i]) > _FAR]
    view = View(mouths, i, rng.uniform(0, 1.5))
    reference = View(mouths, int(rng.choice(far if len(far) else mouths.references)))
    views = (view, reference)
    if rng.random() < 0.5:
        for v in views:
            v.flip()
    gain = np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.06, 3)).astype(np.float32)
    gamma = float(np.exp(rng.normal(0, 0.15)))
    for v in views:
        v.light(gamma, gain)
    if rng.random() < 0.3 and mouths.row.face_px > 150:
        share = rng.uniform(0.4, 0.9)
        for v in views:
            v.soften(share)
    if rng.random() < 0.6:
        scale = float(np.exp(rng.normal(0, 0.07)))
        shift = rng.uniform(-4, 4, 2) + (1 - scale) * np.array([WIDTH, HEIGHT]) / 2
        view.move(np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], np.float32))
        shift = rng.uniform(-3, 3, 2)
        reference.move(np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32))
    if rng.random() < 0.15:
        reference.clear()
    for v in views:
        v.rgb = np.clip(v.rgb, 0, 1).astype(np.float32)
    return painter_input(view, reference), np.ascontiguousarray(view.rgb.transpose(2, 0, 1))


def probe(mouths: Mouths) -> tuple[F32, F32]:
    """A fixed example: a well opened mouth from the clip's most open reference."""
    ranked = mouths.opened[np.argsort(np.ptp(mouths.lips[mouths.opened, :, 1], axis=1))]
    i = int(ranked[int(len(ranked) * 0.75)])
    far = mouths.references[np.abs(mouths.number[mouths.references] - mouths.number[i]) > _FAR]
    view, reference = View(mouths, i, 0.8), View(mouths, int((far if len(far) else mouths.references)[-1]))
    return painter_input(view, reference), np.ascontiguousarray(view.rgb.transpose(2, 0, 1))


def discriminator() -> nn.Sequential:
    """Patches (batch, 4, 80, 96), the opening last, to how real they are."""
    layers: list[nn.Module] = []
    for inputs, outputs, size, stride in ((4, 24, 4, 2), (24, 48, 4, 2), (48, 96, 3, 1), (96, 1, 3, 1)):
        convolution = nn.Conv2d(inputs, outputs, size, stride, 1)
        layers += [nn.utils.parametrizations.spectral_norm(convolution), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def gradient_loss(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """The difference of neighbouring pixels' differences, summed over the mask."""
    x = ((a[..., 1:] - a[..., :-1]) - (b[..., 1:] - b[..., :-1])).abs() * mask[..., 1:]
    y = ((a[..., 1:, :] - a[..., :-1, :]) - (b[..., 1:, :] - b[..., :-1, :])).abs() * mask[..., 1:, :]
    return x.sum() + y.sum()


@dataclass(frozen=True, slots=True)
class Options:
    iterations: int = 8000
    batch: int = 12
    adversary: int = 2500
    rate: float = 1.5e-3
    adversarial: float = 0.012
    low_iterations: int = 2000
    low_rate: float = 3e-4
    seed: int = 0


def load_painter(path: Path) -> PainterNet:
    net = PainterNet()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


def shares(mouths: Sequence[Mouths]) -> npt.NDArray[np.float64]:
    """How often to train on each of the clips, 1 in all."""
    share = np.array([m.share for m in mouths])
    return np.asarray(share / share.sum())


def batch_of(examples: Sequence[tuple[F32, F32]]) -> tuple[Tensor, Tensor]:
    given, wanted = (torch.from_numpy(np.stack(v)) for v in zip(*examples, strict=True))
    return given, wanted


def train(
    trained: list[Mouths], unmet: list[Mouths], options: Options, save: Path, machine: Machine = CPU
) -> PainterNet:
    """Train on the mouths of `trained`; `save` has the averaged weights."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    device = machine.device
    net, average, critic = PainterNet().to(device), PainterNet().to(device), discriminator().to(device)
    average.load_state_dict(net.state_dict())
    optimiser = torch.optim.AdamW(net.parameters(), options.rate, betas=(0.8, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.rate, total_steps=options.iterations, pct_start=0.05
    )
    critic_optimiser = torch.optim.AdamW(critic.parameters(), 4e-4, betas=(0.5, 0.99))
    share = shares(trained)
    began = time.monotonic()
    for step in range(options.iterations):
        chosen = rng.choice(len(trained), options.batch, p=share)
        given, wanted = (v.to(device) for v in batch_of([example(trained[i], rng) for i in chosen]))
        with machine.precision():
            out = net(given)
        out = out.float()
        mask = functional.max_pool2d(given[:, 3:4], 5, 1, 2)
        area = mask.sum() * 3
        coarse = functional.avg_pool2d(mask, 4)
        far = (functional.avg_pool2d(out, 4) - functional.avg_pool2d(wanted, 4)).abs()
        loss = ((out - wanted).abs() * mask).sum() / area + 1.5 * gradient_loss(out, wanted, mask) / area
        loss = loss + (far * coarse).sum() / coarse.sum() / 3
        drawn = wanted * (1 - given[:, 3:4]) + out * given[:, 3:4]
        if step >= options.adversary:
            real = critic(torch.cat([drawn * 2 - 1, given[:, 3:4]], 1))
            where = functional.interpolate(mask, size=real.shape[-2:], mode="area")
            strength = options.adversarial * min(1.0, (step - options.adversary) / 500)
            loss = loss - strength * (real * where).sum() / where.sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if step >= options.adversary:
            fake = critic(torch.cat([drawn.detach() * 2 - 1, given[:, 3:4]], 1))
            true = critic(torch.cat([wanted * 2 - 1, given[:, 3:4]], 1))
            hinge = ((functional.relu(1 + fake) + functional.relu(1 - true)) * where).sum() / where.sum()
            critic_optimiser.zero_grad()
            torch.autograd.backward(hinge)
            critic_optimiser.step()
        follow(average, net, min(0.997, step / (step + 50)))
        if (step + 1) % 250 == 0 or step + 1 == options.iterations:
            save.parent.mkdir(parents=True, exist_ok=True)
            torch.save(average.state_dict(), save)
            error, copied = figures(average, unmet)
            print(
                f"{step + 1}: unmet people, L1 in the opening {error:.4f} (copying the reference {copied:.4f}), "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    return average.eval().cpu()


def teach_low(
    teacher: PainterNet, trained: list[Mouths], options: Options, save: Path, machine: Machine = CPU
) -> PainterNet:
    """A painter that makes of the rows of :func:`beavervision.models.beaver.painted_rows` what `teacher` makes of all rows of the
    mouths of `trained`, and of all rows the same; `save` has the averaged weights."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    teacher.to(machine.device).eval().requires_grad_(False)
    net, average = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher)
    optimiser = torch.optim.AdamW(net.parameters(), options.low_rate, betas=(0.8, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.low_rate, total_steps=options.low_iterations, pct_start=0.05
    )
    share = shares(trained)
    for step in range(options.low_iterations):
        chosen = rng.choice(len(trained), options.batch, p=share)
        given = batch_of([example(trained[i], rng) for i in chosen])[0].to(machine.device)
        with torch.no_grad():
            wanted = _soft_and_sharp(teacher, given, machine)
        loss = 0.3 * apart(net, given[:3], [w[:3] for w in wanted], machine)
        low, wanted = low_crops(given, wanted)
        if len(low):
            loss = loss + apart(net, low, wanted, machine)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        follow(average, net, min(0.995, step / (step + 20)))
        if (step + 1) % 250 == 0 or step + 1 == options.low_iterations:
            save.parent.mkdir(parents=True, exist_ok=True)
            torch.save(average.state_dict(), save)
            print(f"{step + 1}: {loss.item():.4f} from what is made of all rows", flush=True)
    return average.eval().cpu()


def _soft_and_sharp(net: PainterNet, given: Tensor, machine: Machine) -> list[Tensor]:
    """What it makes with its shares as they were learned, and sharpened."""
    with machine.precision():
        told = net.told(given)
    told = told.float()
    return [net.chosen(told, given, decision) for decision in (1.0, DECISION)]


def apart(net: PainterNet, given: Tensor, wanted: Sequence[Tensor], machine: Machine = CPU) -> Tensor:
    """How far what `net` makes is from what is wanted, soft and sharp, in the opening."""
    mask = functional.max_pool2d(given[:, 3:4], 3, 1, 1)
    away = [
        ((made - as_wanted).abs() * mask).sum() + gradient_loss(made, as_wanted, mask)
        for made, as_wanted in zip(_soft_and_sharp(net, given, machine), wanted, strict=True)
    ]
    return torch.stack(away).sum() / mask.sum() / 3


def low_crops(given: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The rows of those crops (b, 12, 80, 96) that need not be painted whole, and of what is wanted of them."""
    shown = [painted_rows(np.asarray(255 * hole, np.uint8)) for hole in given[:, 3].cpu().numpy()]
    low = [i for i, rows in enumerate(shown) if rows.stop - rows.start < HEIGHT]
    of_low, *of_wanted = (
        torch.stack([layers[i][:, shown[i]] for i in low]) if low else layers[:0] for layers in (given, *wanted)
    )
    return of_low, of_wanted


def figures(net: PainterNet, unmet: list[Mouths]) -> tuple[float, float]:
    """Mean absolute difference in the opening, 0 to 1: painted, and the reference copied as it is (the control)."""
    net.eval()
    device = next(net.parameters()).device
    given, wanted = (v.to(device) for v in batch_of([probe(m) for m in unmet]))
    mask = given[:, 3:4]
    with torch.no_grad():
        painted = ((net(given) - wanted).abs() * mask).sum() / mask.sum() / 3
    copied = ((given[:, 4:7] - wanted).abs() * mask).sum() / mask.sum() / 3
    return float(painted), float(copied)


def follow(average: nn.Module, student: nn.Module, keep: float) -> None:
    """Move the weights of `average` towards those of `student`, of which it keeps the share `keep` of its own."""
    with torch.no_grad():
        for a, s in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
            if a.dtype.is_floating_point:
                a.mul_(keep).add_(s, alpha=1 - keep)
            else:
                a.copy_(s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Options()
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--weights", type=Path, default=Path("work/weights"))
    parser.add_argument("--low", action="store_true", help="teach painter.pt low crops: painter_low.pt")
    parser.add_argument("--iterations", type=int, help=f"{usual.iterations}, or {usual.low_iterations} with --low")
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--smoke", action="store_true", help="a few iterations")
    add_options(parser)
    args = parser.parse_args()
    machine = machine_of(args)
    cv2.setNumThreads(1)
    torch.set_num_threads(args.threads)
    iterations = 6 if args.smoke else args.iterations
    options = Options(
        iterations=iterations or usual.iterations,
        batch=2 if args.smoke else args.batch,
        adversary=min(usual.adversary, (iterations or usual.iterations) // 3),
        low_iterations=iterations or usual.low_iterations,
        seed=args.seed,
    )
    rows = [r for r in read_index(args.data) if (args.data / f"{r.name}.mp4").exists()]
    mouths = [m for m in (load_mouths(r, args.data) for r in rows) if m is not None]
    trained = [m for m in mouths if m.row.split == "train"]
    unmet = [m for m in mouths if m.row.split == "validate"][::2][:24]
    if not trained or not unmet:
        raise SystemExit("No clip of either split has a large and open enough mouth. Pack more clips.")
    if args.low:
        teach_low(load_painter(args.weights / "painter.pt"), trained, options, args.weights / "painter_low.pt", machine)
    else:
        train(trained, unmet, options, args.weights / "painter.pt", machine)


if __name__ == "__main__":
    main()
