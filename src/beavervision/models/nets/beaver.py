"""The networks of the default lip-sync model, in PyTorch: what its ONNX files are exported from.

:class:`MotionNet` hears log-mel rows and tells mouth motion. It has no padding: every output sees exactly its context, so
it gives the same values however the sound is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MEL_BINS = 64
MEL_PER_STEP = 2  # mel rows (10 ms) for each motion step (20 ms)
STEPS_HZ = 50
MEL_MEAN, MEL_SPREAD = -5.0, 4.0  # of log-mel rows, about
LOOK_AHEAD_ROWS = 12  # rows after a step's own row that the step hears


class MotionNet(nn.Module):
    """Dilated temporal convolutions (van den Oord et al., 2016) from log-mel rows to mouth motion.

    Input (batch, 2 * n + `extra_rows`, 64); output (batch, n, outputs), one step each 20 ms. Step 0 belongs to the time of
    row ``left_rows``.
    """

    def __init__(
        self,
        outputs: int,
        channels: int = 160,
        dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1),
        dropout: float = 0.0,
        hidden: int | None = None,  # channels within a block; None: as many as `channels`
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(MEL_BINS, channels, 4, stride=MEL_PER_STEP)
        self.blocks = nn.ModuleList(_Block(channels, hidden or channels, d, dropout) for d in dilations)
        self.head = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.GELU(), nn.Conv1d(channels, outputs, 1))
        self.context_steps = 2 * sum(dilations)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> MotionNet:
        """The network that fits the tensors of a saved one."""
        net = cls(len(state["head.2.bias"]), len(state["stem.bias"]), hidden=len(state["blocks.0.wide.bias"]))
        net.load_state_dict(dict(state))
        return net

    @property
    def extra_rows(self) -> int:
        """Rows that are context only: the input has 2 n + `extra_rows` for n steps out."""
        return MEL_PER_STEP * self.context_steps + 2

    @property
    def left_rows(self) -> int:
        """Rows of context before a step's own row."""
        return self.extra_rows + MEL_PER_STEP - 1 - LOOK_AHEAD_ROWS

    def listen(self, rows: Tensor) -> Tensor:
        """What the head reads: (batch, channels, n)."""
        x: Tensor = self.stem((rows.transpose(1, 2) - MEL_MEAN) / MEL_SPREAD)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.head(self.listen(rows))
        return out.transpose(1, 2)


CLOSED_GAP = 0.02  # eye distances of inner lip gap below which the first of a pair is trusted more and more


class MotionPair(nn.Module):
    """Two networks heard together: the mean of both, but where the first closes the lips, the first alone.

    The first was taught articulation and closes at p, b, m; the second, from real clips alone, follows people better but
    closes late. gap (outputs,) is how each coefficient opens the inner lips. Input and output as :class:`MotionNet`.
    """

    gap: Tensor

    def __init__(self, first: MotionNet, second: MotionNet, gap: Tensor) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("gap", gap)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> MotionPair:
        """The pair that fits the tensors of a saved one."""
        nets = [
            MotionNet.of({k.removeprefix(n): v for k, v in state.items() if k.startswith(n)})
            for n in ("first.", "second.")
        ]
        return cls(nets[0], nets[1], state["gap"])

    @property
    def extra_rows(self) -> int:
        """As of :class:`MotionNet`."""
        return self.first.extra_rows

    @property
    def left_rows(self) -> int:
        """As of :class:`MotionNet`."""
        return self.first.left_rows

    def forward(self, rows: Tensor) -> Tensor:
        first: Tensor = self.first(rows)
        second: Tensor = self.second(rows)
        apart = ((first * self.gap).sum(dim=-1, keepdim=True) / CLOSED_GAP).clamp(0.0, 1.0)
        return first + 0.5 * apart * (second - first)


class _Block(nn.Module):
    def __init__(self, channels: int, hidden: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(channels)
        self.wide = nn.Conv1d(channels, hidden, 3, dilation=dilation)
        self.point = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(nn.functional.gelu(self.wide(self.dropout(nn.functional.gelu(self.norm(x))))))
        return x[..., self.dilation : -self.dilation] + y


# Trained with plain shares, used with more decided ones: a mean of two rows of teeth is a blur. At 2.5 the difference to real
# mouths grows by 3 % and their detail from 0.47 to 0.65 of the real one.
DECISION = 2.5


class PainterNet(nn.Module):
    """Fills the opening of the mouth: from a reference mouth of the same person where that fits, else painted.

    A small U-Net (Ronneberger et al., 2015) with a pixel-shuffle output chooses, pixel by pixel, between the reference as it
    stood on the skull (upper teeth), the reference as it hangs on the jaw (lower teeth), and its own colour.

    Input (batch, 12, h, 96), 0 to 1, some or all of the crop's rows, h a multiple of 8: the crop with the opening blanked (3), the
    opening (1); the reference crop (3) and its opening (1); the same two moved so that the lower lips coincide (4). The
    reference is 0 where there is none. Output (batch, 3, h, 96): RGB, meant for the opening alone.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = widths
        self.enter = _conv(12, a, stride=2, kernel=6)
        self.fine = _conv(a, a)
        self.down1 = _conv(a, b, stride=2)
        self.middle = _conv(b, b)
        self.down2 = _conv(b, c, stride=2)
        self.deep = nn.Sequential(_conv(c, c), _conv(c, c))
        self.up2 = nn.Sequential(nn.Conv2d(c, b, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
        self.middle_out = nn.Sequential(_conv(b, b), _conv(b, b))
        self.up1 = nn.Sequential(nn.Conv2d(b, a, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
        self.fine_out = nn.Sequential(_conv(a, a), _conv(a, a))
        self.leave = nn.Sequential(nn.Conv2d(a, 24, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.enter(x - 0.5))
        middle = self.middle(self.down1(fine))
        deep = self.deep(self.down2(middle))
        middle = self.middle_out(middle + self.up2(deep))
        fine = self.fine_out(fine + self.up1(middle))
        out = self.leave(fine)
        # A softmax whose parts ONNX Runtime computes without transposing; the bounds keep half precision finite.
        likes = torch.exp((out[:, 3:6] * (1.0 if self.training else DECISION)).clamp(-9.0, 9.0))
        share = likes / (likes[:, :1] + likes[:, 1:2] + likes[:, 2:])
        colour = torch.sigmoid(out[:, :3])
        return colour * share[:, :1] + x[:, 4:7] * share[:, 1:2] + x[:, 8:11] * share[:, 2:]


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1, inplace=True),
    )
