"""Results beside the papers': a table on the terminal, in Markdown or JSON, from the ``result.json`` of every seed."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from .data.files import write
from .recipes import names, recipe
from .task import ExperimentError, Paper

# What every result has.
_RESULT: dict[str, Any] = {"recipe": str, "seed": int, "config": dict, "validation": dict, "test": dict}
_RESULT |= {"machine": dict, "parameters": int, "seconds": int | float, "command": str}

_COLUMNS = [
    "experiment",
    "data",
    "test figure",
    "paper",
    "measured",
    "seeds",
    "parameters",
    "s a seed",
    "machine",
    "commit",
    "command",
]


def list_recipes() -> None:
    """Print every recipe with its description and the value that its paper reports."""
    table = Table("recipe", "what", "paper", "reported", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name in names():
        which = recipe(name)
        table.add_row(
            name,
            which.description,
            which.paper.reported.source,
            f"{which.paper.metric} {_reported(which.paper)}",
        )
    _console().print(table)


def show(results: list[dict[str, Any]]) -> None:
    """Print the figures of every seed and, of several, mean and spread."""
    if not results:
        return
    paper = recipe(results[0]["recipe"]).paper
    metrics = list(results[0]["test"])
    trained = "seconds" in results[0]  # not evaluated only
    text = trained and "tokens_per_second" in results[0]
    costs = ["updates", "seconds", *["tokens a second"] * text, "peak memory"] if trained else []
    data = results[0].get("data", "")
    where = f", on {data}" if data else ""
    table = Table(
        "seed",
        *[f"test {name}{where}" for name in metrics],
        f"validation {paper.metric}",
        *costs,
        box=None,
        pad_edge=False,
    )
    for result in results:
        figures = [_scaled(result["test"][name], paper) for name in metrics]
        figures.append(_scaled(result["validation"][paper.metric], paper))
        if trained:
            figures += [f"{result['updates']:,}", f"{result['seconds']:,.0f}"]
            if text:
                figures.append(f"{result['tokens_per_second']:,}")
            figures.append(f"{result['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in result else "")
        table.add_row(str(result["seed"]), *figures)
    if len(results) > 1:
        table.add_row("mean", *[_spread([r["test"][name] for r in results], paper) for name in metrics], "")
    reported = paper_value(results[0])
    if reported:
        table.add_row("paper", *[reported if name == paper.metric else "" for name in metrics], "")
    console = _console()
    console.print(table)
    if not comparable(results[0]):
        console.print(f"The paper's {_reported(paper)} is on {paper.data}: not comparable with {data}.")


def report(folders: list[Path], markdown: Path | None = None, json_file: Path | None = None) -> None:
    """Print a row for each configuration found below the folders, and write it where asked.

    Raises:
        ExperimentError: there is no finished run below the folders.
    """
    rows = [row for group in _groups(folders) for row in _rows(group)]
    table = Table(*_COLUMNS[:-4], box=None, pad_edge=False)
    for column in table.columns[1:]:  # the experiment's name may wrap, the figures may not
        column.no_wrap = True
    for row in rows:
        table.add_row(*[row[column] for column in _COLUMNS[:-4]])
    console = _console()
    console.print(table)
    for command, seconds, machine, commit in dict.fromkeys(
        (row["command"], row["s a seed"], row["machine"], row["commit"]) for row in rows
    ):
        console.print(f"{command}  [dim]({seconds} s a seed, {machine}, commit {commit})[/]", soft_wrap=True)
    if markdown:
        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *[[row[column] for column in _COLUMNS] for row in rows]]
        write(markdown, [("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n").encode()])
    if json_file:
        write(json_file, [(json.dumps(_groups(folders), indent=1) + "\n").encode()])


def read_result(path: Path) -> dict[str, Any]:
    """What ``result.json`` of a seed holds.

    Raises:
        ExperimentError: the file cannot be read, or is not one of ours.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(
            f"{path} cannot be read as a result of legato-papers train: {error}: delete it, and "
            "legato-papers train --resume tests the run again"
        ) from error
    found = result if isinstance(result, dict) else {}
    wrong = [name for name, kind in _RESULT.items() if not isinstance(found.get(name), kind)]
    wrong += [] if wrong or isinstance(found["config"].get("model"), dict) else ["config of the model"]
    if wrong or found["recipe"] not in names():
        raise ExperimentError(
            f"{path} is not a result of legato-papers train: expected a recipe of this version and its "
            f"{', '.join(_RESULT)}, got "
            f"{'no ' + ', '.join(wrong) if wrong else 'the recipe ' + repr(found['recipe'])}: remove it from there"
        )
    return found


def comparable(result: dict[str, Any]) -> bool:
    """Whether a result is on the data set of its paper's value."""
    data = recipe(result["recipe"]).paper.data
    return not data or result.get("data", "") == data


def paper_value(result: dict[str, Any]) -> str:
    """The value that the paper reports for a network of this kind.

    Empty where it reports none, where the result is on other data, and where a part of the recipe, such as
    pre-training, is switched off.
    """
    paper, kind = recipe(result["recipe"]).paper, _other_kind(result)
    switched = any(field.endswith((" true", " false")) for field in _other_fields(result))
    if switched or not comparable(result) or kind not in ("", *paper.kinds):
        return ""
    return _reported(paper, paper.kinds.get(kind, ""))


def size_in_words(result: dict[str, Any]) -> str:
    """The parameters of a result's network; those in embeddings apart, as papers leave them out of their counts."""
    embedded = result.get("embedding_parameters", 0)
    rest = f"{result['parameters'] - embedded:,} parameters"
    return f"{rest} and {embedded:,} in embeddings" if embedded else rest


def paper_and_measured(name: str, results: list[dict[str, Any]]) -> Table:
    """The paper's table for one recipe with our row in it."""
    paper = recipe(name).paper
    table = Table(
        "network",
        paper.metric,
        "parameters",
        title=f"{name}: {paper.reported.source}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for network in paper.baselines:
        table.add_row(f"{network}, paper", _reported(paper, network), "")
    table.add_row("parallel LMU, paper", _reported(paper), paper.parameters)
    for metric in results[0]["test"]:
        label = paper.labels.get(metric, metric)
        table.add_row(
            f"[bold]{label}[/]",
            f"[bold]{_spread([r['test'][metric] for r in results], paper)}[/]",
            f"{results[0]['parameters']:,}",
        )
    return table


def _groups(folders: list[Path]) -> list[list[dict[str, Any]]]:
    """Results that differ in nothing but the seed, together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("result.json")):
            result = read_result(path)
            key = json.dumps([result["recipe"], result["config"], result["machine"], str(path.parent.parent)])
            found.setdefault(key, []).append(result)
    if not found:
        places = ", ".join(map(str, folders))
        raise ExperimentError(
            f"expected finished runs (seed-*/result.json) below {places}, found none: "
            "legato-papers train RECIPE makes one"
        )
    return list(found.values())


def _rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row for each test figure, the one that the paper has first."""
    first = results[0]
    paper = recipe(first["recipe"]).paper
    seeds = [r["seed"] for r in results]
    row = {
        "experiment": " ".join(filter(None, [first["recipe"], _size(first), *_other_fields(first)])),
        "seeds": str(len(seeds)),
        "data": first.get("data", ""),
        "parameters": size_in_words(first).replace(" parameters", "").replace(" and ", " + "),
        "s a seed": f"{mean(r['seconds'] for r in results):.0f}",
        "machine": "{processor}, {threads} threads, torch {torch}".format(**first["machine"]),
        "commit": ", ".join(sorted({str(r.get("commit")) for r in results})),
        "command": first["command"].rsplit(" --seed ", 1)[0] + _seeds(seeds) if len(seeds) > 1 else first["command"],
    }
    return [
        row
        | {
            "test figure": metric,
            "paper": paper_value(first) if metric == paper.metric else "",
            "measured": _spread([r["test"][metric] for r in results], paper),
        }
        for metric in sorted(first["test"], key=lambda metric: metric != paper.metric)
    ]


def _size(result: dict[str, Any]) -> str:
    """The preset whose fields a result has, else the kind of its network, where it is not the recipe's own."""
    for name, preset in recipe(result["recipe"]).presets.items():
        if all(_field(result["config"], path) == value for path, value in preset.fields.items()):
            return name
    return _other_kind(result)


def _field(config: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config.get(name, {})
    return config


def _other_kind(result: dict[str, Any]) -> str:
    """The kind of a result's network; empty for the recipe's own."""
    kind = result["config"]["model"].get("kind", "")
    return "" if kind == getattr(recipe(result["recipe"]).config().model, "kind", "") else kind


def _other_fields(result: dict[str, Any]) -> list[str]:
    """The recipe's own numbers and choices, such as a length, where they are not the default."""
    usual, config = recipe(result["recipe"]).config(), result["config"]
    return [
        f"{name} {str(value).lower()}"
        for name, value in config.items()
        if isinstance(value, bool | int | float) and value != getattr(usual, name, value)
    ]


def _seeds(seeds: list[int]) -> str:
    """The option that runs these again."""
    if sorted(seeds) == list(range(len(seeds))):
        return f" --seeds {len(seeds)}"
    return f" --seeds {' '.join(map(str, seeds))}"


def _spread(values: list[float], paper: Paper) -> str:
    text = _scaled(mean(values), paper)
    return f"{text} ± {stdev(values) * paper.scale:.{paper.digits}f}" if len(values) > 1 else text


def _scaled(value: float, paper: Paper) -> str:
    return f"{value * paper.scale:.{paper.digits}f}{paper.unit}"


def _reported(paper: Paper, baseline: str = "") -> str:
    """The paper's value, or that of a baseline, with its unit; an unverified one is marked."""
    reported = paper.baselines[baseline] if baseline else paper.reported
    return f"{reported.value}{paper.unit}" + " (unverified)" * (not reported.verified)


def _console() -> Console:
    return Console(highlight=False)
