"""Contact sheets to look at: talkers the model never met, saying a synthetic text, then what another person really said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import InputError, OutputError, UsageError
from beavervision.evaluate.follow import Told, one_each, talker_rows
from beavervision.pipeline import Pipeline

SENTENCE = (
    "My big blue boat will move above the five waves. Show me the whole farm, please, before you go home tomorrow."
)


@dataclass(frozen=True, slots=True)
class Sheet:
    """One video and its sheet. drawn is the share of its pictures in which the mouth was."""

    face: str
    voice: str
    video: str
    sheet: str
    seconds: float
    drawn: float


@dataclass(frozen=True, slots=True)
class SheetsReport:
    """What was made; `left_out` has the clips that could not be used, with the reason."""

    folder: str
    sheets: tuple[Sheet, ...]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def sheets(
    folder: Path | str,
    out: Path | str,
    split: str = "validate",
    *,
    people: int = 12,
    text: str = SENTENCE,
    model: str | None = None,
    device: str | None = None,
    allow_non_commercial: bool = False,
    on_progress: Told | None = None,
) -> SheetsReport:
    """For so many people of `split`, into `out`: their own footage saying `text`, and with the sound of the person before.

    Raises:
        InputError, UsageError: the index cannot be used, or shows too few faces.
        OutputError: `out` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if people < 2:
        raise UsageError("Ask for two people or more: each is given another's speech.")
    rows = one_each(talker_rows(folder, split), people)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}. Name another folder.") from error
    pipeline = Pipeline(model, device=device, allow_non_commercial=allow_non_commercial)
    made: list[Sheet] = []
    left_out: dict[str, str] = {}
    before, done = rows[-1], 0
    for row in rows:
        if done == people:
            break
        if on_progress is not None:
            on_progress(done, people, row.file)
        try:
            for name, words in (("text", {"text": text}), ("speech", {"audio": str(folder / before.file)})):
                video = out / f"{Path(row.file).stem}-{name}.mp4"
                report = pipeline.lipsync(folder / row.file, video, sheet=video.with_suffix(".png"), **words)  # type: ignore[arg-type]
                counts = report.track["pictures"]
                made.append(
                    Sheet(
                        face=row.file,
                        voice="synthetic" if name == "text" else before.file,
                        video=str(video),
                        sheet=str(video.with_suffix(".png")),
                        seconds=report.output["seconds"],
                        drawn=round(counts["ok"] / sum(counts.values()), 4),
                    )
                )
        except InputError as error:
            left_out[row.file] = str(error)
            continue
        before, done = row, done + 1
    if not made:
        raise InputError(f"{folder}: no clip of {split!r} could be used ({next(iter(left_out.values()))}).")
    return SheetsReport(str(out), tuple(made), left_out)


def format_table(report: SheetsReport) -> RenderableType:
    """The report for a terminal."""
    table = Table(title=f"in {report.folder}")
    for name in ("face", "voice", "sheet"):
        table.add_column(name, overflow="fold")
    for name in ("s", "drawn"):
        table.add_column(name, justify="right")
    for sheet in report.sheets:
        table.add_row(sheet.face, sheet.voice, Path(sheet.sheet).name, f"{sheet.seconds:.1f}", f"{sheet.drawn:.0%}")
    return Group(table, *(Text(f"left out: {file} ({reason})") for file, reason in report.left_out.items()))
