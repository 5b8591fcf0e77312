"""Write what was measured into README.md and examples/results/RESULTS.md, from the files in examples/results.

python examples/tables.py               # rewrites both between their <!-- table: NAME --> marks
python examples/tables.py --check       # fails if one of them differs from the results
python examples/tables.py --figures     # draws the figures of cost and of CIFAR-10 in examples/results anew
python examples/tables.py --docstrings  # prints the sentences about speed that the docstrings of mixers and stems hold
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable

from result_tables import (
    RESULTS,
    ROOT,
    context,
    conversion,
    cost,
    dense,
    deployment,
    figures,
    finer,
    mechanisms,
    norms,
    segmentation,
    training,
)

from timm_vix._files import write_whole
from timm_vix.mixers import MIXERS

DOCUMENTS = (ROOT / "README.md", RESULTS / "RESULTS.md")
# a block holds no other mark, so one that lacks its end takes no text with it
BLOCK = re.compile(r"<!-- table: (?P<name>[^\n]+) -->\n(?:(?!<!-- ).)*<!-- end -->", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    "advice": conversion.advice,
    "precision": cost.precision,
    "conversions in short": conversion.conversions_in_short,
    "cost": cost.cost,
    "mechanisms": mechanisms.mechanisms,
    "layer, inference": lambda: cost.layer_speed("infer"),
    "layer, training": lambda: cost.layer_speed("train"),
    "layer, memory": cost.layer_memory,
    "packages, inference": lambda: cost.packages("infer"),
    "packages, training": lambda: cost.packages("train"),
    "ViT-Ti, inference": lambda: cost.model_speed("tiny", "infer"),
    "ViT-Ti, training": lambda: cost.model_speed("tiny", "train"),
    "ViT-Ti, inference, another processor": lambda: cost.model_speed("tiny", "infer", amx=True),
    "ViT-Ti, bfloat16": cost.half_precision,
    "ViT-Ti, memory": lambda: cost.model_memory("tiny"),
    "ViT-S, inference": lambda: cost.model_speed("small", "infer"),
    "ViT-S, training": lambda: cost.model_speed("small", "train"),
    "ViT-S, memory": lambda: cost.model_memory("small"),
    "crossovers": cost.crossovers,
    "operations": cost.model_operations,
    "systems": cost.systems,
    "caltech101": training.caltech101,
    "finer patches": finer.finer,
    "segmentation": segmentation.camvid,
    "caltech101, three epochs": training.compared_caltech101,
    "cifar10": lambda: training.finetuned("cifar10"),
    "claims": lambda: training.finetuned("claims"),
    "reproduced": training.reproduced,
    "longer trainings": training.longer,
    "compared": lambda: training.compared(1),
    "compared, longer": lambda: training.compared(training.LONG, ["modern"]),
    "conversions": conversion.conversions,
    "merging": conversion.merging,
    "transfers": conversion.transfers,
    "plans": conversion.plans,
    "dense features": dense.dense_features,
    "parts": training.parts,
    "deployment": deployment.deployment,
    "folded norms": norms.folded,
    "structured MLPs": norms.structured,
    "axial variants": conversion.axial_variants,
    "other mechanisms": mechanisms.other_mechanisms,
    "all mechanisms": mechanisms.all_mechanisms,
    "context": context.context,
    "context, timm": context.shipped_by_timm,
}
TABLES |= {f"tried, {study}": lambda study=study: conversion.tried(study) for study in conversion.studies()}


def filled(text: str) -> str:
    """The text with every table as the results give it.

    Raises:
        ValueError: for a mark that names no table.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"<!-- table: {name} --> is no table; allowed are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--figures", action="store_true", help="draw the figures too")
    parser.add_argument("--docstrings", action="store_true", help="print the sentences of the docstrings and stop")
    arguments = parser.parse_args()
    if arguments.docstrings:
        sentences = {mixer: cost.speed_in_a_model(mixer) for mixer in MIXERS if mixer != "softmax"}
        sentences["hmlp"] = mechanisms.operations_of_a_stem()
        for name, sentence in sentences.items():
            print(f"{name}\n{textwrap.fill(sentence, 120, break_on_hyphens=False)}\n")
        return 0
    if arguments.figures:
        figures.draw_all()
    stale = []
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale.append(path.name)
            if not arguments.check:
                write_whole(path, after.encode())
    if arguments.check and stale:
        print(f"error: {', '.join(stale)} differ from the results; run python examples/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
