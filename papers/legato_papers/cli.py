"""``legato-papers``: list, train, evaluate and report the papers' experiments, and a demonstration.

The options of ``legato-papers train RECIPE`` are the fields of the recipe's dataclasses; see ``recipes/``.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from legato_papers import __version__

_EXTRA = (
    "legato-papers: error: the command line needs packages that are not installed ({}): pip install 'legato-papers'"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed, 2 not understood, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from legato_papers.task import ExperimentError

        parsers = _parsers()
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("jsonargparse", "rich", "yaml"):
            print(_EXTRA.format(error.name), file=sys.stderr)
            return 1
        raise
    # A recipe's own parser reads what follows its name: through two levels of commands, errors in files get lost.
    level = " ".join(arguments[:2]) if arguments[:1] == ["train"] and len(arguments) > 1 else ""
    level = level if level in parsers else ""
    try:
        if level:
            arguments = _apply_preset(arguments, parsers[level])
        chosen = parsers[level].parse_args(arguments[2:] if level else arguments)
    except (argparse.ArgumentError, TypeError, ValueError, RecursionError) as error:
        print(f"legato-papers: error: {_explain(str(error), arguments, parsers)}", file=sys.stderr)
        return 2
    try:
        return _train(arguments[1], chosen) if level else _run(chosen)
    except (ExperimentError, OSError) as error:
        print(f"legato-papers: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("legato", "legato_papers"):
            raise
        print(_EXTRA.format(error.name), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the last checkpoint is whole, --resume goes on from it" if level else ""
        print(f"legato-papers: stopped{goes_on}", file=sys.stderr)
        return 130


def _train(name: str, chosen: Any) -> int:
    from legato_papers.recipes import recipe
    from legato_papers.report import show
    from legato_papers.run import Options, configured, is_first, train
    from legato_papers.task import ExperimentError

    which = recipe(name)
    values = chosen.as_dict()
    if "preset" in values:
        raise ExperimentError(
            f"expected --preset {values['preset']} on the command line, got it in a file: move it there"
        )
    config = configured(which.config, {field.name: values[field.name] for field in fields(which.config)})
    results = train(which, config, Options(**{field.name: values[field.name] for field in fields(Options)}))
    if is_first():
        show(results)
    return 0


def _run(chosen: Any) -> int:
    command, given = chosen.command, chosen[chosen.command]
    if command == "list":
        from legato_papers.report import list_recipes

        list_recipes()
    elif command == "evaluate":
        from legato_papers.report import show
        from legato_papers.run import evaluate

        show(evaluate(given.run, given.data_dir))
    elif command == "report":
        from legato_papers.report import report

        report(given.runs, given.markdown, given.json)
    elif command == "demo":
        from legato_papers.demo import demo

        demo(given.out)
    elif command == "data":
        _data(given.subcommand, given[given.subcommand])
    return 0


def _data(subcommand: str, given: Any) -> None:
    if subcommand == "list":
        from legato_papers.data.catalogue import show

        show(given.data_dir, thorough=given.check)
    else:
        from legato_papers.data.convert import convert

        for path in convert(given.name, given["from"], given.to):
            print(f"{path} ({path.stat().st_size / 1e6:,.1f} MB)")


def _parsers() -> dict[str, Any]:
    """The parser of the whole command line under "", those of its commands under the one or two words of each."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from legato_papers.recipes import names, recipe

    class Help(DefaultHelpFormatter):
        """Types with a range are told as "int, 1 to 5"."""

        def _expand_help(self, action: Any) -> str:
            return re.sub(r"Annotated\[([\w\[\]]+), Range\((.*?)\)\]", r"\1 \2", super()._expand_help(action))

    def parser(usage: str, description: str) -> ArgumentParser:
        return ArgumentParser(
            usage=usage, description=description, formatter_class=Help, exit_on_error=False, allow_abbrev=False
        )

    root = ArgumentParser(
        prog="legato-papers",
        usage="legato-papers COMMAND ...   (legato-papers COMMAND --help says more)",
        description="Linear recurrent networks: the papers' experiments.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = root.add_subcommands(dest="command", title="commands")
    listing = parser("legato-papers list", "The recipes, with what their papers report.")
    commands.add_subcommand("list", listing, help="list the recipes")

    training = parser(
        "legato-papers train RECIPE [options]", "Train a network, choose its weights by validation, test them once."
    )
    commands.add_subcommand("train", training, help="train a network for one or several seeds")

    evaluating = parser("legato-papers evaluate RUN [--data-dir DIR]", "Test the best weights of a run again.")
    evaluating.add_argument("run", type=Path, help="folder of a run or of one seed, or a best.ckpt")
    _add_data_dir(evaluating)
    commands.add_subcommand("evaluate", evaluating, help="test the weights of a run")

    reporting = parser("legato-papers report [RUNS] [--markdown FILE] [--json FILE]", "Results beside the papers'.")
    reporting.add_argument(
        "runs", type=Path, nargs="*", default=[Path("runs")], help="folders with runs at any depth; by default runs"
    )
    reporting.add_argument("--markdown", type=Path | None, default=None, help="write the table to this file too")
    reporting.add_argument("--json", type=Path | None, default=None, help="write every figure to this file too")
    commands.add_subcommand("report", reporting, help="compare results with the papers'")

    showing = parser(
        "legato-papers demo [--out DIR]",
        "Train on Mackey-Glass in a short time, stream the network, compare with the paper.",
    )
    showing.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the run and demo.png, made anew"
    )
    commands.add_subcommand("demo", showing, help="the main job in under three minutes")

    recipes = training.add_subcommands(dest="recipe", title="recipes")
    parsers: dict[str, Any] = {"": root, "list": listing, "train": training, "evaluate": evaluating}
    parsers |= {"report": reporting, "demo": showing}
    parsers |= _add_data(commands, parser)
    for name in names():
        which = recipe(name)
        # For the list of recipes only: a parser that hangs below another loses --print_config when it is used alone.
        recipes.add_subcommand(name, parser(f"legato-papers train {name}", which.description), help=which.description)
        one = parser(f"legato-papers train {name} [--config FILE] [--FIELD VALUE ...] [options]", which.description)
        _add_options(one)
        if which.presets:
            _add_preset(one, which.presets)
        one.add_class_arguments(which.config)
        parsers[f"train {name}"] = one
    return parsers


def _apply_preset(arguments: list[str], parser: Any) -> list[str]:
    """The arguments of ``train RECIPE`` without ``--preset NAME``, whose fields become the defaults of the parser.

    Fields on the command line and in --config therefore count more, wherever --preset stands.

    Raises:
        ValueError: there is no such preset.
    """
    from legato_papers.recipes import recipe

    rest = [word for word in arguments if not word.startswith("--preset=")]
    chosen = [word.partition("=")[2] for word in arguments if word.startswith("--preset=")]
    while "--preset" in rest:
        at = rest.index("--preset")
        chosen += rest[at + 1 : at + 2] or [""]
        del rest[at : at + 2]
    presets = recipe(arguments[1]).presets
    for name in chosen:
        if not presets:
            raise ValueError(f"{arguments[1]} has no presets: leave --preset out")
        if name not in presets:
            wrong = f"there is no preset {name}{_nearest(name, list(presets))}: " if name else ""
            raise ValueError(f"{wrong}expected --preset to be one of {', '.join(presets)}")
        parser.set_defaults(presets[name].fields)
    return rest


def _add_preset(parser: Any, presets: dict[str, Any]) -> None:
    """``--preset`` for --help and in files; on the command line ``_apply_preset`` reads it."""
    sizes = ", ".join(f"{name} ({preset.description})" for name, preset in presets.items())
    parser.add_argument(
        "--preset",
        type=str,
        default=argparse.SUPPRESS,
        metavar="|".join(presets),
        help=f"another size of the recipe; any field that is given counts more: {sizes}",
    )


def _add_options(parser: Any) -> None:
    """How and where a recipe is run; unlike its fields, these do not say what is learned."""
    from legato_papers.task import Accelerator, Precision

    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options and fields, such as a run's config.yaml")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="one number n is the seeds 0 to n - 1, several are these seeds",
    )
    add("--seed", type=int, default=0, help="one seed")
    add("--run-dir", type=Path | None, default=None, help="folder of the run; by default runs/RECIPE/TIME")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --run-dir, or with the newest of this recipe; all else must be as it was, the "
        "epochs too, because the learning rate follows from them",
    )
    add("--overwrite", action="store_true", help="delete the run in --run-dir first, unless it is still running")
    _add_data_dir(parser)
    add("--accelerator", type=Accelerator, default="auto", help="as Lightning has them")
    add("--devices", type=int, default=1, help="how many devices; torchrun's number of processes counts more")
    add("--precision", type=Precision, default="32-true", help="of the arithmetic, as Lightning has them")


def _add_data(commands: Any, parser: Any) -> dict[str, Any]:
    """The commands about files of data, under their words."""
    data = parser(
        "legato-papers data list|convert [options]", "Files of data: what is here, and compact forms of others."
    )
    commands.add_subcommand("data", data, help="find, check and convert the files of data sets")
    subcommands = data.add_subcommands(dest="subcommand", title="subcommands")
    listing = parser(
        "legato-papers data list [--data-dir DIR] [--check]", "What is here of every data set, and its licence."
    )
    _add_data_dir(listing)
    listing.add_argument("--check", action="store_true", help="compare all checksums, not only sizes: some seconds")
    subcommands.add_subcommand("list", listing, help="what is here, where, whole or not")
    converting = parser(
        "legato-papers data convert NAME --from PATH --to DIR",
        "Make a data set's compact form from its official files.",
    )
    names = "imdb, qqp, snli, text8 or iwslt15-en-vi"
    converting.add_argument("name", type=str, help=names)
    converting.add_argument("--from", type=Path, required=True, help="folder of the official files, or one of them")
    converting.add_argument("--to", type=Path, required=True, help="folder of data to write to")
    subcommands.add_subcommand("convert", converting, help="the compact form from the official files")
    return {"data": data, "data list": listing, "data convert": converting}


def _add_data_dir(parser: Any) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path | None,
        default=None,
        help="folder of the data files; by default $LEGATO_DATA, else the user's cache, into which they are downloaded",
    )


def _explain(message: str, arguments: list[str], parsers: dict[str, Any]) -> str:
    """The parser's message in one or two lines, with the nearest name that exists."""
    words = [word for word in arguments if not word.startswith("-")]
    level = next(name for name in (" ".join(words[:2]), *words[:1], "") if name in parsers)
    see = f"see legato-papers {level} --help".replace("  ", " ")
    keys = list(parsers[level].get_defaults().keys())
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        wanted = unknown[1].split("=")[0]
        options = ["--" + (key if "." in key else key.replace("_", "-")) for key in keys]
        return f"there is no option {wanted}{_nearest(wanted, options)}: {see}"
    field = re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", message)
    if field:
        wanted = ".".join(part for part in field.groups() if part)
        return f"there is no field {wanted}{_nearest(wanted, keys)}: {see}"
    choice = re.search(r"invalid choice: '?([^']+?)'? \(choose from (.*)\)", message)
    if choice:
        names = [name.strip(" '") for name in choice[2].split(",")]
        kind = {"train": "recipe", "data": "subcommand"}.get(words[0], "command")
        return f"there is no {kind} {choice[1]}{_nearest(choice[1], names)}: expected one of {', '.join(names)}"
    missing = re.search(r'expected "(?:\w+\.)?(recipe|subcommand|command)" to be one of', message)
    if missing:
        depth = len(level.split())  # the parser itself cuts a long list short
        names = [name.split()[-1] for name in parsers if name.startswith(level) and len(name.split()) == depth + 1]
        return f"expected a {missing[1]}: {', '.join(names)}: {see}"
    value = re.search(r'Parser key "([\w.]+)"(.*?)(?:Given|Got) value: (.*)', message, re.DOTALL)
    if value:
        kinds = re.findall(r"Expected an? <class '(\w+)'>", value[2])
        literal = re.search(r"Expected a typing\.Literal\[(.*?)\]", value[2])
        wanted = f"one of {literal[1]}" if literal else " or ".join(dict.fromkeys(kinds)).replace("NoneType", "null")
        if wanted:
            return f"--{value[1]}: expected {wanted}, got {value[3].strip()!r}: {see}"
    if "arguments are required" in message:
        message = re.sub(r"\b[\w.]+\.(?=\w)", "", message)  # the names without those of their commands
    return f"{' '.join(message.split())}: {see}"


def _nearest(wanted: str, names: list[str]) -> str:
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


if __name__ == "__main__":
    sys.exit(main())
