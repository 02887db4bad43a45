"""Write the tables and pictures of ``README.md`` from ``results/``: ``python benchmarks/report.py``

The newest section of every device and subject is used; ``run.py`` describes sections. This command
measures nothing: it replaces the text between the markers in README.md.
"""

import ast
import json
import re
import sys
from pathlib import Path

import show
from measure import RESULTS
from run import SUBJECTS

README = Path(__file__).with_name("README.md")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def main() -> int:
    sections = newest(RESULTS)
    text = README.read_text()
    text = between(text, "targets", "\n\n".join(targets(sections)))
    text = between(text, "metrics", "\n\n".join(metrics(sections)))
    README.write_text(text)
    print(f"{README}: {len(sections)} sections")
    return 0


def newest(results: Path) -> dict[tuple[str, str], dict]:
    """The newest section of every (device, subject), with its picture if there is one."""
    found: dict[tuple[str, str], dict] = {}
    for path in sorted(results.glob("*.json")):
        name = re.fullmatch(r"(cpu|cuda)-(\d{4}-\d\d-\d\d)", path.stem)
        if name is None:  # the result of throughput.py or of an experiment
            continue
        for subject, section in json.loads(path.read_text())["subjects"].items():
            picture = path.with_name(f"{name[1]}-{subject}-{name[2]}.png")
            found[name[1], subject] = {**section, "picture": picture if picture.exists() else None}
    order = {subject: number for number, subject in enumerate(SUBJECTS)}
    return dict(sorted(found.items(), key=lambda item: (item[0][0], order.get(item[0][1], len(order)))))


def targets(sections: dict[tuple[str, str], dict]) -> list[str]:
    """One table per device: target, measured value and subject."""
    tables = []
    for device, title in DEVICES.items():
        rows = [
            {"subject": f"[`{subject}`](#{_anchor(device, subject)})", **row}
            for (where, subject), section in sections.items()
            if where == device
            for row in show.target_rows(section["targets"])
        ]
        if rows:
            tables.append(f"### {title}\n\n{show.markdown(rows)}")
    return tables


def metrics(sections: dict[tuple[str, str], dict]) -> list[str]:
    """For every subject: its description, its machine, its picture and its tables."""
    parts = []
    for (device, subject), section in sections.items():
        parts += [f"### {DEVICES[device]}: {subject}", _about(device, subject), _machine(section)]
        if section["picture"]:
            parts.append(f"![{subject}](results/{section['picture'].name})")
        parts.append(f"<details><summary>all metrics</summary>\n\n{show.markdown(section['rows'])}\n\n</details>")
    return parts


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between <!-- name --> and <!-- end of name -->."""
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"expected <!-- {name} --> and <!-- end of {name} --> in {README.name}: put them back")
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def _anchor(device: str, subject: str) -> str:
    return f"{DEVICES[device].lower()}-{subject}"


def _about(device: str, subject: str) -> str:
    """The docstring of the subject's module, or on a GPU of its function in gpu.py."""
    if device == "cuda":
        parts = _parsed("gpu").body
        here = [part for part in parts if isinstance(part, ast.FunctionDef) and part.name == subject]
    else:
        here = [_parsed(subject)]
    return "\n\n".join(filter(None, map(ast.get_docstring, here)))


def _parsed(module: str) -> ast.Module:
    path = Path(__file__).with_name(f"{module}.py")
    return ast.parse(path.read_text() if path.exists() else "")


def _machine(section: dict) -> str:
    """The machine, versions and commit of a measurement, in one line."""
    machine = section["machine"]
    facts = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        *(f"{name} {machine[name]}" for name in ("python", "torch", "numba") if machine.get(name)),
        f"copy {section['copy_GB_per_s']['copy']:.3g} GB/s, add {section['copy_GB_per_s']['add']:.3g} GB/s",
        f"commit {machine['commit']}, {section['date']}",
        *(f"{name} {version}" for name, version in section["versions"].items()),
    ]
    return f"Measured on: {'; '.join(facts)}."


if __name__ == "__main__":
    sys.exit(main())
