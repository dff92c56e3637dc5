"""The networks of the default lip-sync model, in PyTorch: what its ONNX files are exported from.

:class:`MotionNet` hears log-mel rows and tells mouth motion. It has no padding, and what it remembers is given to it and comes
back, so it gives the same values however the sound is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from beavervision.models.beaver import PHONE_FEATURES

MEL_BINS = 64
MEL_PER_STEP = 2  # mel rows (10 ms) for each motion step (20 ms)
STEPS_HZ = 50
WORD_FEATURES, ROW_FEATURES = 384, MEL_PER_STEP * MEL_BINS
FEATURES = WORD_FEATURES + PHONE_FEATURES + ROW_FEATURES  # of the sound, for each step
# What a head may hear of them, known by how many they are.
HEARS = {
    "words": slice(0, WORD_FEATURES),
    "words+phones": slice(0, WORD_FEATURES + PHONE_FEATURES),
    "phones+rows": slice(WORD_FEATURES, FEATURES),
}

_FEWER_BINS = 32
_PHONE_BINS, _PHONE_ROWS = 80, 6
_LEAK, _FLOOR = 0.2, -0.4
_FAR = 8.0  # deviations from the mean at which a feature is cut
_DILATIONS = (1, 2, 4, 1)  # of a head's layers


class SoundNet(nn.Module):
    """What each step hears: the features of two published networks, which learned in very many voices and rooms to tell spoken
    words and phones apart, and plain rows.

    Words: the first seven layers of Google's speech embedding (Lin et al., 2020, arXiv:2002.01322), 48 channels of 8 bands; its
    own 32 mel bands are told from three of our rows. Phones: the state of a gated recurrent layer (Cho et al., 2014), the first
    one forward in time of the phone recogniser of snfa; its own 80 mel bands are told from six of our rows.

    Input: rows (batch, 2 * n + :attr:`extra_rows`, 64), and the state (batch, 128) after the step before the first, 0 at the
    beginning. Output: features (batch, 384 + 128 + 128, n), about 0 and 1 in mean and deviation while somebody speaks, told from
    16 rows, from six and those before them, and from two; the last row is the same. Then the states (batch, n, 128).
    """

    extra_rows = 14
    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bands = nn.Conv1d(MEL_BINS, _FEWER_BINS, 3)
        self.enter = nn.Conv2d(1, 24, 3, padding=(0, 1))
        self.norm = nn.BatchNorm2d(24)
        self.fine = nn.ModuleList([_along_bands(24, 24), _along_time(24, 24)])
        self.coarse = nn.ModuleList(
            [_along_bands(24, 48), _along_time(48, 48), _along_bands(48, 48), _along_time(48, 48)]
        )
        self.phone_bands = nn.Conv1d(MEL_BINS, _PHONE_BINS, _PHONE_ROWS, stride=MEL_PER_STEP)
        self.phones = nn.GRU(_PHONE_BINS, PHONE_FEATURES, batch_first=True)
        self.register_buffer("mean", torch.zeros(FEATURES, 1))
        self.register_buffer("spread", torch.ones(FEATURES, 1))

    def forward(self, rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        raw, states = self.raw(rows, state)
        return ((raw - self.mean) / self.spread).clamp(-_FAR, _FAR), states

    def raw(self, rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The features as the layers give them, and the states."""
        x: Tensor = self.bands(rows.transpose(1, 2)).transpose(1, 2)[:, None]
        x = _bent(self.norm(self.enter(x).relu()))
        for layer in self.fine:
            x = _bent(layer(x))
        x = functional.max_pool2d(x, 2)
        for layer in self.coarse:
            x = _bent(layer(x))
        words = functional.max_pool2d(x, (1, 2)).transpose(2, 3).flatten(1, 2)
        bands = self.phone_bands(rows[:, self.extra_rows + MEL_PER_STEP - _PHONE_ROWS :].transpose(1, 2))
        states: Tensor = self.phones(bands.transpose(1, 2), state[None])[0]
        plain = rows[:, self.extra_rows :].reshape(rows.shape[0], -1, ROW_FEATURES).transpose(1, 2)
        return torch.cat([words, states.transpose(1, 2), plain], dim=1), states


def beginning(count: int) -> Tensor:
    """The state (count, 128) of a :class:`SoundNet` that has heard nothing yet."""
    return torch.zeros(count, PHONE_FEATURES)


def _along_bands(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, (1, 3), padding=(0, 1))


def _along_time(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, (3, 1))


def _bent(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, _LEAK).clamp(min=_FLOOR)


class MotionHead(nn.Module):
    """Dilated temporal convolutions (van den Oord et al., 2016) from what :class:`SoundNet` tells to mouth motion.

    Input (batch, 640, n + :attr:`context_steps`), of which it hears what `hears`, of :data:`HEARS`, names; output
    (batch, n, outputs).
    """

    context_steps = 2 * sum(_DILATIONS)

    def __init__(
        self,
        outputs: int,
        channels: int = 128,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        *,
        hears: str = "words+phones",
    ) -> None:
        super().__init__()
        self.heard = HEARS[hears]
        self.dropout = nn.Dropout(feature_dropout)
        self.enter = nn.Conv1d(self.heard.stop - self.heard.start, channels, 1)
        self.blocks = nn.ModuleList(_Block(channels, d, dropout) for d in _DILATIONS)
        self.leave = nn.Conv1d(channels, outputs, 1)

    def listen(self, features: Tensor) -> Tensor:
        """What the last layer reads: (batch, channels, n)."""
        x: Tensor = self.enter(self.dropout(features[:, self.heard]))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.leave(self.listen(features))
        return out.transpose(1, 2)


class MotionNet(nn.Module):
    """From log-mel rows to mouth motion: the mean of a few heads, which learned apart, on one :class:`SoundNet`.

    Input: rows (batch, 2 * n + `extra_rows`, 64), each 10 ms; the state (batch, 128), 0 at the beginning of the sound, later the
    one after as many steps as lie between the first step of the last call and that of this. Output: motion (batch, n, outputs),
    one step each 20 ms; row ``extra_rows + 1 + 2 * i`` is the last that step i hears. Then the state after each step
    (batch, n + context, 128).
    """

    def __init__(self, sound: SoundNet, heads: list[MotionHead]) -> None:
        super().__init__()
        self.sound = sound
        self.heads = nn.ModuleList(heads)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> MotionNet:
        """The network that fits the tensors of a saved one."""
        enters = [state[name] for name in sorted(state) if name.startswith("heads.") and name.endswith(".enter.weight")]
        outputs = len(state["heads.0.leave.bias"])
        by_size = {heard.stop - heard.start: name for name, heard in HEARS.items()}
        heads = [MotionHead(outputs, len(e), hears=by_size[e.shape[1]]) for e in enters]
        net = cls(SoundNet(), heads)
        net.load_state_dict(dict(state))
        return net

    @property
    def extra_rows(self) -> int:
        """Rows that are context only: the input has 2 n + `extra_rows` for n steps out."""
        return MEL_PER_STEP * MotionHead.context_steps + self.sound.extra_rows

    def forward(self, rows: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        features, states = self.sound(rows, state)
        return torch.stack([head(features) for head in self.heads]).mean(dim=0), states


class _Block(nn.Module):
    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)
        self.wide = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.point = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(functional.gelu(self.wide(self.dropout(functional.gelu(self.norm(x))))))
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
        return self.chosen(self.told(x), x, 1.0 if self.training else DECISION)

    def told(self, x: Tensor) -> Tensor:
        """Its own colour (3), and how it likes that, the reference on the skull and that on the jaw: (batch, 6, h, 96)."""
        fine = self.fine(self.enter(x - 0.5))
        middle = self.middle(self.down1(fine))
        deep = self.deep(self.down2(middle))
        middle = self.middle_out(middle + self.up2(deep))
        fine = self.fine_out(fine + self.up1(middle))
        told: Tensor = self.leave(fine)
        return told

    def chosen(self, out: Tensor, x: Tensor, decision: float) -> Tensor:
        """What is painted if what is told decides so sharply."""
        # A softmax whose parts ONNX Runtime computes without transposing; the bounds keep half precision finite.
        likes = torch.exp((out[:, 3:6] * decision).clamp(-9.0, 9.0))
        share = likes / (likes[:, :1] + likes[:, 1:2] + likes[:, 2:])
        colour = torch.sigmoid(out[:, :3])
        return colour * share[:, :1] + x[:, 4:7] * share[:, 1:2] + x[:, 8:11] * share[:, 2:]


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1, inplace=True),
    )
