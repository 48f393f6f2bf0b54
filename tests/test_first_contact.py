"""What a newcomer sees: `pdd` alone, the progress in 80 columns, and the next command at the end of each command."""

import io
import re
import shlex
from types import SimpleNamespace

import pytest
import typer
from PIL import Image
from rich.console import Console as RichConsole
from typer.testing import CliRunner

from pdd_cli.adaptation.judge import describe_score
from pdd_cli.adaptation.loop import StepReport
from pdd_cli.batch.run import run
from pdd_cli.cli import app
from pdd_cli.commands._adapt_progress import adapt_progress
from pdd_cli.commands._observer import ConsoleObserver
from pdd_cli.console import Console
from pdd_cli.observer import duration
from pdd_cli.settings.upscale import UpscaleConfig
from tests.helpers.images import photo

PDD = typer.main.get_command(app)


class Terminal(Console):
    """A console whose stderr is a terminal of 80 columns."""

    def __init__(self) -> None:
        super().__init__()
        self._text = io.StringIO()
        self.err = RichConsole(
            file=self._text, force_terminal=True, width=80, height=25, highlight=False, _environ={"TERM": "xterm"}
        )

    @property
    def lines(self) -> list[str]:
        """All lines that were ever shown, without colours and movements of the cursor."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._text.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def check_next(line: str) -> None:
    """`line` names a command of pdd that can be parsed."""
    assert line.startswith("next: pdd "), line
    name, *options = shlex.split(line.removeprefix("next: pdd "))
    assert PDD.commands[name].make_context(name, options).params


def test_pdd_alone_says_what_can_be_done() -> None:
    found = CliRunner().invoke(app, [])

    _, *commands, last = found.output.splitlines()
    assert found.exit_code == 0
    assert len(commands) == 4
    assert max(map(len, found.output.splitlines())) <= 80
    for line in commands:
        name, *options = shlex.split(re.split(r" {2,}", line.strip().removeprefix("pdd "))[0])
        assert PDD.commands[name].make_context(name, options).params
    assert "pdd --help" in last


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (600, "10 min"), (7500, "2 h 5 min")])
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_the_bar_of_files_ends_with_the_rate(ground, tmp_path, home):
    (tmp_path / "in").mkdir()
    for name, width in (("small.png", 24), ("a-photo-with-a-name-longer-than-the-terminal-likes.png", 80)):
        Image.fromarray(photo(24, width)).save(tmp_path / "in" / name)
    settings = UpscaleConfig(
        input=(tmp_path / "in",), output=str(tmp_path / "out"), weights=str(ground / "base.safetensors"), tile="32",
        device="cpu", engine="torch",
    )  # fmt: skip
    terminal = Terminal()

    outcome = run(settings, observer=ConsoleObserver(terminal))

    assert outcome.count("done") == 2
    bars = [line for line in terminal.lines if "━" in line]
    assert max(map(len, bars)) <= 80
    assert re.fullmatch(r"files ━+ 2/2 +[\d.]+ MP/s", bars[-1])
    assert outcome.pixels == 16 * (24 * 24 + 24 * 80)


def test_a_second_bar_for_a_file_of_several_tiles_only():
    terminal = Terminal()
    shown = []
    with ConsoleObserver(terminal).progress("files", 2, pixels=200) as progress:
        for name, tiles in (("large.png", 4), ("small.png", 1)):
            progress.start(0, name, "tiles", 100)
            progress.step(0, min(2, tiles), tiles)
            before = len(terminal.lines)
            progress._bars.refresh()
            shown.append([line for line in terminal.lines[before:] if "━" in line])

    (of_files, of_tiles), (of_files_later,) = shown
    assert re.search(r"^files .* 0/2 .* left +large.png$", of_files)
    assert re.fullmatch(r" *tiles [━╸╺]+ 2/4", of_tiles)
    assert re.search(r" small.png$", of_files_later)


def test_the_time_left_follows_from_pixels_not_files():
    terminal = Terminal()
    with ConsoleObserver(terminal).progress("files", 3, pixels=10_000_000) as progress:
        progress.advance(not_computed=5_000_000)  # made already
        progress.start(0, "large.png", "tiles", 4_000_000)
        progress._started -= 40  # as if 40 seconds had passed
        progress.step(0, 1, 2)
        line = progress._left()

    # 2 of the 5 megapixels that must be computed took 40 s.
    assert re.fullmatch(r"0\.05 MP/s  60 s left", line)


@pytest.mark.parametrize(("verbose", "imitation"), [(False, 0), (True, 0), (False, 9500)])
def test_the_progress_of_adapt_fits_80_columns(verbose, imitation):
    terminal = Terminal()
    so_far = f"so far {describe_score(-10.25)}"
    assert so_far == "so far worse (-10.2 dB)"
    state = SimpleNamespace(step=9000, imitation_steps=imitation, judgements=[])
    training = SimpleNamespace(state=state, config=SimpleNamespace(steps=10000), verdict_so_far=so_far)

    with adapt_progress(terminal, training, verbose=verbose) as progress:
        progress.update(StepReport(9001, {"inter": 0.25, "pixel": 0.125}, 1e-4, 30.0))

    bar = next(line for line in terminal.lines if "9001/10000" in line)
    assert len(bar) <= 80
    left = "imitation" if imitation else r"8 h \d+ min left"
    assert re.fullmatch(rf"adapt .* step 9001/10000 {left} {re.escape(so_far)}", re.sub(" +", " ", bar))
    losses = [line for line in terminal.lines if "inter 0.250  pixel 0.125" in line]
    assert bool(losses) == verbose


def test_each_command_ends_with_the_next_one(ground, pdd):
    Image.fromarray(photo(48, 64)).save("a.png")
    base = ground / "base.safetensors"

    installed = pdd("fetch-weights", "mine", "--from", base)
    upscaled = pdd("upscale", "a.png", "out.png", "--weights", base, "--device", "cpu", "--engine", "torch")
    planned = pdd("upscale", "a.png", "other.png", "--weights", base, "--device", "cpu", "--dry-run")
    scored = pdd("evaluate", "--metrics", "entropy")
    page = pdd("evaluate", "--metrics", "entropy", "--output", "scores.html")

    for outcome in (installed, upscaled):
        check_next(outcome.err.splitlines()[-1])
    assert re.search(r"1 upscaled to out.png in [\d.]+ s \([\d.]+ MP/s\)", upscaled.err)
    assert planned.err.splitlines()[-1] == "next: the same command without --dry-run"
    assert "--output scores.html" in scored.err.splitlines()[-1]
    assert page.err.splitlines()[-1] == "next: open scores.html in a browser"
