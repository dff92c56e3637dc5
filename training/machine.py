"""Where a network learns, and how precisely."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """The device, and whether its products are taken in bfloat16: weights, sums of the losses and their steps never are."""

    device: torch.device
    half: bool = False

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)


CPU = Machine(torch.device("cpu"))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument(
        "--half", action="store_true", help="products in bfloat16: faster on GPUs and on processors that have AMX"
    )


def machine_of(args: argparse.Namespace) -> Machine:
    """Raises SystemExit, saying what to do, where the device is none or not there."""
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"PyTorch cannot use the device {args.device!r}: give cpu, or cuda on a machine with an NVIDIA GPU."
        ) from error
    return Machine(device, args.half)
