"""What a parameter file says of its machine, as four pictures in one: which path is faster, and why.

Drawn by the closed form (routing, latency, transfer against interference) and by the fitted terms (decode step). Needs
matplotlib: pip install nanopd[plot].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanopd.routing.closed_form import ClosedForm
from nanopd.routing.cost_model import Parameters, Terms
from nanopd.routing.factory import find_parameters

PROMPTS = np.unique(np.rint(np.geomspace(64, 8192, 60)).astype(int))  # tokens
NUM_OUTPUT = 128
MAX_BATCH = 256
CONTEXTS = (512, 2048, 8192)
COLOURS = ("#4477aa", "#ccbb44", "#ee6677")


def draw(parameters: Parameters) -> Figure:
    form = ClosedForm.of(parameters)
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    routing(figure, top_left, form)
    latency(top_right, form)
    transfer(bottom_left, form)
    decode_step(bottom_right, parameters.terms)
    figure.suptitle(f"{parameters.machine}: {parameters.model}")
    return figure


def routing(figure: Figure, axes: Axes, form: ClosedForm) -> None:
    """Interference less transfer: above 0 the disaggregated path wins, decode steps being equal."""
    loads = np.unique(np.linspace(1, min(2 * form.batch_thresh, MAX_BATCH), 80).astype(int))
    gain_ms = np.array([[_overhead_ms(form, n, load) - form.transfer_rate * n for n in PROMPTS] for load in loads])
    limit = float(np.abs(gain_ms).max())
    mesh = axes.pcolormesh(PROMPTS, loads, gain_ms, cmap="RdBu", norm="symlog", vmin=-limit, vmax=limit)
    figure.colorbar(mesh, ax=axes, label="interference less transfer, ms")
    axes.axhline(form.winning_load() - 0.5, color="black", linewidth=1, linestyle="--")
    wins = f"disaggregated is faster from load {form.winning_load()} on"
    axes.set(xscale="log", xlabel="prompt, tokens", ylabel="load, sequences", title=f"Routing: {wins}")


def latency(axes: Axes, form: ClosedForm) -> None:
    for load, colour in zip(_loads(form, 2.0), COLOURS, strict=True):
        paths = {"collocated": form.collocated_ms, "disaggregated": form.disaggregated_ms}
        for (path, predict), style in zip(paths.items(), ("-", "--"), strict=True):
            seconds = [predict(n, NUM_OUTPUT, load) / 1e3 for n in PROMPTS]
            axes.plot(PROMPTS, seconds, style, color=colour, label=f"{path}, load {load}")
    axes.set(xlabel="prompt, tokens", ylabel="s", title=f"Latency of both paths, {NUM_OUTPUT} output tokens")
    axes.legend(fontsize="small")


def transfer(axes: Axes, form: ClosedForm) -> None:
    for load, colour in zip(_loads(form, 1.0), COLOURS, strict=True):
        axes.plot(PROMPTS, [_overhead_ms(form, n, load) for n in PROMPTS], color=colour, label=f"load {load}")
    axes.plot(PROMPTS, form.transfer_rate * PROMPTS, "k--", label=f"transfer at {form.bandwidth:.3g} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel="ms", title="Interference against transfer")
    axes.legend(fontsize="small")


def decode_step(axes: Axes, terms: Terms) -> None:
    batches = np.arange(1, MAX_BATCH + 1)
    for context, colour in zip(CONTEXTS if terms.kv else (0,), COLOURS):
        step_ms = terms.step_ms(batches, batches * context, maximum=np.maximum)
        axes.plot(batches, step_ms, color=colour, label=f"context {context}" if terms.kv else "any context")
    axes.axvline(terms.batch_thresh, color="black", linewidth=1, linestyle="--", label="batch_thresh")
    axes.set(xlabel="batch, sequences", ylabel="ms", title="Decode step")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _loads(form: ClosedForm, most: float) -> tuple[int, int, int]:
    """One sequence, and a quarter and the whole of `most` times batch_thresh, or of MAX_BATCH."""
    largest = min(round(most * form.batch_thresh), MAX_BATCH)
    return 1, largest // 4, largest


def _overhead_ms(form: ClosedForm, num_prompt: int, load: int) -> float:
    """What a prompt adds to the decodes of its own worker."""
    return form.collocated_ms(num_prompt, 0, load) - form.alpha * num_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", nargs="+", default=["8x4090"], help="parameter files, or names of shipped ones")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="a directory")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.params:
        path = args.out / f"{Path(name).stem}.png"
        draw(find_parameters(name)).savefig(path, dpi=90)
        print(path)


if __name__ == "__main__":
    main()
