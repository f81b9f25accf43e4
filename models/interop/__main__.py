"""Checkpoints of released codes for ours, ours for other libraries, and what is in any of them.

python -m models.interop inspect FILE_OR_RUN --name ENCODER
python -m models.interop export FILE_OR_RUN OUT.safetensors --to timm
python -m models.interop export FILE_OR_RUN OUT.safetensors --to torchvision
python -m models.interop export FILE_OR_RUN FOLDER --to hub
python -m models.interop dalle ENCODER.pkl DECODER.pkl OUT.safetensors
python -m models.interop spark|fcmae|convmae IN.pth OUT.safetensors
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from torch import Tensor
from yaml import YAMLError

from models.dvae import load_tokenizer, save_tokenizer
from models.files import read_state_dict
from models.interop.convmae import convert_convmae
from models.interop.dalle import load_dalle
from models.interop.export import TARGETS, inspect, write
from models.interop.fcmae import convert_fcmae
from models.interop.spark import convert_spark
from models.interop.strict import InteropError

Convert = Callable[[Mapping[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]

_RELEASED: dict[str, tuple[str, Convert]] = {
    "spark": ("the SparK checkpoint", convert_spark),
    "fcmae": ("the ConvNeXt V2 checkpoint", convert_fcmae),
    "convmae": ("the ConvMAE checkpoint", convert_convmae),
}
"""Command -> what it reads, and how"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 when the file was written or fits, 2 with one line on stderr otherwise."""
    args = _arguments().parse_args(argv)
    try:
        if args.command == "inspect":
            return _inspect(args)
        if args.out.exists():
            raise ValueError(f"{args.out} exists; name another file or remove it")
        if not args.out.absolute().parent.is_dir():
            raise ValueError(f"folder {args.out.absolute().parent} does not exist")
        told = args.write(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write(f"wrote {args.out}: {told}\n")
    return 0


def _arguments() -> _Parser:
    parser = _Parser(prog="python -m models.interop", description="Convert released checkpoints, and ours.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    look = commands.add_parser("inspect", help="what a file, run or checkpoint holds, and whether it fits a network")
    look.add_argument("checkpoint", type=Path, metavar="FILE_OR_RUN")
    _add_network(look)
    export = commands.add_parser("export", help="weights of any kind for timm, torchvision or the Hugging Face hub")
    export.add_argument("checkpoint", type=Path, metavar="FILE_OR_RUN")
    export.add_argument("out", type=Path, metavar="OUT.safetensors|OUT.pth|FOLDER")
    export.add_argument("--to", choices=TARGETS, required=True, help="whose names the tensors get; hub: a folder")
    _add_network(export)
    export.set_defaults(write=lambda args: write(args.checkpoint, args.out, args.to, **_network(args)))
    dalle = commands.add_parser("dalle", help="DALL-E's encoder.pkl and decoder.pkl to one tokenizer file")
    for name in ("encoder", "decoder", "out"):
        dalle.add_argument(name, type=Path, metavar=f"{name.upper()}{'.safetensors' if name == 'out' else '.pkl'}")
    dalle.set_defaults(write=_write_dalle)
    for command, (what, _) in _RELEASED.items():
        released = commands.add_parser(command, help=f"{what}, with or without decoder, as an encoder in timm's names")
        released.add_argument("checkpoint", type=Path, metavar="IN.pth")
        released.add_argument("out", type=Path, metavar="OUT.safetensors")
        released.add_argument(
            "--whole", action="store_true", help=f"keep the decoder, in the names of pretrain.{command}"
        )
        released.set_defaults(write=_write_released)
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="the timm network, where neither a description nor the tensors tell it")
    parser.add_argument("--kwargs", help="its arguments, such as '{global_pool: token}'")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="resize positions for such images")
    parser.add_argument("--in_chans", type=int, help="adapt the first layer to so many channels")
    parser.add_argument("--whole", action="store_true", help="of a run folder model.safetensors, with its classifier")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average kept beside the weights, or the weights [the average of a run's checkpoint that has one]",
    )


def _network(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``network_of``."""
    kwargs = None
    if args.kwargs:
        try:
            kwargs = OmegaConf.to_container(OmegaConf.create(args.kwargs))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"--kwargs={args.kwargs} cannot be read ({error})") from None
        if not isinstance(kwargs, dict):
            raise ValueError(f"--kwargs={args.kwargs} must be names and values in braces")
    size = tuple(args.image_size) if args.image_size else None
    asked = dict(name=args.name, kwargs=kwargs, image_size=size, in_chans=args.in_chans)
    return {**asked, "whole": args.whole, "ema": args.ema}


def _inspect(args: argparse.Namespace) -> int:
    told, fits = inspect(args.checkpoint, **_network(args))
    sys.stdout.write(told + "\n")
    if not fits:
        sys.stderr.write(f"error: {args.checkpoint} does not fit this encoder\n")
    return 0 if fits else 2


def _write_dalle(args: argparse.Namespace) -> str:
    save_tokenizer(load_dalle(args.encoder, args.decoder), args.out)
    dvae = load_tokenizer(args.out)
    parameters = sum(p.numel() for p in dvae.parameters())
    return f"{dvae.config}, {parameters / 1e6:.1f} M parameters"


def _write_released(args: argparse.Namespace) -> str:
    """Write an encoder, or with ``--whole`` the network of a pre-training -> how it is built, for the person to see."""
    what, convert = _RELEASED[args.command]
    config, state = convert(read_state_dict(args.checkpoint))
    if args.whole and "decoder_dim" not in config:
        raise InteropError(what, hint="it holds the encoder alone: convert it without --whole")
    if not args.whole and "decoder_dim" in config:
        names = {name: name.removeprefix("encoder.") for name in state if name.startswith("encoder.")}
        state = {ours: state[name] for name, ours in names.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, args.out, metadata={"format": "pt"})
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in config["kwargs"].items()}
    named = f"encoder.name={config['name']}" + (f" encoder.kwargs={kwargs}" if kwargs else "")
    initial = ", ".join(name.removeprefix("encoder.") for name in config["initial"])
    left = ", ".join(config.get("left_out", []))
    told = named + (f"; never trained, at their initial values: {initial}" if initial else "")
    return told + (f"; left out: {left}" if left else "")


if __name__ == "__main__":
    sys.exit(main())
