"""The options of every command, and their help."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from r2f_ext import __version__

# Names that the library defines too, repeated because help and errors must not load torch; tests compare them.
KINDS = ("projection", "row_lmmse", "ridge", "kernel_ridge", "mlp", "conv", "unet")
IMAGES = ("embedded", "fashion-mnist", "cifar100", "lfw", "photos", "procedural")
PRIVATE_IMAGES = {  # number of private images of each set
    "embedded": 100,
    "fashion-mnist": 10_000,
    "cifar100": 10_000,
    "lfw": 100,
    "photos": 100,
    "procedural": 100,
}


def _modules_in(*folders: str) -> tuple[str, ...]:
    """The names of a package's modules, without importing it."""
    return tuple(sorted(module.name for module in iter_modules([str(Path(__file__).parents[1].joinpath(*folders))])))


# Each module in these folders holds the route, or the study, of the module's name.
ROUTES, STUDIES = _modules_in("inversion", "routes"), _modules_in("studies", "questions")
BASES = "'embedded', 'timm:NAME', 'timm-random:NAME', 'transformers:OWNER/NAME', or a folder that exists"
BASE_PREFIXES = ("timm:", "timm-random:", "transformers:")

DESCRIPTION = """\
How much of its training data does a LoRA adapter give away?

r2f reads an adapter folder as PEFT saves it, its base model, and public or generated
proxy data; it makes (LoRA update, full gradient) pairs, fits decoders, inverts
gradients to images, and compares what leaked with controls.
Use it on adapters that you may audit.
"""

EXAMPLES = """\
examples:
  r2f demo --out demo                       24 real victims, made and audited; nothing needed
  r2f audit my-adapter --out report         an adapter of the embedded base, procedural proxy
  r2f audit my-adapter --base timm:vit_small_patch16_224 --proxy my-images --out report
  r2f audit my-adapter --private photo-folder --out report     scored against the originals
  r2f audit --replay report/report.json         repeat a recorded audit
  r2f study rank --out studies                  one of the open questions, measured; --quick: few settings

the same, stage by stage:
  r2f identifiability vit_large_patch14_clip_224
  r2f phase0 --images embedded --count 16 --out ceiling
  r2f pairs my-adapter --count 3000 --out pairs
  r2f fit pairs --out decoders
  r2f decode my-adapter --pairs pairs --decoders decoders --out decoded
  r2f invert my-adapter --pairs pairs --gradients decoded/gradients.safetensors --out images

pairs and fit also on several processes or machines:
  torchrun --nproc-per-node 2 -m r2f_ext.cli pairs my-adapter --count 50000 --out pairs

exit codes: 0 done; 2 bad input, explained in one sentence; 3 an audit's report is written, but
judges nothing, because a stage failed, or some settings of a study could not be measured; 70 an
error in r2f itself (--debug shows the traceback); 130 interrupted with Ctrl-C; 143 terminated.
Files appear under their final names only when they are complete. pairs, fit, study and the
searches of --gauss-newton that were interrupted go on when the same command is run again.
"""

BASE_HELP = (
    "embedded (default) | timm:NAME | timm-random:NAME (random weights, no download) | transformers:OWNER/NAME | a "
    "FOLDER that timm or transformers saved"
)
Commands = Any  # what add_subparsers returns; argparse keeps its type private
IMAGES_HELP = f"{' | '.join(IMAGES)} | a FOLDER | a+b"


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=100)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; unknown or contradictory options exit with code 2, no command at all prints the help."""
    parser = argparse.ArgumentParser("r2f", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"r2f-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _audit(commands)
    _demo(commands)
    _study(commands)
    _phase0(commands)
    _identifiability(commands)
    _pairs(commands)
    _fit(commands)
    _decode(commands)
    _invert(commands)
    _env(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        parser.exit()
    if options.command == "audit":
        _check_audit(parser, options)
    if options.command == "study" and (options.private is None) != (options.proxy is None):
        parser.error("study needs --private and --proxy together, or neither")
    return options


def _check_audit(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Require adapters and --out, or, with --replay, no option that the report determines."""
    if options.replay is None:
        if not options.adapter or options.out is None:
            parser.error("audit needs an ADAPTER and --out DIR, or --replay REPORT")
        return
    plain = parser.parse_args(["audit", "--replay", options.replay])
    free = ("out", "json", "device", "debug")
    given = [name for name, value in vars(options).items() if name not in free and value != getattr(plain, name)]
    if given:
        parser.error(f"audit --replay takes '{given[0].replace('_', '-')}' from the report: leave it out")


def _command(
    commands: Commands, name: str, summary: str, base: bool = True, out: str | None = None, out_required: bool = True
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)
    if base:
        command.add_argument("--base", default="embedded", metavar="MODEL", help=BASE_HELP)
        command.add_argument(
            "--device", type=_device, default="auto", metavar="{auto,cpu,cuda,cuda:N}", help="default auto"
        )
        command.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    if out is not None:
        command.add_argument("--out", required=out_required, metavar="DIR", help=out)
    command.add_argument("--json", metavar="FILE", help="also write what is printed, machine-readable")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _proxy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--proxy", default="procedural", metavar="DATA", help=f"public images: {IMAGES_HELP} (default procedural)"
    )


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda|cuda:\d+", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of auto, cpu, cuda and cuda:N")
    return text


def _precision(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32", "bfloat16"),
        help="of the model when pairs are made; tf32 is a GPU's, bfloat16 is faster where the processor multiplies it "
        "(default float32)",
    )


def _adapter(command: argparse.ArgumentParser, many: bool = False) -> None:
    command.add_argument(
        "adapter",
        metavar="ADAPTER",
        nargs="*" if many else None,
        help="a folder written by PEFT's save_pretrained" + ("; several if they share one start" if many else ""),
    )


def _gauss_newton(command: argparse.ArgumentParser, start: str) -> None:
    command.add_argument(
        "--gauss-newton",
        action="store_true",
        help="also search for the exact image of a one-step, one-image adapter, a few minutes each on 2 cores; "
        f"{start}. Interrupted, the same command goes on after the last search that ended",
    )
    command.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="of a search; a pass that several share counts in equal parts, and a dense search whose Newton "
        "steps converge goes on (default: no limit)",
    )


def _routes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--routes",
        metavar="NAMES",
        type=lambda names: tuple(name.strip() for name in names.split(",") if name.strip()),
        help="the routes to run, separated by commas (default: all but the Gauss-Newton searches and the estimates "
        "that only these start from)",
    )


def _audit(commands: Commands) -> None:
    summary = "the main command: what did this adapter give away?"
    command = _command(commands, "audit", summary, out="for the report", out_required=False)
    _adapter(command, many=True)
    _proxy(command)
    command.add_argument(
        "--private",
        metavar="DATA",
        help="the true training images, to score against: as --proxy, or DATA:INDEX[,INDEX...] for some (embedded:3)",
    )
    command.add_argument("--count", type=int, default=8000, metavar="N", help="proxy pairs (default 8000)")
    _routes(command)
    _gauss_newton(
        command,
        "it starts from all images of --proxy with the adapter's label (procedural ones, whatever the label: 8000, or "
        "--count if that is more), not only from --count pairs, and then from those most like this first estimate, "
        "among their variants or more generated ones",
    )
    _initial(command)
    _precision(command)
    command.add_argument(
        "--replay",
        metavar="REPORT",
        help="repeat the audit of a report.json: its adapters, images, sizes and seeds; --out is optional",
    )


def _demo(commands: Commands) -> None:
    _command(
        commands,
        "demo",
        "train 24 real victims with PEFT and audit them; 4 to 9 minutes on 2 cores",
        out="for the victims and the report",
    )


def _study(commands: Commands) -> None:
    summary = "measure one of the open questions, or all: what leaks, when, and how much"
    command = _command(commands, "study", summary, out="for a folder of each study")
    command.add_argument("study", metavar="NAME", choices=(*STUDIES, "all"), help=f"{' | '.join(STUDIES)} | all")
    command.add_argument("--quick", action="store_true", help="few settings and one seed: shows that it runs")
    command.add_argument(
        "--private", metavar="DATA", help=f"victims' images: {IMAGES_HELP} (default: clothes, faces and photographs)"
    )
    command.add_argument("--proxy", metavar="DATA", help="public images to attack them with, together with --private")
    command.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from --seed on (default 3 or fewer)")


def _phase0(commands: Commands) -> None:
    command = _command(
        commands, "phase0", "the ceiling: invert the exact full gradient in closed form", out="for the images"
    )
    command.add_argument("--images", default="embedded", metavar="DATA", help=f"{IMAGES_HELP} (default embedded)")
    command.add_argument("--count", type=int, default=16, metavar="N", help="how many images (default 16)")


def _identifiability(commands: Commands) -> None:
    command = _command(
        commands,
        "identifiability",
        "which closed forms can be exact for timm models, by count; for one model every route",
        base=False,
    )
    command.add_argument("model", metavar="MODEL", nargs="*", help="timm names (default: 20 well-known ViTs)")
    command.add_argument("--image-size", type=int, metavar="N", help="side of the input (default: the model's own)")


def _initial(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--initial",
        metavar="FOLDER",
        help="the adapter saved before training (adapter_rowspace; in invert also gauss_newton_unrolled)",
    )
    command.add_argument(
        "--a0-seed", type=int, metavar="N", help="torch's seed right before PEFT made the adapter (default: tries some)"
    )


def _pairs(commands: Commands) -> None:
    command = _command(commands, "pairs", "make (LoRA update, full gradient) pairs on disk", out="for the shards")
    _adapter(command)
    _proxy(command)
    command.add_argument("--count", type=int, default=3000, metavar="N", help="how many pairs (default 3000)")
    _precision(command)
    command.add_argument(
        "--cache",
        metavar="PAIRS",
        help="take the gradients of these pairs of another adapter of the same base: only the projection is new",
    )
    command.add_argument(
        "--per-victim-a",
        action="store_true",
        help="each victim draws its own A, as PEFT does: r2f fit then fits decoders for any A",
    )
    command.add_argument(
        "--dense", action="store_true", help="write full gradients out, not as factors: smaller after many steps"
    )
    training = command.add_argument_group(
        "how each victim trains (default: one step of SGD on one image)",
        "All but one plain SGD step is simulated step by step; the stored update is -B over the sum of the step sizes.",
    )
    training.add_argument("--steps", type=int, metavar="T", help="optimizer steps (default 1)")
    training.add_argument("--batch", type=int, metavar="B", help="images of a step (default 1)")
    training.add_argument("--samples", type=int, metavar="N", help="images a victim owns (default: one batch)")
    training.add_argument("--optimizer", choices=("sgd", "adamw"), help="default sgd")
    training.add_argument("--lr", type=float, help="step size (default 0.1)")
    training.add_argument("--momentum", type=float, help="of SGD (default 0)")
    training.add_argument("--weight-decay", type=float, help="default 0")
    training.add_argument("--schedule", choices=("constant", "linear", "cosine"), help="default constant")
    training.add_argument("--dropout", type=float, help="PEFT's lora_dropout (default 0)")


def _fit(commands: Commands) -> None:
    command = _command(commands, "fit", "fit the decoders of every layer to pairs", out="for the decoders")
    command.add_argument("pairs", metavar="PAIRS", help="a folder written by r2f pairs")
    command.add_argument(
        "--kind",
        nargs="+",
        choices=KINDS,
        help=f"which decoders (default {' '.join(KINDS[:3])}; mlp, conv and unet train for minutes)",
    )
    command.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of mlp, conv and unet while they learn; bfloat16 is faster where the processor multiplies it "
        "(default float32)",
    )
    command.add_argument(
        "--log-dir", metavar="DIR", help="folder of a TensorBoard log of the training of mlp, conv and unet"
    )


def _decode(commands: Commands) -> None:
    command = _command(commands, "decode", "decode an adapter's update to full gradients", out="for the gradients")
    _adapter(command)
    command.add_argument("--pairs", required=True, metavar="PAIRS", help="the folder that the decoders were fitted to")
    command.add_argument("--decoders", required=True, metavar="DIR", help="a folder written by r2f fit")
    command.add_argument("--kind", default="ridge", choices=KINDS, help="which decoder (default ridge)")


def _invert(commands: Commands) -> None:
    command = _command(commands, "invert", "invert an adapter's update to images", out="for the images")
    _adapter(command)
    command.add_argument("--pairs", required=True, metavar="PAIRS", help="a folder written by r2f pairs")
    command.add_argument("--gradients", metavar="FILE", help="decoded gradients; adds the route `matching`")
    _routes(command)
    _gauss_newton(command, "it starts from --pairs")
    _initial(command)
    command.add_argument("--prior", metavar="DIR", help="a diffusers folder, whose model regularises gradient matching")
    command.add_argument(
        "--inverter",
        default="ridge",
        choices=("ridge", "unet"),
        help="the amortised route: kernel ridge (default), or a U-Net on its estimate, trained for minutes",
    )


def _env(commands: Commands) -> None:
    _command(commands, "env", "versions, what was built, and which kernel each operator uses", base=False)
