"""Pictures of adapters with matplotlib: norms and ranks by layer, energy, subspace similarity.

Each function gives a ``Figure`` that is attached to no window: ``figure.savefig("norms.png")``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lorakit.adapters.analysis import Analysis, TargetAnalysis
from lorakit.adapters.subspaces import Similarity
from lorakit.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "viridis"


def by_layer_picture(
    found: Analysis, value: Callable[[TargetAnalysis], float | None], *, label: str, title: str = ""
) -> Figure:
    """A line for each kind of target over the layers; the mean where a layer has several of a kind.

    Args:
        found: The analysis.
        value: Of a target; None leaves it out.
        label: Of the values.
        title: Over the picture.

    Raises:
        ConfigError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    rows = found.by_layer(value)
    layers = [layer for layer in found.layers if layer and any(layer in row for row in rows.values())]
    if not layers:
        raise ConfigError("No target that stands in a layer has this value: there is nothing to draw.")
    figure, (axes,) = _figure(1, (6.4, 3.4))
    for kind, row in rows.items():
        points = [(n, sum(row[layer]) / len(row[layer])) for n, layer in enumerate(layers) if layer in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.5, label=kind)
    step = max(1, len(layers) // 12)
    axes.set_xticks(
        range(0, len(layers), step), [layers[n].rpartition(".")[2] for n in range(0, len(layers), step)]
    )
    axes.set(xlabel="layer", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    return figure


def energy_picture(found: Analysis, *, title: str = "") -> Figure:
    """For each kind of target the share of the squared norm that the first directions hold, a line for each weight.

    Raises:
        ConfigError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    kinds: dict[str, list[TargetAnalysis]] = {}
    order = {layer: n for n, layer in enumerate(found.layers)}
    for t in sorted(found.targets.values(), key=lambda t: order[t.place.layer]):
        if t.spectrum is not None:
            kinds.setdefault(t.place.kind, []).append(t)
    if not kinds:
        raise ConfigError("No target has a spectrum: there is nothing to draw.")
    figure, all_axes = _figure(len(kinds), (3.2 * len(kinds), 3.0))
    for axes, (kind, targets) in zip(all_axes, kinds.items(), strict=True):
        for n, t in enumerate(targets):
            assert t.spectrum is not None
            energy = t.spectrum.energy.tolist()
            colour = _colour(n / max(1, len(targets) - 1))
            ends = n in (0, len(targets) - 1) and t.place.layer
            axes.plot(
                range(1, len(energy) + 1),
                energy,
                color=colour,
                linewidth=1.3,
                marker=".",
                markersize=3,
                label=f"layer {t.place.number}" if ends else None,
            )
        axes.axhline(found.energy, color="0.5", linestyle="--", linewidth=0.9)
        axes.set(title=kind, xlabel="directions", ylim=(0, 1.03))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize="small", loc="lower right")
    all_axes[0].set_ylabel("share of the energy")
    if title:
        figure.suptitle(title)
    return figure


def similarity_picture(similarities: Mapping[str, Similarity], *, across: str, down: str) -> Figure:
    """The subspace similarity phi for all numbers of directions, one square for each, as in the LoRA paper.

    Args:
        similarities: Title to what is shown under it.
        across: What the columns are directions of: the second adapter.
        down: What the rows are: the first.

    Raises:
        ConfigError: There is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    if not similarities:
        raise ConfigError("There is no similarity to draw.")
    most = max(float(found.phi.max()) for found in similarities.values())
    figure, all_axes = _figure(len(similarities), (3.1 * len(similarities) + 0.8, 3.0))
    for axes, (title, found) in zip(all_axes, similarities.items(), strict=True):
        i, j = found.phi.shape
        edges = (0.5, j + 0.5, i + 0.5, 0.5)
        image = axes.imshow(found.phi.tolist(), vmin=0, vmax=most, cmap=_MAP, extent=edges, aspect="auto")
        axes.set(title=title, xlabel=across)
        axes.grid(visible=False)
    all_axes[0].set_ylabel(down)
    figure.colorbar(image, ax=all_axes, label="φ", fraction=0.05, pad=0.02)
    return figure


def _figure(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Pictures need matplotlib. Install it with: pip install 'lorakit[plots]'"
        ) from error
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set to
    all_axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _colour(share: float) -> tuple[float, float, float, float]:
    import matplotlib

    red, green, blue, alpha = matplotlib.colormaps[_MAP](0.9 - 0.9 * share)
    return red, green, blue, alpha
