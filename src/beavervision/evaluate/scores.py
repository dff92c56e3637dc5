"""Measures on plain arrays: how well a mouth follows, and how well it is drawn.

Signals over time are (t,) with NaN where nothing was seen; images are 8-bit, (h, w) or (h, w, 3) RGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, U8

Signal = npt.NDArray[np.floating]
_LEAST = 5  # pairs that a correlation needs
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
_SSIM_SIGMA, _SSIM_SIDE = 1.5, 11
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def pearson(a: Signal, b: Signal) -> float:
    """The correlation of two signals where both are known; NaN for fewer than five such places or a constant."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < _LEAST:
        return float("nan")
    x, y = a[known].astype(np.float64), b[known].astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-12 else float("nan")


@dataclass(frozen=True, slots=True)
class Lag:
    """Where one signal fits another best: `pictures` later by so many steps, `fine` with a parabola through the peak.

    r is the correlation there. A peak at the end of the searched range is no peak: fine is then as pictures.
    """

    pictures: int
    fine: float
    r: float


def best_lag(made: Signal, truth: Signal, reach: int) -> Lag | None:
    """The lag, from -reach to reach steps, at which `made` correlates best with `truth`; positive: `made` is late.

    None where no lag gives a correlation. Shape: both (t,), of the same clock.
    """
    if made.shape != truth.shape or made.ndim != 1:
        raise ValueError(f"signals of {made.shape} and {truth.shape} cannot be compared")
    n = len(made)
    lags = range(-reach, reach + 1)
    fits = np.array([pearson(made[max(k, 0) : n + min(k, 0)], truth[max(-k, 0) : n - max(k, 0)]) for k in lags])
    if not np.isfinite(fits).any():
        return None
    i = int(np.nanargmax(fits))
    return Lag(lags[i], lags[i] + off_the_step(fits, i), float(fits[i]))


def off_the_step(fits: Signal, peak: int) -> float:
    """How far beside the greatest of values (n,), number `peak`, the top of a parabola through it and its neighbours lies: less
    than a step; 0 where a neighbour is missing or not finite."""
    near = fits[max(peak - 1, 0) : peak + 2]
    if not (0 < peak < len(fits) - 1 and np.isfinite(near).all()):
        return 0.0
    low, top, high = near.tolist()
    bend = low - 2 * top + high
    return (low - high) / (2 * bend) if bend < 0 else 0.0


def landmark_distance(made_px: F32, truth_px: F32, eyes_px: F32) -> float:
    """LMD: the mean distance of points (t, n, 2) to their truth, in units of the distance of the eyes (t,).

    After Chen et al., "Lip Movements Generation at a Glance" (ECCV 2018), normalised so that face size does not count.
    """
    away = np.linalg.norm(made_px - truth_px, axis=-1).mean(axis=-1)
    return float((away / eyes_px).mean())


def sharpness_ratio(made: U8, truth: U8) -> float:
    """The energy of the Laplacian of `made` against that of `truth`: below 1 is blurrier. NaN if `truth` is flat."""
    energies = [float((cv2.Laplacian(_luma(image), cv2.CV_32F) ** 2).mean()) for image in (made, truth)]
    return energies[0] / energies[1] if energies[1] > 0 else float("nan")


def psnr(made: U8, truth: U8) -> float:
    """The peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal images."""
    error = float(((made.astype(np.float32) - truth.astype(np.float32)) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error > 0 else float("inf")


def ssim(made: U8, truth: U8) -> float:
    """The mean structural similarity of the luma (Wang et al., IEEE TIP 2004): Gaussian window of 11, deviation 1.5.

    Only windows that lie whole within the image count.

    Raises:
        ValueError: the images differ in shape or are smaller than the window.
    """
    if made.shape != truth.shape or min(made.shape[:2]) < _SSIM_SIDE:
        raise ValueError(f"SSIM needs two images of one shape, at least {_SSIM_SIDE} px: {made.shape}, {truth.shape}")
    x, y = _luma(made), _luma(truth)
    mx, my = _window(x), _window(y)
    xx, yy, xy = _window(x * x) - mx * mx, _window(y * y) - my * my, _window(x * y) - mx * my
    top = (2 * mx * my + _SSIM_C1) * (2 * xy + _SSIM_C2)
    return float((top / ((mx * mx + my * my + _SSIM_C1) * (xx + yy + _SSIM_C2))).mean())


def flicker(pictures: U8, mask: npt.NDArray[np.bool_] | None = None) -> float:
    """What changes from picture to picture and back, in 8-bit steps: even motion gives 0, white noise its deviation.

    The root mean square of the second difference in time over pictures (t, h, w) or (t, h, w, 3), by sqrt(6).

    Raises:
        ValueError: fewer than three pictures.
    """
    if len(pictures) < 3:
        raise ValueError(f"flicker needs three pictures or more, not {len(pictures)}")
    x = pictures.astype(np.float32)
    if mask is not None:
        x = x[:, mask]
    bend = x[:-2] - 2 * x[1:-1] + x[2:]
    return float(np.sqrt((bend**2).mean() / 6))


def share_changed(made: U8, source: U8, mask: npt.NDArray[np.bool_]) -> float:
    """Of the pixels outside of `mask` (h, w), the share that differ in any channel; 0 where all is inside."""
    differs = made != source
    if differs.ndim == 3:
        differs = differs.any(axis=-1)
    outside = differs[~mask]
    return float(outside.mean()) if outside.size else 0.0


def _luma(image: U8) -> F32:
    return np.asarray(image @ _LUMA if image.ndim == 3 else image, np.float32)


def _window(x: F32) -> npt.NDArray[np.float64]:
    smooth = cv2.GaussianBlur(x.astype(np.float64), (_SSIM_SIDE, _SSIM_SIDE), _SSIM_SIGMA)
    edge = _SSIM_SIDE // 2
    return np.asarray(smooth[edge:-edge, edge:-edge], np.float64)
