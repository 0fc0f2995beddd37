"""What rows of a study say: a line for each setting and method, paired by seed with the first.

python tests/studies/table.py tests/studies/confirmed.csv
python tests/studies/table.py tests/studies/ablations.csv --across    # a column a setting
python tests/studies/table.py tests/studies/techniques.csv --across --first ricci
python tests/studies/table.py tests/studies/bits.csv --across --first METHOD,METHOD  # to their mean
python tests/studies/table.py ROWS --recipes --first "brevitas, without a teacher"    # to another's
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ricciq.report.statistics import summarize

NUMBERS = ("top1", "loss", "train_loss")
SAME = ("setting", "opt", "lr", "epochs", "samples", "teacher", "judged_on")
Row = dict[str, Any]


def comparisons(path: Path, first: str, recipes: bool) -> dict[tuple[str, ...], list[Row]]:
    """Setting and recipe, and what each method gave there on the seeds it shares with the first.

    The first may be several methods with commas between them: each seed's mean over them. With
    `recipes` a method is compared as it was taught, with those that were taught otherwise too.
    """
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            method, _, rate = row["method"].partition("@")
            if recipes:
                method += taught(row.pop("teacher", ""))
            key = (*(row.get(name, "") for name in SAME), rate or "1")
            numbers = {name: float(row[name]) for name in NUMBERS}
            judged = {"method": method, "lr_scale": 1.0, "seed": int(row["seed"]), **numbers}
            groups[key][method].append(judged | {"diverged": False})
    found = {}
    for key, methods in groups.items():
        names = [first] if recipes else first.split(",")
        together = [{row["seed"]: row for row in methods[name]} for name in names]
        firsts = {
            seed: together[0][seed]
            | {"method": first}
            | {number: fmean(rows[seed][number] for rows in together) for number in NUMBERS}
            for seed in set.intersection(*(set(rows) for rows in together))
        }
        for method, mine in methods.items():
            shared = [row for row in mine if row["seed"] in firsts]
            if method not in names and len(shared) > 1:
                pairs = shared + [firsts[row["seed"]] for row in shared]
                found.setdefault(key, []).append(
                    {
                        kind: list(summarize(relabelled(pairs, kind), [first, method], [1.0]))
                        for kind in ("top1", "loss")
                    }
                )
    return found


def relabelled(rows: list[Row], judged_by: str) -> list[Row]:
    """With another number in the place of top-1."""
    return [row | {"top1": row[judged_by]} for row in rows]


def taught(teacher: str) -> str:
    """What to say of the float model's share of the loss, where it is not all of it."""
    usual = {"": "", "True": "", "False": ", without a teacher"}
    return usual.get(teacher, f", the teacher's share {teacher}")


def rate(key: tuple[str, ...]) -> str:
    """The optimizer and its learning rate, where a method does not derive it itself."""
    return f"{key[1]} {float(key[2]):g} x {key[-1]}" if key[2] else key[1]


def print_across(found: dict[tuple[str, ...], list[Row]]) -> None:
    """A row for each method and recipe, a column for each setting."""
    settings = list(dict.fromkeys(key[0] for key in found))
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for (setting, opt, lr, _, _, teacher, _, _), methods in found.items():
        recipe = taught(teacher)
        recipe += "" if opt == "adamw" else f", {opt} {lr}"
        for both in methods:
            other = both["top1"][1]
            interval = f"[{other['low']:+.2f}, {other['high']:+.2f}]"
            cells[f"{other['method']}{recipe}"][setting] = f"{other['difference']:+.2f} {interval}"
    print(f"| method | {' | '.join(settings)} |")
    print("|---|" + "---|" * len(settings))
    for method, row in cells.items():
        print(f"| {method} | {' | '.join(row.get(setting, '') for setting in settings)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--first", default="ste", help="what differences are taken to")
    parser.add_argument("--across", action="store_true", help="a column a setting")
    parser.add_argument("--recipes", action="store_true", help="a method and its teacher are one")
    options = parser.parse_args()
    if options.across:
        print_across(comparisons(options.rows, options.first, options.recipes))
        return
    print(
        f"| setting | rate | method | seeds | {options.first.replace('ste', 'STE')} top-1, % "
        "| top-1, % | difference, 95 % | "
        "difference of the loss, 95 % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = comparisons(options.rows, options.first, options.recipes)
    for key, methods in found.items():
        for both in methods:
            (first, other), (_, loss) = both["top1"], both["loss"]
            print(
                f"| {key[0]}{taught(key[5])} | {rate(key)} | {other['method']} "
                f"| {other['seeds']} | {first['mean']:.2f} ± {first['std']:.2f} "
                f"| {other['mean']:.2f} ± {other['std']:.2f} "
                f"| {other['difference']:+.2f} [{other['low']:+.2f}, {other['high']:+.2f}] "
                f"| {loss['difference']:+.4f} [{loss['low']:+.4f}, {loss['high']:+.4f}] |"
            )


if __name__ == "__main__":
    main()
