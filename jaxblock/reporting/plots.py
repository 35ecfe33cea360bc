"""Draws pictures of training runs from their ``metrics.jsonl``."""

from __future__ import annotations

from matplotlib.figure import Figure

from jaxblock.errors import printable
from jaxblock.io.paths import PathLike, as_path
from jaxblock.reporting.curves import draw_panel
from jaxblock.reporting.panels import PANELS
from jaxblock.reporting.plot_style import save_png, styled
from jaxblock.training.observe.metrics import read_metrics


def plot_run(metrics_path: PathLike, out: PathLike) -> list[str]:
    """Draws a run: ``loss.png``, ``nelbo.png``, ``pass_at_1.png``, and ``curves.png`` with everything on one page.

    Each picture is titled with the name of the run's folder.

    Args:
        metrics_path: the run's ``metrics.jsonl``; a run with few or no rows is drawn too.
        out: the folder to write the pictures to, which is made if absent.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: the metrics cannot be read or the pictures cannot be written.
    """
    run, folder = read_metrics(metrics_path), as_path(out)
    name_of_run = printable(as_path(metrics_path).parent.name).replace("$", r"\$")  # a dollar would begin a formula
    panels = {name: make(run) for name, make in PANELS.items()}
    written = []
    with styled():
        for name in ("loss", "nelbo", "pass_at_1"):
            figure = Figure(figsize=(6.4, 4.2))
            figure.suptitle(name_of_run)
            draw_panel(figure.subplots(), panels[name])
            written.append(save_png(figure, folder / f"{name}.png"))
        figure = Figure(figsize=(19, 8.1))
        figure.suptitle(name_of_run)
        for axes, panel in zip(figure.subplots(2, 4).flat, panels.values(), strict=True):
            draw_panel(axes, panel)
        written.append(save_png(figure, folder / "curves.png"))
    return written
