"""The command line: `s2a-fx report`, `s2a-fx compare`, `s2a-fx table1`, `s2a-fx finetune`, `s2a-fx passes`."""

import argparse
import dataclasses
import gc
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from s2a_fx.analysis.device import device_model
from s2a_fx.analysis.fit import LIMIT, largest_batch
from s2a_fx.analysis.optimizer import OPTIMIZERS
from s2a_fx.analyze import MODES, compare
from s2a_fx.arguments import not_negative, positive, size
from s2a_fx.errors import InputError, S2AError, S2AWarning
from s2a_fx.finetune.command import add_finetune
from s2a_fx.html import to_html
from s2a_fx.paper_figures import BATCH_SIZE, TABLES
from s2a_fx.paper_tables import method_cells, paper_cells, to_json, to_text
from s2a_fx.passes import PASSES
from s2a_fx.recipes import RECIPES, SUFFIXES, name_of, resolve
from s2a_fx.report import Comparison
from s2a_fx.transform import transform
from s2a_fx.usable_cores import usable_cores
from s2a_fx.whole_file import destination, written_whole
from s2a_fx.zoo import DTYPES, timm_model

_AS_PYTHON = warnings.formatwarning


def main(arguments: Sequence[str] | None = None, jobs: int = 1) -> int:
    """Run the command line, on `jobs` processes; the exit status: 0, 2 after an error in what was asked, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments, argparse.Namespace(jobs=jobs))
    try:
        return options.run(options) or 0
    except S2AError as error:
        print(f"s2a-fx: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("s2a-fx: interrupted", file=sys.stderr)
        return 130


def console() -> None:
    """The installed command: `main` for one short run, without cycle collection (half a second) and torch's teardown (one)."""
    gc.disable()
    warnings.formatwarning = _formatted
    try:
        status = main(jobs=usable_cores())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        status = 0
    sys.stderr.flush()
    os._exit(status)


def _formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of this package in one line; others as Python has them."""
    if issubclass(category, S2AWarning):
        return f"s2a-fx: warning: {message}\n"
    return _AS_PYTHON(message, category, filename, lineno, line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s2a-fx", description="What fine-tuning a vision model costs in memory, and what it costs after S2A's rewriting."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    report = commands.add_parser("report", help="what a training step keeps, tensor by tensor, and what it peaks at")
    report.add_argument("--recipe", default="s2a", help="the recipe to report (default: %(default)s)")
    report.add_argument("--against", default="full", help="the recipe to set it against (default: %(default)s)")
    report.add_argument("--unfold", action="store_true", help="a row for each tensor, alike ones not joined")
    report.add_argument("--fit", metavar="SIZE", type=size, help="also find the largest batch that fits, for example 16GB")
    report.set_defaults(run=_report)
    _add_model_options(report)
    comparison = commands.add_parser("compare", help="recipes side by side")
    comparison.add_argument("--recipes", help="names separated by commas (default: all that fit the model)")
    comparison.set_defaults(run=_compare)
    _add_model_options(comparison)
    tables = commands.add_parser("table1", help="the paper's tables, ours beside its figures")
    tables.add_argument("--table", type=int, choices=sorted(TABLES), help="which one, 5 for Figure 5 (default: 1)")
    tables.add_argument("--model", metavar="MODEL", help="the methods on another timm model, for which the paper has no figures")
    tables.add_argument("--batch-size", type=positive, metavar="N", help="images in a step, with --model (default: 32)")
    tables.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    tables.set_defaults(run=_table)
    add_finetune(commands)
    passes = commands.add_parser("passes", help="the passes with their options, and the recipes made of them")
    passes.set_defaults(run=_passes)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a timm model, for example vit_base_patch16_224")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images in a step (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, metavar="N", help="side of the image in pixels (default: the model's)")
    parser.add_argument("--num-classes", type=not_negative, metavar="N", help="classes of the head (default: the model's)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="whose kernels to assume, cpu or cuda; none is used (default: cpu)")
    parser.add_argument("--optimizer", default="adamw", help=f"{', '.join(OPTIMIZERS)} (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="set beside each recipe what torch.compile makes of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page with the step's timeline")


def _report(options: argparse.Namespace) -> None:
    comparison = _simulate(options, list(dict.fromkeys([options.against, options.recipe])))
    report = comparison[options.recipe]
    print(report.title())
    print()
    print(comparison.table())
    print()
    print(report.text(fold=not options.unfold))
    if options.fit:
        _print_fit(options)


def _compare(options: argparse.Namespace) -> None:
    names = list(RECIPES) if options.recipes is None else [name.strip() for name in options.recipes.split(",") if name.strip()]
    comparison = _simulate(options, list(dict.fromkeys(names)), tell_refusals=options.recipes is None)
    print(comparison.reports[0].title())
    print()
    print(comparison.table())


def _table(options: argparse.Namespace) -> None:
    _check_files(options.json)
    if options.batch_size and not options.model:
        raise InputError(f"--batch-size: the paper's figures are at batch {BATCH_SIZE}; name another model with --model.")
    if options.table and options.model:
        raise InputError("--table: the paper's tables are of its own models; leave out --table or --model.")
    if options.model:
        cells, refusals = method_cells(options.model, options.batch_size or BATCH_SIZE, options.jobs)
    else:
        cells, refusals = paper_cells((options.table or 1,), options.jobs), ()
    print("\n".join([to_text(cells), *map(str, refusals)]))
    if options.json:
        _write(options.json, json.dumps(to_json(cells), indent=1))


def _check_files(json_file: Path | None, html_file: Path | None = None) -> None:
    """Before any work, refuse files that cannot be written, and one file that is named twice."""
    found = []
    for path in filter(None, (json_file, html_file)):
        try:
            found.append(destination(path))
        except OSError as error:
            raise _unwritable(path, error) from error
    if len(found) == 2 and found[0].is_same_file(found[1]):
        raise InputError(f"--json {json_file} and --html {html_file} name the same file; give each a file of its own.")


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written: {error.strerror}; name another file.")


def _simulate(options: argparse.Namespace, recipes: list[str], tell_refusals: bool = False) -> Comparison:
    for recipe in recipes:
        resolve(recipe)
    _check_files(options.json, options.html)
    model, example = _built(options)
    comparison = compare(
        model,
        example,
        recipes,
        device=options.device,
        optimizer=options.optimizer,
        name=options.model,
        jobs=options.jobs,
        tell_refusals=tell_refusals,
        modes=MODES if options.compiled else MODES[:1],
    )
    if options.json:
        _write(options.json, json.dumps(comparison.to_json(), indent=1))
    if options.html:
        _write(options.html, to_html(comparison))
    return comparison


def _built(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    return timm_model(
        options.model,
        num_classes=options.num_classes,
        image_size=options.image_size,
        batch_size=options.batch_size,
        dtype=options.dtype,
    )


def _print_fit(options: argparse.Namespace) -> None:
    model, example = _built(options)
    print(f"\nLargest batch whose step fits {options.fit / 1e9:,.1f} GB")
    for recipe in dict.fromkeys([options.against, options.recipe]):
        gm = transform(model, example, recipe)
        batch = largest_batch(gm, options.fit, device=device_model(options.device), optimizer=options.optimizer)
        found = f"{LIMIT} or more" if batch == LIMIT else batch
        print(f"{recipe}: {found or 'not even one image fits'}")


def _passes(options: argparse.Namespace) -> None:
    lines = []
    for kind in PASSES:
        fields = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(kind))
        lines.append((kind.__name__, fields, (kind.__doc__ or "").split("\n")[0]))
    print(tabulate(lines, ("pass", "options", "what it does"), disable_numparse=True))
    print()
    recipes = [(name, name_of(passes)) for name, passes in RECIPES.items()]
    recipes += [(f"any+{name}", name_of(passes)) for name, passes in SUFFIXES.items()]
    print(tabulate(recipes, ("recipe", "passes"), disable_numparse=True))


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all; into a pipe or a device, what was printed before goes first."""
    sys.stdout.flush()
    try:
        with written_whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


if __name__ == "__main__":
    console()
