"""`s2a-fx finetune`: the options on the command line, and the run that they ask for."""

import argparse
import ast
import gc
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from s2a_fx.arguments import not_negative, positive, size
from s2a_fx.errors import S2AError
from s2a_fx.finetune.interrupts import Stopped
from s2a_fx.finetune.options import AMP, PARALLEL, FinetuneOptions
from s2a_fx.finetune.run import finetune

_PATIENCE = 5.0  # seconds; torchrun looks for ended processes ten times a second
_DEFAULTS = {f.name: f.default for f in fields(FinetuneOptions)}


def add_finetune(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a timm model on a data set",
        description="Tell what a step will take, refuse what does not fit, and train. Several processes: torchrun "
        "--nproc-per-node N -m s2a_fx.cli finetune ...",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=_finetune)
    parser.add_argument("model", metavar="MODEL", help="a timm model, for example vit_base_patch16_224")
    parser.add_argument("data", metavar="DATA", type=Path, help="a folder with train/ and val/, a folder a class in each")

    add = _Group(parser, "what to tune, and on what; one of --pretrained, --checkpoint, --from-scratch must be given")
    add("--recipe", help="a recipe's name; s2a-fx passes lists them")
    add("--pretrained", action="store_true", help="begin with timm's weights from the hub")
    add("--checkpoint", metavar="FILE", type=Path, help="begin with timm weights from a file, .safetensors or a state dict")
    add("--from-scratch", action="store_true", help="begin with random weights")
    add("--dataset", metavar="NAME", help="a data set of timm's create_dataset in DATA, for example torch/cifar10; no streams")
    add("--download", action="store_true", help="let the data set fetch what DATA lacks")
    add("--train-split", metavar="NAME", help="the split to train on")
    add("--val-split", metavar="NAME", help="the split to evaluate on")
    add("--num-classes", metavar="N", type=positive, help="classes of the head (default: the data's)")
    add("--image-size", metavar="N", type=positive, help="side of the images in pixels (default: the model's)")
    add("--model-option", metavar="NAME=VALUE", action="append", type=_pair, help="a further argument of timm.create_model")

    add = _Group(parser, "how to train")
    add("--epochs", metavar="N", type=positive, help="passes over the data")
    add("--warmup-epochs", metavar="N", type=not_negative, help="of them with a rising rate (default: an eighth)")
    add("--batch-size", metavar="N", type=positive, help="images in a step, of each process")
    add("--grad-accumulation", metavar="N", type=positive, help="batches before the weights are updated")
    add("--lr", metavar="X", type=float, help="highest learning rate; it falls along a cosine")
    add("--weight-decay", metavar="X", type=float, help="of all that trains but biases, norms, tokens and position embeddings")
    add("--optimizer", metavar="NAME", help="one of timm's")
    add("--label-smoothing", metavar="X", type=float, help="share of a target that is spread over all classes")
    add(
        "--augment",
        metavar="POLICY",
        help="none (as in the evaluation), crop (random crop and flip), or a policy of timm's, for example rand-m9-mstd0.5",
    )
    add(
        "--crop-pct",
        metavar="X",
        type=float,
        help="share of an image's shorter side that its centre crop shows (default: the model's)",
    )
    add("--mixup", metavar="ALPHA", type=float, help="mix images and labels in pairs")
    add("--cutmix", metavar="ALPHA", type=float, help="paste parts of images into others")
    add(
        "--freeze-batch-norm",
        action="store_true",
        help="keep the statistics of the model's batch norms: for small images or batches",
    )
    add("--seed", metavar="N", type=not_negative, help="of all that is drawn, below 2**32")

    add = _Group(parser, "where to run")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--memory", metavar="SIZE", type=size, help="refuse to start if a step needs more, for example 8GB (default: what is free)")
    add("--force", action="store_true", help="start though it does not fit")
    add("--amp", choices=AMP, help="compute in half precision where it is safe")
    add("--channels-last", action="store_true", help="lay out images with channels last")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--parallel", choices=PARALLEL, help="under torchrun: share gradients (ddp), or weights too (fsdp) (default: ddp)")
    add("--workers", metavar="N", type=not_negative, help="processes that load images, one a core at most")

    add = _Group(parser, "what to keep")
    add("--output", metavar="DIR", type=Path, help="folder for checkpoints (default: runs/MODEL-RECIPE)")
    add("--save-every", metavar="N", type=not_negative, help="write the last checkpoint every N steps, too; 0 for every epoch")
    add("--resume", action="store_true", help="go on from the folder's last checkpoint, to the same result")


class _Group:
    """A titled group of options, each with the default of `FinetuneOptions`."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def __call__(self, flag: str, help: str, **settings: Any) -> None:  # noqa: A002
        default = _DEFAULTS.get(flag[2:].replace("-", "_"))
        told = f"{help} (default: {default})" if default not in (None, False, "") and "default:" not in help else help
        self.group.add_argument(flag, help=told.replace("%", "%%"), **settings)


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, for example drop_path_rate=0.1, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _say(line: str) -> None:
    if not _printed(line, sys.stdout):
        _printed("s2a-fx: no one reads the output any more; the run goes on without it", sys.stderr)


def _printed(line: str, stream: TextIO) -> bool:
    """Print a line; False if the stream's reader, `head` say, has seen enough: what comes after goes nowhere."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def _finetune(arguments: argparse.Namespace) -> int:
    gc.enable()  # `console` turns it off, for commands that are over soon
    given = {name: value for name, value in vars(arguments).items() if name in _DEFAULTS}
    try:
        options = FinetuneOptions(**given, model_options=dict(getattr(arguments, "model_option", ())))
        finetune(options, say=_say)
    except Stopped as stop:
        _printed(f"s2a-fx: {stop}", sys.stderr)
        return 130
    except S2AError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the first process tells it and ends, and torchrun then ends this one
            time.sleep(_PATIENCE)
        raise
    return 0
