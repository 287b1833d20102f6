"""python -m trainer export"""

from pathlib import Path

import click

from pipeline import UserError
from pipeline.cli import Command
from trainer.export import MEAN, Exported
from trainer.export import export as write
from trainer.options import DATA, PATH, RUN


@click.command(cls=Command, interrupted="nothing was written, or whole files")
@RUN
@DATA
@click.option("--out", type=PATH, help="The folder of the two files.  [default: RUN/export]")
def export(run: Path, data: Path, out: Path | None) -> None:
    """Write a run's network for other programs: model.safetensors and model.onnx.

    RUN is a run directory, of which the newest checkpoint is taken, or a checkpoint file; DATA is what it was trained
    on. On pictures of it both files must give the network's own probabilities before they are written.

    \b
    Examples:
      python -m trainer export runs/1 --data /data/imagenet-256
      python -m trainer export runs/1/checkpoints/best.safetensors --data /data/imagenet-256 --out best
    """
    if out is None and run.is_file():
        raise UserError(f"{run}: is a checkpoint file; name a folder for what is exported, too: --out FOLDER")
    if out is not None and out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder for the two files")
    for line in summary(write(run, data, run / "export" if out is None else out)):
        click.echo(line)


def summary(exported: Exported) -> list[str]:
    """Return lines that say what was written, how it was checked and how it is loaded."""
    paths, differences = list(exported.differences), list(exported.differences.values())
    weights, graph = (f"{path}  {path.stat().st_size / 1e6:,.1f} MB" for path in paths)
    return [
        f"{weights}: {exported.parameters:,} parameters of step {exported.step:,}, and {MEAN}",
        f"{graph}: {exported.nodes} nodes",
        f"compared with the network on {exported.pictures} pictures of {exported.split}: probabilities differ by at "
        f"most {differences[0]:.1e} and {differences[1]:.1e}",
        f'load: safetensors.torch.load_file("{paths[0]}")',
        f'      onnxruntime.InferenceSession("{paths[1]}").run(["probabilities"], {{"pixels": pixels}})',
        "docs/export.md has an example of each, and what they are to be given",
    ]
